"""The folder of a run: its header and its checkpoint, written and read again."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from kd_train.config.train_config import TrainConfig, saved_settings
from kd_train.trainer.checkpoint import read_checkpoint
from kd_train.trainer.extend import before_extension
from kd_train.trainer.progress import TrainingState
from kd_train.trainer.records import require_same_run
from kd_train.trainer.results import drop_results
from pipeline.errors import SpecError
from pipeline.files.atomic import write_atomically
from pipeline.spec.plain_yaml import yaml_text

CHECKPOINT = "last.pt"


class Stateful(Protocol):
    """A part of training whose values a checkpoint holds."""

    def state_dict(self) -> Any:
        """Return the values to save."""

    def load_state_dict(self, state: Any, /) -> Any:
        """Continue from saved values."""


@dataclass(frozen=True)
class SavedRun:
    """A checkpoint that fits to the configuration of the run that resumes it.

    ``values`` has the saved values of every part of training by its name,
    ``extended_from`` the numbers of steps that the run had before.
    """

    progress: TrainingState
    rows: list[dict[str, Any]]
    extended_from: list[int]
    values: dict[str, Any]
    is_longer: bool

    def restore(self, parts: Mapping[str, Stateful]) -> None:
        """Load the saved values into ``parts``."""
        for name, part in parts.items():
            part.load_state_dict(self.values[name])


def write_header(folder: Path, header: Mapping[str, Any]) -> None:
    """Write ``config.yaml``, which ``--config`` takes, and ``run.json``.

    ``run.json`` has the rest of the header and the versions of the packages that train.
    """
    about = {key: value for key, value in header.items() if key != "config"}
    about["versions"] = {name: version(name) for name in ("kd-train", "torch")}
    text = json.dumps(about, indent=2, sort_keys=True)
    write_atomically(folder / "run.json", text.encode() + b"\n")
    write_atomically(folder / "config.yaml", yaml_text(header["config"]).encode())


def checkpoint_state(
    header: Mapping[str, Any],
    progress: TrainingState,
    rows: list[dict[str, Any]],
    parts: Mapping[str, Stateful],
) -> dict[str, Any]:
    """Return the content of a checkpoint."""
    state = {"header": dict(header), "progress": vars(progress), "rows": rows}
    return state | {name: part.state_dict() for name, part in parts.items()}


def read_saved_run(
    folder: Path,
    config: TrainConfig,
    header: dict[str, Any],
    processes: int,
    *,
    extend: bool,
) -> SavedRun:
    """Read the checkpoint in ``folder``.

    With ``extend`` the saved run may have fewer steps.

    Raises
    ------
    CheckpointError
        There is no checkpoint, or it is damaged.
    SpecError
        The run had another configuration, store or number of processes.
    """
    state = read_checkpoint(folder / CHECKPOINT)
    progress, saved = TrainingState(**state["progress"]), dict(state["header"])
    saved["config"] = before = saved_settings(saved["config"], str(folder))
    if extend:
        saved = before_extension(saved, config, progress, folder)
    require_same_run(saved, header, folder)
    if progress.world_size != processes:
        raise SpecError(
            f"{folder} was trained by {progress.world_size} processes, but now there "
            f"are {processes}; the order of samples depends on this number, so "
            f"resume with {progress.world_size} processes or use another --out."
        )
    return SavedRun(
        progress,
        state["rows"],
        list(saved.get("extended_from", ())),
        state,
        saved["config"] != before,
    )


def drop_outdated_results(folder: Path, saved: SavedRun) -> None:
    """Remove the results of a run that now has more steps."""
    if saved.is_longer:
        drop_results(folder)
