"""Resuming with more steps, if the first steps of a longer run are the same."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kd_train.config.train_config import TrainConfig
from kd_train.trainer.progress import TrainingState
from kd_train.trainer.weighting import reads_features
from pipeline.errors import SpecError


def before_extension(
    saved: Mapping[str, Any], config: TrainConfig, progress: TrainingState, folder: Path
) -> dict[str, Any]:
    """Return the header ``saved`` with the steps of ``config``.

    ``extended_from`` in it lists the steps that the run had before.

    Raises
    ------
    SpecError
        The run had more steps, was stopped early, or a schedule of it ends with it.
    """
    old, new = int(saved["config"]["steps"]), config.steps
    header = dict(saved)
    if new == old:
        return header
    if new < old:
        raise SpecError(
            f"{folder} was started with steps = {old}, but --extend needs more "
            f"steps; set steps to more than {old}."
        )
    if progress.stopped_early(config):
        raise SpecError(
            f"{folder} was stopped early at step {progress.step} by "
            f"patience={config.patience}, so more steps change nothing; start a new "
            "run."
        )
    if (key := _ends_with_the_run(config)) is not None:
        raise SpecError(
            f"{folder} cannot be extended: {key}, so a run of {new} steps differs "
            "from its first step on; start it with another --out."
        )
    header["config"] = {**saved["config"], "steps": new}
    header["extended_from"] = [*saved.get("extended_from", ()), old]
    return header


def _ends_with_the_run(config: TrainConfig) -> str | None:
    """Name a setting of ``config`` that depends on the number of steps, if any."""
    if config.schedule.kind == "cosine":
        return "schedule.kind=cosine decays the learning rate to 0 at the last step"
    fading = config.distill.schedule
    if fading.kind == "fade":
        if not any(map(reads_features, config.strategies)):
            return None
        return "distill.schedule=fade ends at half of the steps"
    if config.strategies and fading.kind != "constant" and fading.steps is None:
        return f"distill.schedule.kind={fading.kind} ends at the last step"
    return None
