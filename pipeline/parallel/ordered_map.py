"""One function over many items: in this process, or in those of a Dask cluster.

For work that is data-parallel on CPUs. Processes, since decoding holds Python's lock.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import CancelledError
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from pipeline.errors import WorkersError
from pipeline.logs import LoggedWarning, collect_warnings, log_again
from pipeline.parallel.local_cluster import local_workers

Item = TypeVar("Item")
Result = TypeVar("Result")
# As ``map``: results come in the order of the items, each when it is asked for.
OrderedMap = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]
# Told how many items of a pass are done, of how many; at first none.
Count = Callable[[int, int], None]

# A process takes seconds to start, and reads a block in less.
_FEW = 64
# Items that each process has in hand or waiting, so that it never waits itself.
_AHEAD = 3
# So often an item is sent again because its process died: a kill may hit anybody once.
_LOSSES = 3
_PATIENCE_S = 600.0


@contextmanager
def processes(workers: int) -> Iterator[OrderedMap]:
    """``map`` for so many processes; with 0 it is ``map`` itself, in this one.

    The cluster starts with the first item and ends with the context. What a
    ``functools.partial`` holds is sent to each process once. A process that dies is
    started again, and what it had in hand is done again.

    Raises
    ------
    WorkersError
        From the results: processes died again and again at the same item, or none
        can be started.
    """
    if workers == 0:
        yield map
        return
    with ExitStack() as stack:
        client: Any = None

        def connect() -> Any:
            nonlocal client
            if client is None:
                client = stack.enter_context(local_workers(workers, threads=1))
            return client

        def run(
            function: Callable[[Item], Result], items: Iterable[Item]
        ) -> Iterator[Result]:
            results = _in_order(connect, workers, function, items)
            # Nothing starts a cluster again when this one has ended.
            stack.callback(results.close)
            return results

        yield run


class Tally:
    """Tells ``count`` how far a pass over ``total`` items is."""

    def __init__(self, count: Count, total: int) -> None:
        self._count = count
        self._total = total
        self._done = 0
        count(0, total)

    def add(self, items: int = 1) -> None:
        """Count items that are done."""
        self._done += items
        self._count(self._done, self._total)


def ignore_items(items: int) -> None:
    """For whoever does not ask how many more items are done."""


def useful_workers(workers: int, items: int) -> int:
    """``workers``, or none for so few items that to start them would take longer."""
    return workers if items >= _FEW else 0


def ignore_counts(done: int, total: int) -> None:
    """A ``Count`` for whoever does not ask."""


def _in_order(
    connect: Callable[[], Any],
    workers: int,
    function: Callable[[Item], Result],
    items: Iterable[Item],
) -> Generator[Result, None, None]:
    """Results in the order of ``items``, a bounded number of them made ahead."""
    ahead: _OrderedQueue[Item, Result] | None = None
    try:
        for item in items:
            ahead = ahead or _OrderedQueue(connect(), function)
            ahead.add(item)
            if ahead.items == _AHEAD * workers:
                yield ahead.next()
        while ahead and ahead.items:
            yield ahead.next()
    finally:
        if ahead:
            ahead.cancel()


@dataclass
class _Sent(Generic[Item]):
    """An item under way, and how often a process died that had it."""

    item: Item
    future: Any
    losses: int = 0


class _OrderedQueue(Generic[Item, Result]):
    """Items that processes have, in order; those of dead processes are sent again."""

    def __init__(self, client: Any, function: Callable[[Item], Result]) -> None:
        self._client = client
        self._function = function
        self._sent: deque[_Sent[Item]] = deque()
        self._there = self._send_function()

    @property
    def items(self) -> int:
        """Items whose results nobody has had."""
        return len(self._sent)

    def add(self, item: Item) -> None:
        """Send one more item."""
        self._sent.append(_Sent(item, self._submit(item)))

    def next(self) -> Result:
        """Result of the first item, or the error of the function."""
        while True:
            try:
                result: Result
                result, warnings = self._sent[0].future.result()
            except Exception as error:
                if not _is_loss(error):
                    raise
                self._send_again()
            else:
                self._sent.popleft()
                log_again(warnings)
                return result

    def cancel(self) -> None:
        """Cancel what nobody asked for."""
        if self._sent and self._client.status == "running":
            with suppress(OSError, TimeoutError, CancelledError):
                self._client.cancel([sent.future for sent in self._sent])

    def _submit(self, item: Item) -> Any:
        return self._client.submit(_call, self._there, item, pure=False)

    def _send_again(self) -> None:
        """Send what was lost, and the function, which may be lost with it."""
        if self._sent[0].losses == _LOSSES:
            raise _repeated_deaths()
        lost = [sent for sent in self._sent if _is_lost(sent.future)]
        self._there = self._send_function()
        for sent in lost:
            sent.losses += 1
            sent.future = self._submit(sent.item)

    def _send_function(self) -> Any:
        for _ in range(_LOSSES + 1):
            try:
                self._client.wait_for_workers(1, timeout=_PATIENCE_S)
            except TimeoutError:
                raise WorkersError(
                    f"No worker process could be started in {_PATIENCE_S:.0f} seconds; "
                    "give the same command again with fewer --workers."
                ) from None
            with suppress(OSError):  # the process that it was sent to died
                return self._client.scatter(self._function, broadcast=True, hash=False)
        raise _repeated_deaths()


def _call(
    function: Callable[[Item], Result], item: Item
) -> tuple[Result, list[LoggedWarning]]:
    """Result of ``function`` in a worker, and what it warned of."""
    with collect_warnings() as warnings:
        return function(item), warnings


def _is_loss(error: object) -> bool:
    """Whether an item, or the function that it needs, died with a process."""
    from distributed import KilledWorker

    return isinstance(error, KilledWorker | CancelledError)


def _is_lost(future: Any) -> bool:
    if future.status == "error":
        return _is_loss(future.exception())
    return bool(future.cancelled())


def _repeated_deaths() -> WorkersError:
    return WorkersError(
        f"Worker processes died {_LOSSES + 1} times at the same piece of work, most "
        "likely killed since memory was full; give the same command again with fewer "
        "--workers"
    )
