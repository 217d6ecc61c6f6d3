"""Which GPU of the machine a run takes, where several run beside each other."""

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def free_gpu(folder: Path | None = None) -> Iterator[tuple[str, int] | None]:
    """A GPU that no other run has: its name for CUDA, and the descriptor of its lock.

    None where all are taken or there are none; the run then uses CUDA's first one. The
    GPU is free again when every process that holds the descriptor has ended, also by
    being killed. Locks are files in ``folder``, by default the system's for such.
    """
    place = Path(tempfile.gettempdir()) if folder is None else folder
    for name in _visible():
        path = place / f"kd-sweep-gpu-{name.replace('/', '-')}-{os.getuid()}.lock"
        with path.open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            yield name, lock.fileno()
            return
    yield None


def _visible() -> list[str]:
    """GPUs that this process may use, as CUDA numbers or names them."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        return [name.strip() for name in listed.split(",") if name.strip()]
    count = len(list(Path("/dev").glob("nvidia[0-9]*")))
    return [str(number) for number in range(count)]
