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

from pipeline.build.inputs import Source
from pipeline.build.part import Part
from pipeline.errors import DeviceError, PipelineError, StoreError, WorkersError
from pipeline.logs import Warned, append_warning, collected_warnings
from pipeline.parallel.device_choice import choose_device
from pipeline.parallel.devices import (
    device_of_one,
    is_device_failure,
    is_out_of_memory,
    threads_of_one,
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


class Filled(NamedTuple):
    """Samples of a block that was written, and what was told meanwhile.

    ``notes`` are of devices, ``warnings`` those of another process.
    """

    samples: int
    notes: tuple[str, ...]
    warnings: tuple[Warned, ...] = ()


@dataclass(frozen=True)
class Filling:
    """Who fills blocks, and which: a half-open range of every split, a part, or all.

    ``workers`` processes of this machine, those behind the Dask ``scheduler``, or this
    process. ``device`` None is a GPU where the worker has one. ``threads`` are the CPU
    threads of each process, by default its share of the cores. Splits that are in the
    store ``before`` take over what they have there.
    """

    device: str | None = "cpu"
    workers: int = 0
    blocks: tuple[int, int] | None = None
    part: Part | None = None
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


def store_seen(path: Path) -> str | None:
    """Fingerprint of the store at ``path``, None where this process sees none."""
    try:
        return str(FeatureStore.open(path, allow_unsealed=True).fingerprint)
    except (StoreError, OSError):
        return None


def not_seen(address: str, path: Path) -> WorkersError:
    """Error of a worker that has no such store where the others have it."""
    return WorkersError(
        f"The Dask worker {address} does not see the store {path}; put it, the "
        "datasets and the checkpoint where all workers find them under the same path."
    )


class BlockFiller:
    """Fills blocks of one store; called from several threads at once."""

    def __init__(
        self, source: Source, writer: StoreWriter, before: Path | None
    ) -> None:
        self._source = source
        self._writer = writer
        self._before = {} if before is None else FeatureStore.open(before).splits

    def __call__(self, block: Block) -> Filled:
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
        with _notes_of_this_thread() as notes:
            try:
                samples = self._source.fill_block(
                    self._writer, block.split, block.number, before
                )
            except (RuntimeError, MemoryError) as error:
                meant = _translated(error)
                if meant is error:
                    # Raised from itself it would be its own cause: Dask follows causes.
                    raise
                raise meant from error
        return Filled(samples, tuple(notes))


def _translated(error: RuntimeError | MemoryError) -> Exception:
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


def fill_in_worker(
    document: str,
    path: Path,
    fingerprint: str,
    build: str,
    filling: Filling,
    block: Block,
) -> Filled:
    """Fill ``block`` in a worker process, which keeps datasets and teacher.

    It keeps them for one ``build``: the next one may find other files and another plan.
    """
    with collected_warnings() as warnings:
        with _starting:
            fill = _worker_filler(document, path, fingerprint, build, filling)
        try:
            return fill(block)._replace(warnings=tuple(warnings))
        except DeviceError as error:
            if _starts_anew():
                # The process cannot use its device any more; a fresh one can.
                _tell_anew(path, f"{block}: {error}; its worker starts anew")
                os._exit(1)
            raise


def _tell_anew(path: Path, text: str) -> None:
    """Warn from a process that ends before it can hand on anything."""
    os.write(2, f"Warning: {text}\n".encode())
    append_warning(path.with_name(f"{path.name}.log"), text)


def _starts_anew() -> bool:
    """Whether this worker is started again when it ends: a nanny watches it."""
    from distributed import get_worker

    return get_worker().nanny is not None


@lru_cache(maxsize=1)
def _worker_filler(
    document: str, path: Path, fingerprint: str, build: str, filling: Filling
) -> BlockFiller:
    """Datasets and teacher, loaded once in each worker process for a build."""
    from distributed import get_worker

    worker = get_worker()
    if store_seen(path) != fingerprint:
        raise not_seen(worker.address, path)
    writer = StoreWriter(path)
    try:
        if filling.scheduler is None:
            device = device_of_one(filling.device or "cpu", int(worker.name))
            torch.set_num_threads(filling.threads or threads_of_one(filling.workers))
        else:
            device = str(choose_device(filling.device))
            if filling.threads is not None:
                torch.set_num_threads(filling.threads)
        spec = CacheSpec.model_validate_json(document)
        source = Source.open(spec, device, store=path)
        return BlockFiller(source, writer, filling.before)
    except PipelineError as error:
        raise WorkersError(f"The Dask worker {worker.address}: {error}") from None


@contextmanager
def _notes_of_this_thread() -> Iterator[list[str]]:
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
