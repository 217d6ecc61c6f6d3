"""Fills the blocks of a planned store: here, in worker processes, or on a cluster."""

import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.devices import (
    device_of_one,
    is_device_failure,
    is_out_of_memory,
    threads_of_one,
)
from pipeline.distribute import (
    RETRIES,
    DaskPool,
    Outcome,
    Pool,
    ThreadPool,
    connected,
    local_workers,
    retried,
    run_tasks,
)
from pipeline.errors import (
    BusyError,
    DataError,
    DeviceError,
    PipelineError,
    StoreError,
    WorkersError,
)
from pipeline.interrupts import Stopped
from pipeline.progress import Progress
from pipeline.source import Source
from pipeline.spec import CacheSpec
from pipeline.store.reader import FeatureStore
from pipeline.store.writer import StoreWriter

log = logging.getLogger("pipeline.filling")
Report = Callable[[str, int, int], None]
# Of a process that fills blocks: one has the teacher, the other the disk.
_THREADS = 2
# So many failures end a build that succeeds less often than it fails.
_MANY_FAILURES = 3
_NAMED = 3
_starting = threading.Lock()


class Block(NamedTuple):
    """A block of a split, as it is told in messages."""

    split: str
    number: int

    def __str__(self) -> str:
        return f"block {self.number} of split {self.split!r}"


class Filled(NamedTuple):
    """Samples of a block that was written, and what was told meanwhile."""

    samples: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Filling:
    """Who fills blocks, and which: a half-open range of every split, or all.

    ``workers`` processes of this machine, those behind the Dask ``scheduler``, or this
    process. ``device`` None is a GPU where the worker has one. ``threads`` are the CPU
    threads of each process, by default its share of the cores. Splits that are in the
    store ``before`` take over what they have there.
    """

    device: str | None = "cpu"
    workers: int = 0
    blocks: tuple[int, int] | None = None
    before: Path | None = None
    scheduler: str | None = None
    threads: int | None = None
    retries: int = RETRIES


def fill_blocks(
    source: Source,
    writer: StoreWriter,
    filling: Filling,
    report: Report,
    progress: Progress | None = None,
) -> None:
    """Fill every pending block, in this process or in workers.

    Raises
    ------
    DataError, StoreError
        Some blocks could not be written; all others were, or the first few all failed.
    WorkersError
        The workers are gone, or do not see what they need.
    """
    progress = progress or Progress()
    missing = {name: set(writer.pending_blocks(name, True)) for name in writer.splits}
    chosen = _blocks(writer, filling.blocks)
    pending = [block for block in chosen if block.number in missing[block.split]]
    log.info("%s: %d blocks to do", writer.path, len(pending))
    count_blocks(progress, writer, chosen, pending)
    if not pending:
        return
    failed: dict[Block, Exception] = {}
    with _workplace(source, writer, filling) as (pool, task):
        for outcome in run_tasks(
            pool,
            task,
            pending,
            retries=filling.retries,
            transient=transient_in(pool),
            on_retry=partial(_tell_retry, progress),
            on_tick=lambda: _count_workers(progress, pool),
        ):
            _count_workers(progress, pool)
            if outcome.error is not None:
                failed[outcome.item] = outcome.error
                _record_failure(progress, outcome)
                written = progress.blocks_done - (len(chosen) - len(pending))
                if len(failed) >= _MANY_FAILURES and len(failed) > written:
                    break
            elif outcome.result is not None:
                _record(progress, outcome.item, outcome.result)
                left = progress.blocks - progress.blocks_done
                report(outcome.item.split, outcome.result.samples, left)
    if failed:
        raise _failure(writer.path, len(pending), failed)


def _blocks(writer: StoreWriter, chosen: tuple[int, int] | None) -> list[Block]:
    """Blocks of all splits whose number is in the half-open range ``chosen``."""
    return [
        Block(name, number)
        for name, index in writer.splits.items()
        for number in range(index.n_blocks)
        if chosen is None or chosen[0] <= number < chosen[1]
    ]


def count_blocks(
    progress: Progress,
    writer: StoreWriter,
    chosen: Sequence[Block] | None = None,
    pending: Sequence[Block] = (),
) -> None:
    """Tell ``progress`` the blocks and samples to be made; by default none of all."""
    chosen = _blocks(writer, None) if chosen is None else chosen

    def samples(blocks: Sequence[Block]) -> int:
        return sum(
            len(writer.splits[b.split].block_positions(b.number)) for b in blocks
        )

    every = samples(chosen)
    done = len(chosen) - len(pending)
    progress.begin(len(chosen), every, done, every - samples(pending))


def _count_workers(progress: Progress, pool: Pool) -> None:
    progress.workers = pool.workers if isinstance(pool, DaskPool) else 1


def _record(progress: Progress, block: Block, filled: Filled) -> None:
    progress.add(filled.samples)
    for note in filled.notes:
        log.warning("%s: %s", block, note)
    log.info("%s written, %d of %d", block, progress.blocks_done, progress.blocks)


def _record_failure(progress: Progress, outcome: Outcome[Block, Filled]) -> None:
    reason = _reason(outcome.error)
    progress.failed[str(outcome.item)] = reason
    log.info("%s failed at try %d: %s", outcome.item, outcome.attempts, reason)


def _tell_retry(progress: Progress, block: Block, error: Exception) -> None:
    progress.retries += 1
    log.info("%s is tried again: %s", block, _reason(error))


def _reason(error: Exception | None) -> str:
    return (str(error) or type(error).__name__).rstrip(".")


def _failure(
    path: Path, tried: int, failed: dict[Block, Exception]
) -> DataError | StoreError:
    named = [f"{block} ({_reason(e)})" for block, e in list(failed.items())[:_NAMED]]
    more = len(failed) - len(named)
    text = (
        f"{len(failed)} of {tried} blocks of {path} could not be written: "
        f"{', '.join(named)}{f' and {more} more, see {path}.log' if more else ''}; set "
        "that right and give the same command again, it goes on where it stopped."
    )
    data = any(isinstance(error, DataError) for error in failed.values())
    return DataError(text) if data else StoreError(text)


def transient_in(pool: Pool) -> Callable[[Exception], bool]:
    """Which errors may be gone at another try in ``pool``."""
    elsewhere = isinstance(pool, DaskPool)

    def transient(error: Exception) -> bool:
        # A worker that was thought dead may still hold a block; another device may do.
        return retried(error) or (
            elsewhere and isinstance(error, BusyError | DeviceError)
        )

    return transient


@contextmanager
def _workplace(
    source: Source, writer: StoreWriter, filling: Filling
) -> Iterator[tuple[Pool, Callable[[Block], Filled]]]:
    """Where blocks are filled, and the task that fills one."""
    if not filling.workers and filling.scheduler is None:
        threads = ThreadPool(_THREADS)
        wait = True
        try:
            yield threads, BlockFiller(source, writer, filling.before)
        except Stopped:
            wait = False  # blocks are whole or not there, whenever a process ends
            raise
        finally:
            threads.close(wait)
        return
    fingerprint = str(writer.attributes["fingerprint"])
    document = source.spec.model_dump_json()
    task = partial(fill_in_worker, document, writer.path, fingerprint, filling)
    if filling.scheduler is not None:
        with connected(filling.scheduler) as client:
            check_workers(client, writer.path, fingerprint)
            yield DaskPool(client, _THREADS), task
    else:
        with local_workers(filling.workers, _THREADS) as client:
            yield DaskPool(client, _THREADS), task


def check_workers(client: Any, path: Path, fingerprint: str) -> None:
    """Raise WorkersError unless all workers of a cluster see the store at ``path``."""
    try:
        answers = client.run(store_seen, path, on_error="return")
    except (OSError, ValueError, TimeoutError) as error:
        raise WorkersError(f"The Dask workers do not answer ({error}).") from None
    for address, answer in answers.items():
        if isinstance(answer, BaseException):
            raise WorkersError(
                f"The Dask worker {address} cannot run this program ({answer}); "
                "install the same kd-train there."
            )
        if answer != fingerprint:
            raise _not_seen(address, path)


def store_seen(path: Path) -> str | None:
    """Fingerprint of the store at ``path``, None where this process sees none."""
    try:
        return str(FeatureStore.open(path, allow_unsealed=True).fingerprint)
    except (StoreError, OSError):
        return None


def _not_seen(address: str, path: Path) -> WorkersError:
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
        with _warnings_of_this_thread() as notes:
            try:
                samples = self._source.fill_block(
                    self._writer, block.split, block.number, before
                )
            except (RuntimeError, MemoryError) as error:
                raise _translated(error) from error
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
    document: str, path: Path, fingerprint: str, filling: Filling, block: Block
) -> Filled:
    """Fill ``block`` in a worker process, which keeps datasets and teacher."""
    with _starting:
        fill = _worker_filler(document, path, fingerprint, filling)
    try:
        return fill(block)
    except DeviceError:
        if filling.scheduler is None:
            # The process cannot use its device any more; a fresh one can.
            os._exit(1)
        raise


@lru_cache(maxsize=1)
def _worker_filler(
    document: str, path: Path, fingerprint: str, filling: Filling
) -> BlockFiller:
    """Datasets and teacher, loaded once in each worker process."""
    from distributed import get_worker

    from pipeline.commands import chosen_device

    worker = get_worker()
    if store_seen(path) != fingerprint:
        raise _not_seen(worker.address, path)
    writer = StoreWriter(path)
    try:
        if filling.scheduler is None:
            device = device_of_one(filling.device or "cpu", int(worker.name))
            _set_threads(filling.threads or threads_of_one(filling.workers))
            _quiet()
        else:
            device = str(chosen_device(filling.device))
            if filling.threads is not None:
                _set_threads(filling.threads)
        spec = CacheSpec.model_validate_json(document)
        source = Source.open(spec, device, left_out(writer.attributes))
        return BlockFiller(source, writer, filling.before)
    except PipelineError as error:
        raise WorkersError(f"The Dask worker {worker.address}: {error}") from None


def left_out(attributes: dict[str, Any]) -> dict[str, list[str]]:
    """Ids of the samples of every split that its store was planned without."""
    bad = attributes.get("provenance", {}).get("bad_samples", {})
    return {
        split: [sample_id for sample_id, _ in pairs] for split, pairs in bad.items()
    }


def _set_threads(number: int) -> None:
    import torch

    torch.set_num_threads(number)


def _quiet() -> None:
    """The process that started this one says what is to be said, once."""
    logger = logging.getLogger("pipeline")
    logger.addHandler(logging.NullHandler())
    logger.propagate = False


@contextmanager
def _warnings_of_this_thread() -> Iterator[list[str]]:
    """Collect the warnings that are told while a block is filled."""
    notes: list[str] = []
    handler = _Collector(notes, threading.get_ident())
    logger = logging.getLogger("pipeline.devices")
    logger.addHandler(handler)
    try:
        yield notes
    finally:
        logger.removeHandler(handler)


class _Collector(logging.Handler):
    def __init__(self, notes: list[str], thread: int) -> None:
        super().__init__(logging.WARNING)
        self._notes = notes
        self._thread = thread

    def emit(self, record: logging.LogRecord) -> None:
        if record.thread == self._thread:
            self._notes.append(record.getMessage())
