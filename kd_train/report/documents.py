"""Documents in a run folder: what a report reads of them."""

import math
from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict, field_validator
from pydantic import Field as Key

from kd_train.config.train_config import saved_settings
from pipeline.spec.yaml_model import ClosedModel


class Document(ClosedModel):
    """Part of a document in a run folder; further keys are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=True)


Metric = Annotated[float, BeforeValidator(lambda x: math.nan if x is None else x)]


class Metrics(Document):
    """Metrics in meV, meV/Å, cosine, % and meV/Å³, NaN if the split lacks the labels.

    Runs without virials do not have the last one.
    """

    energy_mae: Metric
    forces_mae: Metric
    forces_cos: Metric
    efwt: Metric
    stress_mae: Metric = math.nan


class SplitTraining(Document):
    """Use of a training split: ``pseudo_labelled`` samples have the teacher's labels.

    Numbers are None if the store does not record them.
    """

    samples: int
    labelled: int | None
    pseudo_labelled: int
    teacher_passes: int | None


class Training(Document):
    """Samples that a run was trained on, and the teacher's passes behind them."""

    splits: dict[str, SplitTraining]
    samples: int
    labelled: int | None
    teacher_passes: int | None

    @property
    def labelled_splits(self) -> tuple[str, ...]:
        """Splits with reference labels, in the order of training."""
        return tuple(name for name, one in self.splits.items() if one.labelled != 0)

    @property
    def is_reference_only(self) -> bool:
        """Whether every split has reference labels, and none has pseudo-labels."""
        return all(
            one.labelled != 0 and not one.pseudo_labelled
            for one in self.splits.values()
        )


class Summary(Document):
    """Content of ``metrics.json`` of a finished run.

    Folders of earlier versions lack ``training`` and ``teacher_train_metrics``.
    """

    student: str
    strategy: str
    seed: int
    steps: int
    seconds: float
    parameters: int
    fingerprint: str
    val_split: str
    metrics: Metrics
    teacher_metrics: Metrics | None
    teacher: str | None = None
    training: Training | None = None
    teacher_train_metrics: Metrics | None = None


class Header(Document):
    """Configuration and provenance of a run, of ``config.yaml`` and ``run.json``.

    ``processes`` trained together; folders of the first versions lack the key.
    """

    config: dict[str, Any]
    initial_weights: str
    processes: int = Key(1, ge=1)
    versions: dict[str, str] = Key(default_factory=dict)

    @field_validator("config")
    @classmethod
    def _by_todays_names(cls, config: dict[str, Any]) -> dict[str, Any]:
        return saved_settings(config, "config")


class BatchSizes(Document):
    """Settings that decide how much an optimiser step sees."""

    batch_size: int
    batch_atoms: int | None
    accumulate_steps: int

    def together(self, processes: int) -> str:
        """Return the size of a step over all processes, as ``128 samples``."""
        atoms = self.batch_atoms
        size = self.batch_size if atoms is None else atoms
        total = size * self.accumulate_steps * processes
        return f"{total} {'samples' if atoms is None else 'atoms'}"


class ThroughputRecord(Document):
    """Content of ``throughput.json``: samples per second of inference and machine.

    ``samples_per_second_with_graphs`` includes making the graphs. ``mean_atoms`` is
    that of the samples measured.
    """

    samples_per_second: float
    samples_per_second_with_graphs: float
    batch_size: int
    device: str
    threads: int | None
    mean_atoms: float
    device_name: str | None = None

    @property
    def machine(self) -> str:
        """Device and threads in words."""
        name = self.device_name or self.device
        if self.threads is None:
            return name
        return f"{name}, {self.threads} thread{'s' if self.threads > 1 else ''}"


class Failure(Document):
    """Content of ``failure.json`` of a run that ended with an error."""

    error: str
    step: int | None = None
