"""What the prefetching threads do, and that none of them is left behind."""

import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from torch_geometric.data import Data

from kd_train.loader.prefetch import move_to_device, pin_batches, prefetch
from pipeline.errors import DataError

# A thread that is never ended would hold its test for long.
_HANG_S = 600
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    # Which ones, not how many: threads of other tests may end meanwhile.
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


def _wait_until(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _HANG_S
    while not reached() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert reached()


def same(item: int) -> int:
    return item


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("depth", [0, 1, 3, 50])
def test_yields_everything_in_order(threads: int, depth: int) -> None:
    assert list(prefetch(same, range(20), depth, threads)) == list(range(20))


def test_a_slow_batch_is_not_overtaken() -> None:
    """Batch 0 is held back until batch 1 is finished in the other thread."""
    finished = threading.Event()

    def make(item: int) -> int:
        if item == 0:
            assert finished.wait(_HANG_S)
        if item == 1:
            finished.set()
        return item

    assert list(prefetch(make, range(6), threads=2)) == list(range(6))


@pytest.mark.parametrize("threads", [1, 3])
def test_works_ahead_but_not_without_bound(threads: int) -> None:
    made: list[int] = []
    stream = prefetch(lambda item: made.append(item), range(50), 3, threads)
    next(stream)
    _wait_until(lambda: len(made) == 4)
    for taken in range(2, 6):
        next(stream)
        _wait_until(lambda bound=taken + 3: len(made) == bound)
    # Nothing more comes while nobody asks.
    time.sleep(0.05)
    assert len(made) == 5 + 3
    stream.close()


def test_no_batch_is_asked_for_before_it_may_be_made() -> None:
    """What decides the order is not run ahead of what is made."""
    asked: list[int] = []

    def batches() -> Iterator[int]:
        for item in range(50):
            asked.append(item)
            yield item

    stream = prefetch(same, batches(), depth=2)
    next(stream)
    assert len(asked) == 3
    stream.close()


@pytest.mark.parametrize("threads", [1, 2])
def test_errors_of_making_reach_the_caller_in_their_place(threads: int) -> None:
    def make(item: int) -> int:
        if item == 3:
            raise DataError("sample 3 is bad")
        return item

    stream = prefetch(make, range(9), threads=threads)
    assert [next(stream) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(DataError, match="sample 3 is bad"):
        next(stream)
    assert list(stream) == []


def test_errors_of_the_order_reach_the_caller_in_their_place() -> None:
    def batches() -> Iterator[int]:
        yield 1
        yield 2
        raise OSError("no more")

    stream = prefetch(same, batches())
    assert [next(stream), next(stream)] == [1, 2]
    with pytest.raises(OSError, match="no more"):
        next(stream)


def test_a_caller_that_leaves_early_stops_the_work() -> None:
    made: list[int] = []

    def make(item: int) -> int:
        made.append(item)
        return item

    stream = prefetch(make, range(1000), 2, 2)
    assert next(stream) == 0
    stream.close()
    assert len(made) <= 3


def test_on_a_cpu_batches_are_neither_locked_nor_copied() -> None:
    def make(item: int) -> Data:
        return Data(numbers=torch.full((2,), item))

    assert pin_batches(make, CPU) is make
    batch = make(3)
    before = batch.numbers.data_ptr()
    assert move_to_device(batch, CPU).numbers.data_ptr() == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_batches_come_from_locked_memory() -> None:
    def make(item: int) -> Data:
        return Data(numbers=torch.full((1000,), item), name="x")

    device = torch.device("cuda")
    batches = list(prefetch(pin_batches(make, device), range(30)))
    assert all(batch.numbers.is_pinned() for batch in batches)
    for item, batch in enumerate(batches):
        there = move_to_device(batch, device)
        assert there.numbers.is_cuda
        assert there.numbers.tolist() == [item] * 1000
