"""Running numbers of a run: window means, CSV rows, progress bar, comparison."""

import csv
import io
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from kd_train.config.train_config import TrainConfig
from kd_train.distributed import World
from pipeline.errors import SpecError
from pipeline.files.atomic import write_atomically


class Window:
    """Means and rate since the last validation, with sums on the device."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._steps = 0
        self._samples = 0
        self._started = time.monotonic()

    def add(self, losses: dict[str, Tensor], samples: int) -> None:
        """Take in one step's losses (scalars) and its number of samples."""
        for name, value in losses.items():
            known = self._sums.get(name)
            self._sums[name] = value.clone() if known is None else known + value
        self._steps += 1
        self._samples += samples

    def means(self, world: World) -> dict[str, float]:
        """Return the mean of every loss over steps and processes as ``train_NAME``."""
        sums = world.all_sum(torch.stack(list(self._sums.values()))).tolist()
        return {
            f"train_{name}": total / self._steps
            for name, total in zip(self._sums, sums, strict=True)
        }

    def rate(self, world: World) -> float:
        """Return samples per second of all processes since the window was opened."""
        samples = int(world.all_sum(torch.tensor(self._samples)))
        return samples / (time.monotonic() - self._started)


def require_same_run(
    saved: dict[str, Any], current: dict[str, Any], folder: Path
) -> None:
    """Refuse to continue a run that had another store or configuration."""
    if saved["fingerprint"] != current["fingerprint"]:
        raise SpecError(
            f"{folder} was trained on a store with fingerprint "
            f"{saved['fingerprint'][:12]}…, but this store has "
            f"{current['fingerprint'][:12]}…; use the same store or another --out."
        )
    if saved["config"] == current["config"]:
        return
    for key, value in current["config"].items():
        if saved["config"].get(key) != value:
            before = saved["config"].get(key)
            raise SpecError(
                f"{folder} was started with {key} = {before!r}, but now it is "
                f"{value!r}; resume with the same "
                f"configuration{_or_extend(key, before, value)} or use another --out."
            )


def _or_extend(key: str, before: Any, value: Any) -> str:
    return ", add --extend to continue with more steps," * (
        key == "steps" and value > before
    )


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Replace the CSV file at ``path`` by ``rows``, atomically."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, buffer.getvalue().encode())


def progress_bar(config: TrainConfig, done: int, shown: bool = True) -> "tqdm[Any]":
    """Make a progress bar in steps, which prints lines if there is no terminal."""
    return tqdm(
        disable=not shown,
        total=config.steps,
        initial=done,
        unit="step",
        desc=f"{config.student.name} {config.strategy} seed {config.seed}",
        mininterval=0.5 if sys.stderr.isatty() else 15.0,
    )


def format_short(value: object) -> str:
    """Format ``value`` for a log line, numbers to four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
