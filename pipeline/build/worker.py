"""Fills single blocks, in whichever process; keeps what all blocks need."""

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

from pipeline.build.inputs import BuildInputs
from pipeline.build.part import BuildPart
from pipeline.errors import DeviceError, PipelineError, StoreError, WorkersError
from pipeline.logs import LoggedWarning, append_warning, collect_warnings
from pipeline.parallel.device_choice import choose_device
from pipeline.parallel.devices import (
    device_for_worker,
    is_device_failure,
    is_out_of_memory,
    threads_per_worker,
)
from pipeline.parallel.task_pool import RETRIES
from pipeline.spec.cache_spec import CacheSpec
from pipeline.store.reader import FeatureStore
from pipeline.store.writer import StoreWriter

_starting = threading.Lock()


class Block(NamedTuple):
    """A block of a split, as it is told in messages."""

    split: str
    number: int

    def __str__(self) -> str:
        return f"block {self.number} of split {self.split!r}"


class BlockResult(NamedTuple):
    """Samples of a block that was written, and what was told meanwhile.

    ``notes`` are of devices, ``warnings`` those of another process.
    """

    samples: int
    notes: tuple[str, ...]
    warnings: tuple[LoggedWarning, ...] = ()


@dataclass(frozen=True)
class FillOptions:
    """Who fills blocks, and which: a half-open range of every split, a part, or all.

    ``workers`` processes of this machine, those behind the Dask ``scheduler``, or this
    process. ``device`` None is a GPU where the worker has one. ``threads`` are the CPU
    threads of each process, by default its share of the cores. Splits that are in the
    store ``before`` take over what they have there.
    """

    device: str | None = "cpu"
    workers: int = 0
    blocks: tuple[int, int] | None = None
    part: BuildPart | None = None
    before: Path | None = None
    scheduler: str | None = None
    threads: int | None = None
    retries: int = RETRIES

    def chosen(self, n_blocks: dict[str, int]) -> dict[str, range]:
        """Blocks to fill by split, of splits that have ``n_blocks``."""
        if self.part is not None:
            return self.part.blocks(n_blocks)
        first, last = self.blocks or (0, max(n_blocks.values()))
        return {name: range(first, min(last, n)) for name, n in n_blocks.items()}

    @property
    def label(self) -> str:
        """What tells this process from others at the same store; empty for all."""
        if self.part is not None:
            return f"part-{self.part.number}-of-{self.part.of}"
        return "" if self.blocks is None else "{}-{}".format(*self.blocks)


def read_fingerprint(path: Path) -> str | None:
    """Fingerprint of the store at ``path``, None where this process sees none."""
    try:
        return str(FeatureStore.open(path, allow_unsealed=True).fingerprint)
    except (StoreError, OSError):
        return None


def store_not_visible(address: str, path: Path) -> WorkersError:
    """Error of a worker that has no such store where the others have it."""
    return WorkersError(
        f"The Dask worker {address} does not see the store {path}; put it, the "
        "datasets and the checkpoint where all workers find them under the same path."
    )


class BlockWorker:
    """Fills blocks of one store; called from several threads at once."""

    def __init__(
        self, source: BuildInputs, writer: StoreWriter, before: Path | None
    ) -> None:
        self._source = source
        self._writer = writer
        self._before = {} if before is None else FeatureStore.open(before).splits

    def __call__(self, block: Block) -> BlockResult:
        """Fill ``block`` unless it is there.

        Raises
        ------
        DataError, StoreError
            A sample cannot be computed, or the block not be held in memory.
        DeviceError
            The device failed.
        """
        known = self._before.get(block.split)
        before = None if known is None else known.index
        with _collect_device_notes() as notes:
            try:
                samples = self._source.fill_block(
                    self._writer, block.split, block.number, before
                )
            except (RuntimeError, MemoryError) as error:
                meant = _translate_error(error)
                if meant is error:
                    # Raised from itself it would be its own cause: Dask follows causes.
                    raise
                raise meant from error
        return BlockResult(samples, tuple(notes))


def _translate_error(error: RuntimeError | MemoryError) -> Exception:
    """What ``error`` means for a block; itself where it is none of a device."""
    if isinstance(error, PipelineError):
        return error
    first = str(error).splitlines()[0] if str(error) else type(error).__name__
    if is_out_of_memory(error):
        return StoreError(
            f"There is too little memory for a block ({first}); use fewer workers, or "
            "a smaller store.rows_per_block for a new store"
        )
    if is_device_failure(error):
        return DeviceError(f"The device failed ({first})")
    return error


def run_block_in_worker(
    document: str,
    path: Path,
    fingerprint: str,
    build: str,
    filling: FillOptions,
    block: Block,
) -> BlockResult:
    """Fill ``block`` in a worker process, which keeps datasets and teacher.

    It keeps them for one ``build``: the next one may find other files and another plan.
    """
    with collect_warnings() as warnings:
        with _starting:
            fill = _open_block_worker(document, path, fingerprint, build, filling)
        try:
            return fill(block)._replace(warnings=tuple(warnings))
        except DeviceError as error:
            if _is_restarted():
                # The process cannot use its device any more; a fresh one can.
                _warn_of_restart(path, f"{block}: {error}; its worker starts anew")
                os._exit(1)
            raise


def _warn_of_restart(path: Path, text: str) -> None:
    """Warn from a process that ends before it can hand on anything."""
    os.write(2, f"Warning: {text}\n".encode())
    append_warning(path.with_name(f"{path.name}.log"), text)


def _is_restarted() -> bool:
    """Whether this worker is started again when it ends: a nanny watches it."""
    from distributed import get_worker

    return get_worker().nanny is not None


@lru_cache(maxsize=1)
def _open_block_worker(
    document: str, path: Path, fingerprint: str, build: str, filling: FillOptions
) -> BlockWorker:
    """Datasets and teacher, loaded once in each worker process for a build."""
    from distributed import get_worker

    worker = get_worker()
    if read_fingerprint(path) != fingerprint:
        raise store_not_visible(worker.address, path)
    writer = StoreWriter(path)
    try:
        if filling.scheduler is None:
            device = device_for_worker(filling.device or "cpu", int(worker.name))
            torch.set_num_threads(
                filling.threads or threads_per_worker(filling.workers)
            )
        else:
            device = str(choose_device(filling.device))
            if filling.threads is not None:
                torch.set_num_threads(filling.threads)
        spec = CacheSpec.model_validate_json(document)
        source = BuildInputs.open(spec, device, store=path)
        return BlockWorker(source, writer, filling.before)
    except PipelineError as error:
        raise WorkersError(f"The Dask worker {worker.address}: {error}") from None


@contextmanager
def _collect_device_notes() -> Iterator[list[str]]:
    """Collect what is told of devices while a block is filled."""
    notes: list[str] = []
    handler = _Collector(notes, threading.get_ident())
    logger = logging.getLogger("pipeline.parallel.devices")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield notes
    finally:
        logger.removeHandler(handler)


class _Collector(logging.Handler):
    def __init__(self, notes: list[str], thread: int) -> None:
        super().__init__()
        self._notes = notes
        self._thread = thread

    def emit(self, record: logging.LogRecord) -> None:
        if record.thread == self._thread:
            self._notes.append(record.getMessage())
