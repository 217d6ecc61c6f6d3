"""Runs many independent tasks, few at a time, each to one recorded end.

Knows nothing of what tasks do. Tasks must bear being run again: a worker may die after
it did its work and before it could tell.
"""

import heapq
import itertools
import queue
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from pipeline.errors import PipelineError, WorkersError
from pipeline.files.atomic import is_full
from pipeline.parallel.local_cluster import silence

Item = TypeVar("Item")
Result = TypeVar("Result")

RETRIES = 3
PER_WORKER = 2
_TICK_S = 0.5
_GATHER_S = 10.0
_PATIENCE_S = 600.0
_LONGEST_PAUSE_S = 30.0
_LONGEST_WAIT_S = 3600.0


class TaskLost(Exception):
    """The worker that had a task died with it."""


class StillRunning(Exception):
    """A task that seemed to have ended is being run again."""


@dataclass
class _Try(Generic[Item]):
    """A try of an item, under way or due; ``tries`` that count were made before it.

    ``since`` is when somebody else was first found at it; it runs ``alone`` where
    earlier workers died, with it or with what was at the same worker.
    """

    item: Item
    tries: int = 0
    waits: int = 0
    since: float | None = None
    alone: bool = False

    def waited(self) -> float:
        """Seconds since somebody else was first found at the item."""
        if self.since is None:
            self.since = time.monotonic()
        return time.monotonic() - self.since


@dataclass(frozen=True)
class TaskResult(Generic[Item, Result]):
    """How a task ended: with a result, or with the last error of all attempts."""

    item: Item
    result: Result | None
    error: Exception | None
    attempts: int


class Pool(Protocol):
    """Where tasks run."""

    def submit(self, task: Callable[[Any], Any], item: Any) -> Any:
        """Start ``task(item)``; a future with ``add_done_callback``."""

    def collect(self, future: Any) -> Any:
        """What an ended future has, or its exception, TaskLost or StillRunning."""

    def capacity(self) -> int:
        """How many tasks should be in flight now."""

    def check(self) -> None:
        """Raise WorkersError when nothing that is in flight can ever end."""

    def abandon(self, futures: Iterable[Any]) -> None:
        """Forget futures that nobody waits for any more."""


def is_transient(error: Exception) -> bool:
    """Whether an error may be gone at the next try: a lost worker, a failing system.

    A full disk stays full.
    """
    if isinstance(error, OSError):
        return not is_full(error)
    return isinstance(error, TaskLost)


def run_tasks(
    pool: Pool,
    task: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    retries: int = RETRIES,
    transient: Callable[[Exception], bool] = is_transient,
    awaited: Callable[[Exception], bool] = lambda error: False,
    delay: float = 0.5,
    longest_wait: float = _LONGEST_WAIT_S,
    on_retry: Callable[[Item, Exception], None] = lambda item, error: None,
    on_tick: Callable[[], None] = lambda: None,
) -> Iterator[TaskResult[Item, Result]]:
    """Run ``task`` on every item; exactly one outcome for each, in order of ending.

    Never more are in flight than the pool asks for. A ``transient`` error is tried
    again up to ``retries`` times, after ``delay`` seconds, then four times as long. An
    item whose workers died has a last try when all others have ended and nothing else
    runs, for it may only have been at the same workers as another that kills them. An
    ``awaited`` error says that somebody else is at the item, and is no try of it; it is
    asked for again for ``longest_wait`` seconds. An outcome with an error is one that
    stayed, or one of the input (PipelineError). The main thread is never blocked for
    longer than a moment, so that signals come through.

    Raises
    ------
    WorkersError
        The workers are gone for good.
    Exception
        Any other error of a task, at once: it is one of the program or of the disk.
    """
    run = _TaskRun(pool, task, items, on_tick)
    try:
        while (ended := run.wait_for_next()) is not None:
            one, future = ended
            item = one.item
            try:
                result = pool.collect(future)
            except StillRunning:
                run.watch(one, future)
            except WorkersError:
                raise
            except Exception as error:
                if awaited(error) and one.waited() < longest_wait:
                    on_retry(item, error)
                    run.requeue(one, delay)
                elif transient(error) and one.tries < retries:
                    on_retry(item, error)
                    run.retry(one, delay)
                elif isinstance(error, TaskLost) and not one.alone:
                    on_retry(item, error)
                    run.retry_last_alone(one)
                elif transient(error) or isinstance(error, PipelineError):
                    yield TaskResult(item, None, error, one.tries + 1)
                else:
                    raise
            else:
                yield TaskResult(item, result, None, one.tries + 1)
    finally:
        run.end()


class _TaskRun(Generic[Item, Result]):
    """Tasks waiting, tasks in flight, and those that wait for another try."""

    def __init__(
        self,
        pool: Pool,
        task: Callable[[Item], Result],
        items: Iterable[Item],
        on_tick: Callable[[], None],
    ) -> None:
        self._pool = pool
        self._task = task
        self._fresh = deque(items)
        self._on_tick = on_tick
        self._numbers = itertools.count()
        self._flying: dict[int, tuple[_Try[Item], Any]] = {}
        self._later: list[tuple[float, int, _Try[Item]]] = []
        self._last: deque[_Try[Item]] = deque()
        self._ended: queue.SimpleQueue[int] = queue.SimpleQueue()

    def wait_for_next(self) -> tuple[_Try[Item], Any] | None:
        """The next try that ends and its future; None when all have."""
        while True:
            self._fill()
            if not (self._flying or self._later or self._fresh or self._last):
                return None
            try:
                return self._flying.pop(self._ended.get(timeout=self._pause()))
            except queue.Empty:
                self._on_tick()
                self._pool.check()

    def watch(self, one: _Try[Item], future: Any) -> None:
        """Wait for the end of ``future``."""
        number = next(self._numbers)
        self._flying[number] = one, future
        future.add_done_callback(lambda _: self._ended.put(number))

    def retry(self, one: _Try[Item], delay: float) -> None:
        """Try once more after ``delay`` seconds, or four times as long as before."""
        self._after(one, delay * 4**one.tries)
        one.tries += 1

    def requeue(self, one: _Try[Item], delay: float) -> None:
        """Ask once more, after pauses that grow to half a minute."""
        self._after(one, min(delay * 2**one.waits, _LONGEST_PAUSE_S))
        one.waits += 1

    def retry_last_alone(self, one: _Try[Item]) -> None:
        """Try once more when everything else has ended, alone."""
        one.tries += 1
        one.alone = True
        self._last.append(one)

    def end(self) -> None:
        """Abandon whatever is in flight."""
        self._pool.abandon([future for _, future in self._flying.values()])

    def _after(self, one: _Try[Item], pause: float) -> None:
        due = time.monotonic() + pause
        heapq.heappush(self._later, (due, next(self._numbers), one))

    def _pause(self) -> float:
        if not self._later:
            return _TICK_S
        return min(_TICK_S, max(0.01, self._later[0][0] - time.monotonic()))

    def _fill(self) -> None:
        room = max(0, self._pool.capacity() - len(self._flying))
        for one in itertools.islice(self._next_tries(), room):
            self.watch(one, self._pool.submit(self._task, one.item))
        if room and self._last and not (self._flying or self._later or self._fresh):
            one = self._last.popleft()
            self.watch(one, self._pool.submit(self._task, one.item))

    def _next_tries(self) -> Iterator[_Try[Item]]:
        """Tries that are due, then items that had none."""
        while self._later and self._later[0][0] <= time.monotonic():
            yield heapq.heappop(self._later)[-1]
        while self._fresh:
            yield _Try(self._fresh.popleft())


class ThreadPool:
    """Threads of this process."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._executor = ThreadPoolExecutor(threads)

    def submit(self, task: Callable[[Any], Any], item: Any) -> Future[Any]:
        """Start ``task(item)``."""
        return self._executor.submit(task, item)

    def collect(self, future: Future[Any]) -> Any:
        """Return the result of an ended future, or raise its exception."""
        return future.result()

    def capacity(self) -> int:
        """One task for every thread."""
        return self._threads

    def check(self) -> None:
        """Threads do not get lost."""

    def abandon(self, futures: Iterable[Future[Any]]) -> None:
        """Cancel what has not begun."""
        for future in futures:
            future.cancel()

    def close(self, wait: bool = True) -> None:
        """End the threads; what they are at is waited for, or left to run on."""
        self._executor.shutdown(wait=wait, cancel_futures=True)


class DaskPool:
    """Workers behind a Dask scheduler, whoever started them.

    Results stay on the workers but for what tasks return, which should be small.
    """

    def __init__(
        self, client: Any, per_worker: int = PER_WORKER, patience: float = _PATIENCE_S
    ) -> None:
        self._client = client
        self._per_worker = per_worker
        self._patience = patience
        self._name = uuid.uuid4().hex[:12]
        self._numbers = itertools.count()
        self._workers = 0
        self._asked = -_TICK_S
        self._seen = time.monotonic()

    @property
    def workers(self) -> int:
        """Workers that the scheduler knows, asked for at most twice a second."""
        now = time.monotonic()
        if now - self._asked >= _TICK_S:
            self._asked = now
            self._workers = self._count()
            if self._workers:
                self._seen = now
        return self._workers

    def submit(self, task: Callable[[Any], Any], item: Any) -> Any:
        """Start ``task(item)`` on some worker."""
        # Dask forgets no failed key as long as somebody has its future.
        key = f"{self._name}-{next(self._numbers)}"
        return self._client.submit(task, item, key=key, pure=False)

    def collect(self, future: Any) -> Any:
        """Return the result of an ended future, or raise its exception."""
        from distributed import KilledWorker

        try:
            return future.result(timeout=_GATHER_S)
        except KilledWorker as error:
            where = getattr(error.last_worker, "address", "a worker")
            raise TaskLost(f"{where} died with the task") from None
        except CancelledError:
            raise self._gone() from None
        except TimeoutError:
            if future.status == "error":
                raise  # the task's own
            if future.status == "finished":
                # A worker that is killed may be the only one that has the result.
                raise TaskLost("its result cannot be fetched") from None
            raise StillRunning from None

    def capacity(self) -> int:
        """A fixed number for every worker that is alive."""
        return self._per_worker * self.workers

    def check(self) -> None:
        """Raise WorkersError where the scheduler or all workers are gone."""
        if self._client.status not in ("running", "connecting"):
            raise self._gone()
        if not self.workers and time.monotonic() - self._seen > self._patience:
            raise WorkersError(
                f"No Dask worker has been connected for {self._patience:.0f} "
                "seconds; start workers and repeat the command to continue."
            )

    def abandon(self, futures: Iterable[Any]) -> None:
        """Cancel what has not begun; what has ends on its worker unheard."""
        futures = list(futures)
        if futures and self._client.status == "running":
            with suppress(Exception):  # the scheduler may go away meanwhile
                self._client.cancel(futures, force=True)

    def _count(self) -> int:
        try:
            return len(self._client.nthreads())
        except (OSError, RuntimeError, ValueError, CancelledError, TimeoutError):
            # Its connection is being lost, of which futures and check() tell.
            return self._workers

    def _gone(self) -> WorkersError:
        address = getattr(self._client.scheduler, "address", "its address")
        return WorkersError(
            f"The Dask scheduler at {address} is gone; restart the scheduler and "
            "repeat the command to continue."
        )


@contextmanager
def connect(address: str, timeout: float = 10.0) -> Iterator[Any]:
    """Client of the Dask scheduler at ``address``, tried for ``timeout`` seconds.

    Raises
    ------
    WorkersError
        None answers there.
    """
    from distributed import Client

    silence()
    try:
        client = Client(address, timeout=timeout, set_as_default=False)
    except (OSError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WorkersError(
            f"No Dask scheduler answers at {address} ({reason}); start one with `dask "
            "scheduler` or correct --scheduler."
        ) from None
    try:
        yield client
    finally:
        with suppress(OSError, RuntimeError, TimeoutError):
            client.close(timeout=2)
