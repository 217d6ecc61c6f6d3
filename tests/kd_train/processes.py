"""Starts several processes of one run, by ``torchrun`` or by hand."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Nothing takes as long, on no machine; it ends what hangs.
TIMEOUT = 1800


def environment(**more: object) -> dict[str, str]:
    """Variables of a child that imports this copy of the code, on one thread."""
    known = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return os.environ | known | {name: str(value) for name, value in more.items()}


def torchrun(
    logs: Path, module: str, arguments: Sequence[object], size: int = 2
) -> "subprocess.Popen[bytes]":
    """``torchrun -m module arguments``; what processes say goes to ``logs``."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(size), "--redirects", "3"]
    command += ["--log-dir", str(logs), "-m", module, *map(str, arguments)]
    return subprocess.Popen(
        command,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def by_hand(
    module: str, arguments: Sequence[object], size: int = 2
) -> list["subprocess.Popen[str]"]:
    """The same as a cluster's launcher does it, with nothing that ends processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": size}
    return [
        subprocess.Popen(
            [sys.executable, "-m", module, *map(str, arguments)],
            env=environment(**place, RANK=rank, LOCAL_RANK=rank),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
