"""Steps of one student on request, for comparisons between processes.

    python step_variants_worker.py STORE STUDENT STRATEGY BATCH THREADS KEY=VALUE ...

Each line on stdin asks for one step. The answer on stdout is a line with CPU seconds
of reading the batch, CPU seconds of the step, and its loss. The package is whatever
PYTHONPATH leads to, so that another checkout can be measured by the same file.
"""

import os
import sys
import time
from pathlib import Path

import numpy as np
import torch

from kd_train.config.train_config import load_config
from kd_train.trainer.trainer import Trainer
from pipeline.store.reader import FeatureStore

BATCHES = 8


def main() -> None:
    store, student, strategy, batch_size, threads, *settings = sys.argv[1:]
    # Messages of libraries must not mix with the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    torch.set_num_threads(int(threads))
    opened = FeatureStore.open(Path(store))
    flags = {
        "student.preset": student,
        "strategy": strategy,
        "batch_size": int(batch_size),
        "val_split": "train",
    }
    config = load_config(None, flags, settings)
    run = Trainer(config, opened, Path("unused"), torch.device("cpu"))
    run.modules.train()
    generator = np.random.default_rng(0)
    count = len(opened.splits["train"])
    batches = [
        np.sort(generator.integers(0, count, int(batch_size))) for _ in range(BATCHES)
    ]
    for number, _ in enumerate(sys.stdin):
        started = time.process_time()
        batch = run.train_samples.batch(batches[number % BATCHES])
        read = time.process_time()
        losses = run.step(run.on_device(batch))
        loss = losses["loss"].item()
        done = time.process_time()
        print(read - started, done - read, repr(loss), file=answers)


if __name__ == "__main__":
    main()
