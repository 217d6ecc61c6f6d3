"""Fills the blocks of a planned store: here, in worker processes, or on a cluster."""

import logging
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.build.inputs import BuildInputs
from pipeline.build.status import BuildStatus
from pipeline.build.worker import (
    Block,
    BlockResult,
    BlockWorker,
    FillOptions,
    read_fingerprint,
    run_block_in_worker,
    store_not_visible,
)
from pipeline.errors import BusyError, DataError, DeviceError, StoreError, WorkersError
from pipeline.logs import log_again
from pipeline.parallel.device_choice import choose_device
from pipeline.parallel.devices import free_cached_memory
from pipeline.parallel.local_cluster import local_workers
from pipeline.parallel.signals import Stopped
from pipeline.parallel.task_pool import (
    DaskPool,
    Pool,
    TaskResult,
    ThreadPool,
    connect,
    is_transient,
    run_tasks,
)
from pipeline.store.writer import StoreWriter

log = logging.getLogger("pipeline.build.fill")
BlockCallback = Callable[[str, int, int], None]
# At a Dask worker: one block is at hand when the other ends.
_QUEUED = 2
# So many failures end a build that succeeds less often than it fails.
_MANY_FAILURES = 3
_NAMED = 3


def fill_blocks(
    source: BuildInputs,
    writer: StoreWriter,
    filling: FillOptions,
    report: BlockCallback,
    progress: BuildStatus | None = None,
) -> None:
    """Fill every pending block, in this process or in workers.

    Raises
    ------
    DataError, StoreError
        Some blocks could not be written; all others were, or the first few all failed.
    WorkersError
        The workers are gone, or do not see what they need.
    """
    progress = progress or BuildStatus()
    wanted = filling.chosen({n: index.n_blocks for n, index in writer.splits.items()})
    chosen = [Block(name, number) for name, among in wanted.items() for number in among]
    pending = [
        Block(name, number)
        for name, among in wanted.items()
        for number in writer.pending_blocks(name, verify=True, among=among)
    ]
    log.info("%s: %d blocks to do", writer.path, len(pending))
    count_blocks(progress, writer, chosen, pending)
    if not pending:
        return
    failed: dict[Block, Exception] = {}
    with _open_pool(source, writer, filling) as (pool, task):
        for outcome in run_tasks(
            pool,
            task,
            pending,
            retries=filling.retries,
            transient=transient_errors(pool),
            awaited=awaited_errors(pool),
            on_retry=partial(_record_retry, progress),
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


def count_blocks(
    progress: BuildStatus,
    writer: StoreWriter,
    chosen: Sequence[Block] | None = None,
    pending: Sequence[Block] = (),
) -> None:
    """Tell ``progress`` the blocks and samples to be made; by default none of all."""
    if chosen is None:
        chosen = [
            Block(name, number)
            for name, index in writer.splits.items()
            for number in range(index.n_blocks)
        ]

    def samples(blocks: Sequence[Block]) -> int:
        return sum(
            len(writer.splits[b.split].block_positions(b.number)) for b in blocks
        )

    every = samples(chosen)
    done = len(chosen) - len(pending)
    progress.begin(len(chosen), every, done, every - samples(pending))


def _count_workers(progress: BuildStatus, pool: Pool) -> None:
    progress.workers = pool.workers if isinstance(pool, DaskPool) else 1


def _record(progress: BuildStatus, block: Block, filled: BlockResult) -> None:
    progress.add(filled.samples)
    log_again(filled.warnings)
    for note in filled.notes:
        progress.smaller_passes += 1
        if progress.smaller_passes == 1:
            log.warning(
                "%s: %s; its last bits may differ for that, and a lower "
                "teacher.batch_atoms or teacher.max_batch_gib spares new stores the "
                "loss",
                block,
                note,
            )
        else:
            log.info("%s: %s", block, note)
    log.info("%s written, %d of %d", block, progress.blocks_done, progress.blocks)


def _record_failure(
    progress: BuildStatus, outcome: TaskResult[Block, BlockResult]
) -> None:
    reason = _reason(outcome.error)
    progress.failed[str(outcome.item)] = reason
    log.info("%s failed at try %d: %s", outcome.item, outcome.attempts, reason)


def _record_retry(progress: BuildStatus, block: Block, error: Exception) -> None:
    progress.retries += 1
    log.info("retrying %s: %s", block, _reason(error))


def _reason(error: Exception | None) -> str:
    return (str(error) or type(error).__name__).rstrip(".")


def _failure(
    path: Path, tried: int, failed: dict[Block, Exception]
) -> DataError | StoreError:
    named = [f"{block} ({_reason(e)})" for block, e in list(failed.items())[:_NAMED]]
    more = len(failed) - len(named)
    text = (
        f"{len(failed)} of {tried} blocks of {path} could not be written: "
        f"{', '.join(named)}{f' and {more} more, see {path}.log' if more else ''}; "
        "correct the cause and repeat the command to continue."
    )
    data = any(isinstance(error, DataError) for error in failed.values())
    return DataError(text) if data else StoreError(text)


def transient_errors(pool: Pool) -> Callable[[Exception], bool]:
    """Which errors may be gone at another try in ``pool``."""
    elsewhere = isinstance(pool, DaskPool)

    def transient(error: Exception) -> bool:
        return is_transient(error) or (elsewhere and isinstance(error, DeviceError))

    return transient


def awaited_errors(pool: Pool) -> Callable[[Exception], bool]:
    """Which errors tell of somebody else at the same block, when tasks are ``pool``'s.

    A worker that was thought dead may still be at it, or one of an earlier build.
    """
    elsewhere = isinstance(pool, DaskPool)
    return lambda error: elsewhere and isinstance(error, BusyError)


@contextmanager
def _open_pool(
    source: BuildInputs, writer: StoreWriter, filling: FillOptions
) -> Iterator[tuple[Pool, Callable[[Block], BlockResult]]]:
    """Where blocks are filled, and the task that fills one."""
    if not filling.workers and filling.scheduler is None:
        threads = ThreadPool(_blocks_at_once(filling))
        wait = True
        try:
            yield threads, BlockWorker(source, writer, filling.before)
        except Stopped:
            wait = False  # blocks are whole or not there, whenever a process ends
            raise
        finally:
            threads.close(wait)
        return
    free_cached_memory()  # planning may have left a worker's GPU full
    fingerprint = str(writer.attributes["fingerprint"])
    document = source.spec.model_dump_json()
    # Workers of a cluster live on; what an earlier build opened may be of another plan.
    build = uuid.uuid4().hex
    task = partial(
        run_block_in_worker, document, writer.path, fingerprint, build, filling
    )
    if filling.scheduler is not None:
        with connect(filling.scheduler) as client:
            check_workers(client, writer.path, fingerprint)
            yield DaskPool(client, _QUEUED), task
    else:
        with local_workers(filling.workers, _blocks_at_once(filling)) as client:
            yield DaskPool(client, _QUEUED), task


def _blocks_at_once(filling: FillOptions) -> int:
    """Of a process: while a GPU computes one block, another is read or written.

    On a CPU both would take turns at the same cores and at Python's lock.
    """
    return 1 if choose_device(filling.device).type == "cpu" else 2


def check_workers(client: Any, path: Path, fingerprint: str) -> None:
    """Raise WorkersError unless all workers of a cluster see the store at ``path``."""
    try:
        answers = client.run(read_fingerprint, path, on_error="return")
    except (OSError, ValueError, TimeoutError) as error:
        raise WorkersError(f"The Dask workers do not answer ({error}).") from None
    for address, answer in answers.items():
        if isinstance(answer, BaseException):
            raise WorkersError(
                f"The Dask worker {address} cannot run this program ({answer}); "
                "install the same kd-train there."
            )
        if answer != fingerprint:
            raise store_not_visible(address, path)
