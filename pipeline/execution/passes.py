"""One function over many items: in this process, or in those of a Dask cluster.

For work that is data-parallel on CPUs. Processes, since decoding holds Python's lock.
"""

import logging
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
# As ``map``: results come in the order of the items, each when it is asked for.
Run = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]

# Items that each process has in hand or waiting, so that it never waits itself.
_AHEAD = 3


@contextmanager
def processes(workers: int) -> Iterator[Run]:
    """``map`` for so many processes; with 0 it is ``map`` itself, in this one.

    The cluster starts with the first call and ends with the context. What a
    ``functools.partial`` holds is sent to each process once.
    """
    if workers == 0:
        yield map
        return
    with ExitStack() as stack:
        client: Any = None

        def run(
            function: Callable[[Item], Result], items: Iterable[Item]
        ) -> Iterator[Result]:
            nonlocal client
            if client is None:
                client = _started(stack, workers)
            results = _in_order(client, workers, function, items)
            # Where nobody asks for the rest, it is cancelled while the cluster lives.
            stack.callback(results.close)
            return results

        yield run


def _started(stack: ExitStack, workers: int) -> Any:
    from distributed import Client, LocalCluster

    cluster = LocalCluster(
        n_workers=workers,
        threads_per_worker=1,
        processes=True,
        # Mapped files count as memory of the process, which must not end it.
        memory_limit=0,
        dashboard_address="127.0.0.1:0",  # any free port
        silence_logs=logging.CRITICAL,
    )
    return stack.enter_context(Client(stack.enter_context(cluster)))


def _in_order(
    client: Any,
    workers: int,
    function: Callable[[Item], Result],
    items: Iterable[Item],
) -> Generator[Result, None, None]:
    """Results in the order of ``items``, a bounded number of them made ahead."""
    sent = client.scatter(function, broadcast=True, hash=False)
    ahead: deque[Any] = deque()
    try:
        for item in items:
            ahead.append(client.submit(_call, sent, item, pure=False))
            if len(ahead) == _AHEAD * workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        client.cancel(list(ahead))


def _call(function: Callable[[Item], Result], item: Item) -> Result:
    return function(item)
