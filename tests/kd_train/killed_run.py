"""``python -m kd_train``, every process of which is killed after its first steps.

``python -m tests.kd_train.killed_run STEPS ARGUMENTS``
"""

import os
import signal
import sys

from torch import Tensor
from torch_geometric.data import Data

from kd_train.cli.train import main
from kd_train.trainer.trainer import Trainer


def die_after(steps: int) -> None:
    """Let runs end this process, as ``kill -9`` does, when they have so many steps."""
    step = Trainer.step

    def stepping(run: Trainer, *batches: Data) -> dict[str, Tensor]:
        if run.progress.step == steps:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(run, *batches)

    Trainer.step = stepping  # type: ignore[method-assign]


if __name__ == "__main__":
    die_after(int(sys.argv.pop(1)))
    main()
