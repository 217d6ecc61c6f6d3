"""Where work runs, and what it means when a device fails or is full."""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

log = logging.getLogger("pipeline.parallel.devices")
_FULL = ("can't allocate memory", "ALLOC_FAILED", "out of memory")
_BROKEN = ("CUDA error", "CUBLAS_STATUS", "CUDNN_STATUS", "cuDNN error", "HIP error")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory of the device or of this machine was too small."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(w in str(error) for w in _FULL)


def is_device_failure(error: BaseException) -> bool:
    """Whether the device failed so that this process can use it no more."""
    return isinstance(error, RuntimeError) and any(w in str(error) for w in _BROKEN)


def run_halving_on_oom(
    run: Callable[[Sequence[Item]], Result], items: Sequence[Item]
) -> Iterator[Result]:
    """``run(items)``; of halves where memory is too small, down to single items.

    Raises
    ------
    Exception
        The error of ``run`` for a single item, or any other error of it.
    """
    try:
        result = run(items)
    except Exception as error:
        if len(items) == 1 or not is_out_of_memory(error):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    else:
        yield result
        return
    # Out of the handler: nothing holds the tensors of the failed pass any more.
    free_cached_memory()
    middle = len(items) // 2
    log.info(
        "a pass over %d samples does not fit into memory (%s) and is done in two",
        len(items),
        reason,
    )
    yield from run_halving_on_oom(run, items[:middle])
    yield from run_halving_on_oom(run, items[middle:])


def free_cached_memory() -> None:
    """Give back what this process keeps of a GPU without using it."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def threads_per_worker(workers: int) -> int:
    """CPU threads that each of several worker processes should take."""
    cores = len(os.sched_getaffinity(0))
    return max(1, cores // max(1, workers))


def device_for_worker(device: str, number: int) -> str:
    """Device of worker ``number``: one each where ``cuda`` leaves the choice."""
    if device != "cuda":
        return device
    count = torch.cuda.device_count()
    return f"cuda:{number % count}" if count > 1 else device
