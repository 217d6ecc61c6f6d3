"""Run by ``torchrun``: takes one step of several runs and saves what it led to.

``python -m tests.kd_train.gradients_of_ranks STORE FOLDER``
"""

import os
import sys
from pathlib import Path

import numpy as np
import torch

from kd_train.config.train_config import TrainConfig
from kd_train.distributed import process_group, read_world
from kd_train.trainer.trainer import Trainer
from pipeline.store.reader import FeatureStore
from tests.stores import train_config

# No choice that depends on the batch, and a step that rounding does not show at.
EVERY_STRUCTURE = {"fraction": 1.0, "columns": 1, "step": 0.1}
CONFIGS: dict[str, TrainConfig] = {
    student: train_config(
        student,
        strategy=strategy,
        optimizer={"clip_norm": clip_norm},
        distill=dict.fromkeys(strategy.split("+"), 1.0),
        jacobian=EVERY_STRUCTURE,
    )
    for student, strategy, clip_norm in (
        ("painn-small-demo", "n2n+e2n+e2e+v2v+vanilla1+vanilla2+jacobian", None),
        ("schnet-demo", "n2n+e2n+vanilla1+vanilla2+jacobian", 0.01),
    )
}
# Batches of a step, by rank; sizes differ, so that means of means would be wrong.
PARTS = (
    (np.arange(0, 1), np.arange(1, 9)),
    (np.arange(9, 16), np.arange(16, 18)),
)


def main() -> None:
    """One step of every configuration; a file of values and gradients for each."""
    torch.set_num_threads(1)
    store, folder = FeatureStore.open(sys.argv[1]), Path(sys.argv[2])
    world = read_world(os.environ)
    with process_group(world, "cpu"):
        for name, config in CONFIGS.items():
            run = Trainer(config, store, folder, torch.device("cpu"), world)
            samples = run.train_samples
            parts = [run.on_device(samples.batch(p)) for p in PARTS[world.rank]]
            state = {
                "values": run.step(*parts),
                "gradients": {
                    key: p.grad
                    for key, p in run.modules.named_parameters()
                    if p.requires_grad
                },
                "average": run.average.state_dict(),
            }
            torch.save(state, folder / f"{name}-{world.rank}.pt")


if __name__ == "__main__":
    main()
