"""Assignment of GPUs to runs that share a machine."""

import fcntl
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

# Seconds between two looks for a free GPU.
_PAUSE = 2.0
# Values of CUDA_VISIBLE_DEVICES that hide all GPUs; Slurm writes the second.
_NO_GPU = ("-1", "NoDevFiles")


@contextmanager
def free_gpu(
    folder: Path | None = None,
    waiting: Callable[[Sequence[str]], object] | None = None,
) -> Iterator[tuple[str, int] | None]:
    """Reserve a free GPU; yield its name for CUDA and the descriptor of its lock.

    Waits while all GPUs are in use, after one call of ``waiting`` with their names.
    Yields None if there is no GPU. The GPU is free again when every process that holds
    the descriptor has ended, even by a kill. Locks are files in ``folder``, by default
    the system's folder for temporary files.
    """
    place = Path(tempfile.gettempdir()) if folder is None else folder
    names = visible_gpus()
    reported = waiting is None
    while names:
        for name in names:
            with (place / _lock_name(name)).open("a") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                yield name, lock.fileno()
                return
        if waiting is not None and not reported:
            waiting(names)
            reported = True
        time.sleep(_PAUSE)
    yield None


def visible_gpus() -> list[str]:
    """List the GPUs that this process may use, as CUDA numbers or names them."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        names = [name.strip() for name in listed.split(",") if name.strip()]
        # CUDA sees no device after an invalid one.
        ends = [names.index(end) for end in _NO_GPU if end in names]
        return names[: min(ends, default=len(names))]
    count = len(list(Path("/dev").glob("nvidia[0-9]*")))
    return [str(number) for number in range(count)]


def _lock_name(gpu: str) -> str:
    """Name the lock of a GPU by user and Slurm job, which numbers its GPUs from 0."""
    job = os.environ.get("SLURM_JOB_ID")
    owner = f"{os.getuid()}" if job is None else f"{os.getuid()}-job{job}"
    return f"kd-sweep-gpu-{gpu.replace('/', '-')}-{owner}.lock"
