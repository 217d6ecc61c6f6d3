"""The processes of one run, as ``torchrun`` or ``srun`` started them.

Everything that a run does with other processes goes through :class:`World`. One process
alone never touches ``torch.distributed``.
"""

import atexit
import os
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from pipeline.errors import PipelineError, SpecError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import Store

Item = TypeVar("Item")

# Time to wait for a process that is busy or gone.
_TIMEOUT = timedelta(minutes=10)
# A broken connection may be noticed this long before the error that broke it.
_GRACE_SECONDS = 5.0
_LOOK_SECONDS = 0.2
_FAILED_KEY = "kd_train/failed"
_STATUS = 2


@dataclass(frozen=True)
class World:
    """One of ``size`` processes of a run, all of which call a method together."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and prints messages."""
        return self.rank == 0

    def all_sum(self, values: "Tensor") -> "Tensor":
        """Return the sum of ``values`` over processes, bit for bit the same on each."""
        if self.size == 1:
            return values
        import torch.distributed as dist

        values = values.clone()
        dist.all_reduce(values)
        return values

    def all_gather(self, rows: "Tensor") -> "list[Tensor]":
        """Return ``rows`` (n, ...) of every process in order of rank.

        The length n may differ between processes.
        """
        if self.size == 1:
            return [rows]
        import torch
        import torch.distributed as dist

        counts = torch.zeros(self.size, dtype=torch.int64)
        counts[self.rank] = len(rows)
        counts = self.all_sum(counts)
        if not counts.any():
            return [rows] * self.size
        # As bytes, because not every backend knows every dtype.
        padded = rows.new_zeros((int(counts.max()), *rows.shape[1:]))
        padded[: len(rows)] = rows
        content = padded.contiguous().view(torch.uint8).reshape(-1)
        received = [torch.empty_like(content) for _ in range(self.size)]
        dist.all_gather(received, content)
        return [
            part.view(rows.dtype).reshape(padded.shape)[:count]
            for part, count in zip(received, counts.tolist(), strict=True)
        ]

    def barrier(self) -> None:
        """Wait until all processes have called this method."""
        # A barrier of the library's own would have to choose a device.
        self.gather_text("here")

    def gather_text(self, text: str) -> list[str]:
        """Return ``text`` of every process, in order of rank."""
        if self.size == 1:
            return [text]
        import torch

        content = torch.tensor(list(text.encode()), dtype=torch.uint8)
        return [bytes(part.tolist()).decode() for part in self.all_gather(content)]

    def require_equal(self, text: str, what: str) -> None:
        """Refuse to continue unless ``text`` is the same in all processes.

        Raises
        ------
        PipelineError
            It is not; names ``what`` differs.
        """
        found = self.gather_text(text)
        for rank, other in enumerate(found):
            if other != found[0]:
                raise PipelineError(
                    f"{what} differ between processes 0 and {rank}; give all "
                    "processes the same files and one version of the code."
                )


ALONE = World()


def interleave(parts: Sequence[Sequence[Item]]) -> list[Item]:
    """Undo ``items[rank::size]``: the first item of every part, then the second, ..."""
    longest = max(len(part) for part in parts)
    return [part[n] for n in range(longest) for part in parts if n < len(part)]


def read_world(environment: Mapping[str, str]) -> World:
    """Read the process that a launcher's variables describe.

    ``WORLD_SIZE``, ``RANK`` and ``LOCAL_RANK``, as ``torchrun`` sets them; without the
    first there is one process.

    Raises
    ------
    SpecError
        A variable is missing or not a number in range.
    """
    size = _number(environment, "WORLD_SIZE", "1")
    if size == 1:
        return ALONE
    rank = _number(environment, "RANK")
    local_rank = _number(environment, "LOCAL_RANK")
    if size < 1 or not 0 <= rank < size or local_rank < 0:
        raise SpecError(
            f"WORLD_SIZE={size}, RANK={rank} and LOCAL_RANK={local_rank} are "
            "inconsistent; start kd-train with torchrun."
        )
    return World(rank, size, local_rank)


def _number(
    environment: Mapping[str, str], name: str, default: str | None = None
) -> int:
    value = environment.get(name, default)
    try:
        return int(value or "")
    except ValueError:
        found = "not set" if value is None else f"{value!r}"
        raise SpecError(
            f"{name} is {found}, but must be a number; start kd-train with torchrun "
            "or set WORLD_SIZE, RANK, LOCAL_RANK, MASTER_ADDR and MASTER_PORT."
        ) from None


def process_device(world: World, name: str | None) -> str | None:
    """Choose the device of a process of ``world``; the user named ``name``.

    Every process has the GPU of its ``LOCAL_RANK``; None if the choice is free.

    Raises
    ------
    SpecError
        All processes would share one GPU, or there are more of them than GPUs.
    """
    if world.size == 1 or not _on_gpus(name):
        return name
    import torch

    if name not in (None, "cuda"):
        raise SpecError(
            f"--device {name!r} is one GPU for {world.size} processes; omit it, then "
            "every process uses the GPU of its LOCAL_RANK."
        )
    if world.local_rank >= torch.cuda.device_count():
        raise SpecError(
            f"Process {world.rank} has LOCAL_RANK={world.local_rank}, but its "
            f"machine has {torch.cuda.device_count()} GPUs; start fewer processes "
            "per machine."
        )
    torch.cuda.set_device(world.local_rank)
    return f"cuda:{world.local_rank}"


def _on_gpus(name: str | None) -> bool:
    import torch

    return torch.cuda.is_available() and (name or "cuda").startswith("cuda")


@contextmanager
def process_group(world: World, device: str | None) -> Iterator[None]:
    """Connect the processes in the context, in which the first error ends all.

    The error of the first failing process is raised. The other processes, which may
    wait for it, end with the same exit status without a message.

    Raises
    ------
    PipelineError
        The other processes could not be reached.
    """
    if world.size == 1:
        yield
        return
    watch = _Watch(world, _meet(world, device))
    try:
        yield
    except Exception as error:
        watch.stop()
        expected = isinstance(error, (PipelineError, OSError))
        if not watch.is_ours(expected=expected):
            _leave(_STATUS)
        atexit.register(_leave, _STATUS if expected else 1)
        raise
    # Before the first process, which may hold the keys, can end.
    watch.stop()
    world.barrier()
    atexit.register(_leave, 0)


def _meet(world: World, device: str | None) -> "Store":
    """Connect the processes and return the keys and values that they share."""
    # If the first process has failed, the loss of its keys needs no message.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    import torch.distributed as dist

    # Gradients of narrow layers may lie in memory in another, equal way.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    # Counts of batches and the like stay on the CPU, gradients on the GPU.
    backend = "cpu:gloo,cuda:nccl" if _on_gpus(device) else "gloo"
    try:
        store, rank, size = next(
            dist.rendezvous("env://", world.rank, world.size, timeout=_TIMEOUT)
        )
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=size, timeout=_TIMEOUT
        )
    except (RuntimeError, ValueError) as error:
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise PipelineError(
            f"Process {world.rank} of {world.size} did not reach the other processes "
            f"({reason}); check MASTER_ADDR and MASTER_PORT."
        ) from error
    return store


class _Watch:
    """Watches for the error of another process, in a thread.

    A process that waits on a GPU does not notice otherwise that another has ended.
    """

    def __init__(self, world: World, store: "Store") -> None:
        self._rank = str(world.rank)
        self._store = store
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._done.set()
        self._thread.join()

    def is_ours(self, *, expected: bool) -> bool:
        """Return whether this process is the first to fail, and so must report.

        An error that is not ``expected`` may be a connection that another one closed,
        whose claim is then waited for.
        """
        deadline = time.monotonic() + (0.0 if expected else _GRACE_SECONDS)
        while self._owner() is None and time.monotonic() < deadline:
            time.sleep(_LOOK_SECONDS)
        try:
            owner = self._store.compare_set(_FAILED_KEY, "", self._rank)
        except RuntimeError:
            return expected
        return owner.decode() == self._rank

    def _owner(self) -> str | None:
        """Return the process that failed, if any; "" if the keys are gone with it."""
        try:
            if not self._store.check([_FAILED_KEY]):
                return None
            return self._store.get(_FAILED_KEY).decode()
        except RuntimeError:
            return ""

    def _look(self) -> None:
        while not self._done.wait(_LOOK_SECONDS):
            if self._owner() is not None:
                # Time for the main thread to end by itself, if it can.
                if not self._done.wait(_GRACE_SECONDS):
                    _leave(_STATUS)
                return


def _leave(status: int) -> None:
    """End this process at once.

    A normal exit may never end: the thread that frees the last connection holds
    Python's lock and waits for a thread of the connection. That thread needs the lock
    to free a tensor (seen with gloo in torch 2.13).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
