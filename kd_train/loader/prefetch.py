"""Batches made ahead in background threads, in order."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch
from torch_geometric.data import Data

Item = TypeVar("Item")
Made = TypeVar("Made")


def prefetch(
    make: Callable[[Item], Made],
    batches: Iterable[Item],
    depth: int = 4,
    threads: int = 2,
) -> Generator[Made, None, None]:
    """Yield ``make`` of every batch in order, computed up to ``depth`` batches ahead.

    An error of ``make`` or of ``batches`` reaches the caller in its place, after all
    results before it. No thread is left when the iterator is exhausted or closed.
    """
    ahead: deque[Future[Made]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="prefetch") as pool:
        try:
            for future in _submit(pool, make, batches):
                ahead.append(future)
                if len(ahead) > depth:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


def _submit(
    pool: ThreadPoolExecutor, make: Callable[[Item], Made], batches: Iterable[Item]
) -> Iterator[Future[Made]]:
    """Yield a future for every batch, and one with the error if ``batches`` fails."""
    source = iter(batches)
    while True:
        try:
            item = next(source)
        except StopIteration:
            return
        except Exception as error:
            failed: Future[Made] = Future()
            failed.set_exception(error)
            yield failed
            return
        yield pool.submit(make, item)


def pin_batches(
    make: Callable[[Item], Data], device: torch.device
) -> Callable[[Item], Data]:
    """Return ``make``, for a GPU with batches in page-locked memory.

    Only a copy from page-locked memory can overlap with computation.
    """
    if device.type != "cuda":
        return make
    return lambda item: make(item).pin_memory()


def move_to_device(batch: Data, device: torch.device) -> Data:
    """Return ``batch`` on ``device``, without waiting for the copy to a GPU."""
    return batch.to(device, non_blocking=device.type == "cuda")
