"""``TrainConfig``: the closed, documented configuration of one training run."""

import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field as Key
from pydantic import (
    field_validator,
)

from kd_train.config.sections import (
    STRATEGY_ALIASES,
    DistillConfig,
    JacobianConfig,
    LossConfig,
    OptimizerConfig,
    ScheduleConfig,
    StudentConfig,
)
from kd_train.config.strategy_names import BASELINE, STRATEGIES
from pipeline.errors import SpecError
from pipeline.spec.renamed_keys import rename_keys
from pipeline.spec.yaml_model import (
    ClosedModel,
    apply_overrides,
    read_yaml,
    validate,
)

# Datasets of the paper; a file each in recipes/.
RECIPES = ("coll", "oc20")


class TrainConfig(ClosedModel):
    """Everything that decides a run, except for the store."""

    earlier_keys: ClassVar[Mapping[str, str]] = {
        "accumulate": "accumulate_steps",
        "best_by": "monitor",
        "buffer_blocks": "shuffle_blocks",
        "export": "export_weights",
    }
    earlier_values: ClassVar[Mapping[str, Mapping[str, str]]] = {
        "normalizer": {"unit": "none"}
    }

    strategy: str = Key(
        "none",
        description="Distillation strategy, or several strategies joined with + "
        "(default: none, a baseline without distillation).",
    )
    student: StudentConfig = StudentConfig()
    recipe: Literal["auto", "none", "coll", "oc20"] = Key(
        "auto",
        description="Source of unset values: the paper's settings for COLL or OC20, "
        "or none; auto takes the recipe that contains the student (default: auto).",
    )
    seed: int = Key(0, ge=0)
    steps: int = Key(
        10_000, ge=1, description="Number of optimiser steps (default: 10000)."
    )
    accumulate_steps: int = Key(
        1,
        ge=1,
        description="Batches per optimiser step and process (gradient "
        "accumulation); the step equals a step on one large batch (default: 1).",
    )
    batch_size: int = Key(
        32,
        ge=1,
        description="Maximum number of samples in a batch of one process (default: "
        "the process's share of the recipe's batch; 32 without a recipe).",
    )
    batch_atoms: int | None = Key(
        None,
        ge=1,
        description="Maximum number of atoms in a batch; replaces batch_size if set.",
    )
    shuffle_blocks: int = Key(
        16,
        ge=1,
        description="Blocks of the store among which samples are shuffled "
        "(default: 16).",
    )
    loader_threads: int = Key(
        2, ge=1, description="Threads that prepare batches in advance (default: 2)."
    )
    train_split: str = Key(
        "train",
        description="Split of the training samples, or several splits joined with +.",
    )
    val_split: str = Key(
        "val",
        description="Split of the validation samples, or several splits joined with +.",
    )
    test_split: str | None = Key(
        None,
        description="Split of the final metrics (default: val_split); metrics of "
        "several splits joined with + are averaged.",
    )
    normalizer: Literal["store", "none"] = Key(
        "store",
        description="Units of student and losses (default: store); store takes the "
        "normaliser of the teacher or of the labels, none leaves energies and forces "
        "unscaled, as the paper does for COLL.",
    )
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    loss: LossConfig = LossConfig()
    distill: DistillConfig = DistillConfig()
    jacobian: JacobianConfig = JacobianConfig()
    ema_decay: float = Key(
        0.999,
        ge=0,
        lt=1,
        description="Decay of the moving average of the weights; 0 exports the "
        "last weights (default: 0.999).",
    )
    precision: Literal["float32", "tf32", "bfloat16"] = Key(
        "float32",
        description="Precision of matrix products (default: float32); bfloat16 "
        "uses autocast.",
    )
    compile: bool = Key(
        False,
        description="Whether to compile the student with torch.compile (default: "
        "false).",
    )
    native_kernels: bool = Key(
        False,
        description="Whether steps on the CPU run layers of PaiNN and the optimiser as "
        "C code, which a C compiler builds at the start (default: false).",
    )
    deterministic: bool = Key(
        False,
        description="Whether to refuse operations that may differ between two "
        "runs (default: false).",
    )
    eval_every: int = Key(
        1000, ge=1, description="Steps between validations (default: 1000)."
    )
    export_weights: Literal["best", "last"] = Key(
        "best",
        description="Weights that student.safetensors holds: of the best or of "
        "the last validation (default: best).",
    )
    monitor: Literal["loss", "energy_mae", "forces_mae", "forces_cos", "efwt"] = Key(
        "loss",
        description="Metric that selects the best validation (default: loss, which "
        "is L0 over the split).",
    )
    patience: int | None = Key(
        None,
        ge=1,
        description="Number of validations without improvement before early stopping "
        "(default: no early stopping).",
    )

    @field_validator("strategy", mode="before")
    @classmethod
    def _by_its_name(cls, value: object) -> object:
        return strategy_name(value) if isinstance(value, str) else value

    @field_validator("strategy")
    @classmethod
    def _known_strategies(cls, value: str) -> str:
        for name in value.split("+"):
            if name not in STRATEGIES.names():
                raise ValueError(f"unknown strategy {name!r}{STRATEGIES.known()}")
        names = value.split("+")
        if len(set(names)) < len(names) or (BASELINE in names and len(names) > 1):
            raise ValueError(
                "strategies may be joined with + once each, and none cannot be joined"
            )
        return value

    @field_validator("schedule")
    @classmethod
    def _milestones_ascend(cls, value: ScheduleConfig) -> ScheduleConfig:
        steps = value.milestones
        if any(a >= b for a, b in itertools.pairwise((-1, *steps))):
            raise ValueError("milestones must ascend, and none may be negative")
        # Where one of them is not set, a recipe may bring it.
        complete = value.model_fields_set >= {"kind", "milestones"}
        if complete and value.kind == "milestones" and not steps:
            raise ValueError("kind milestones needs milestones, a list of steps")
        if complete and value.kind != "milestones" and steps:
            raise ValueError("milestones belong to kind milestones, and to no other")
        return value

    @field_validator("train_split", "val_split", "test_split")
    @classmethod
    def _each_split_once(cls, value: str | None) -> str | None:
        names = [] if value is None else value.split("+")
        if len(set(names)) < len(names):
            raise ValueError("each split may be joined with + only once")
        return value

    @property
    def strategies(self) -> tuple[str, ...]:
        """Names of the distillation terms; empty for a baseline."""
        return () if self.strategy == BASELINE else tuple(self.strategy.split("+"))


def strategy_name(text: str) -> str:
    """Return ``text``, one strategy or several joined with +, without aliases."""
    return "+".join(STRATEGY_ALIASES.get(name, name) for name in text.split("+"))


_DEFAULTS = TrainConfig().model_dump(mode="json")


def saved_settings(settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the configuration of an earlier run with the keys of today.

    Of a key that the earlier version lacked, the default is what that version did.
    """
    renamed = rename_keys(TrainConfig, settings, where, warn=False)
    earlier = _completed({"loss": {"virial_weight": 0.0}}, _DEFAULTS)
    return _completed(renamed, earlier)


def _completed(values: dict[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Add the ``defaults`` of missing keys to ``values``, also in sections."""
    complete = {**defaults, **values}
    for key, default in defaults.items():
        if isinstance(default, dict) and isinstance(complete[key], dict):
            complete[key] = _completed(complete[key], default)
    return complete


def load_config(
    path: Path | None, flags: dict[str, Any], overrides: Iterable[str]
) -> TrainConfig:
    """Build a configuration from defaults, then the file, then flags, then ``--set``.

    Raises
    ------
    SpecError
        A key is unknown, or a value is of the wrong kind or out of range.
    """
    document: dict[str, Any] = {}
    if path is not None:
        document = rename_keys(TrainConfig, _read_document(path), str(path))
    for dotted, value in flags.items():
        if value == "":
            option = dotted.removesuffix(".preset")
            raise SpecError(f"--{option} is empty; name one or leave the option out.")
        if value is not None:
            *parents, last = dotted.split(".")
            target = document
            for key in parents:
                if target.get(key) is None:
                    target[key] = {}
                target = target[key]
                if not isinstance(target, dict):
                    raise SpecError(f"{path}: {key!r} must contain keys, not a value.")
            target[last] = value
    apply_overrides(document, overrides, TrainConfig)
    return validate(TrainConfig, document, str(path or "configuration"))


def _read_document(path: Path) -> dict[str, Any]:
    """Read a configuration; that of a run made by an earlier version lies deeper."""
    document = read_yaml(path)
    if document.keys() >= {"config", "fingerprint"}:
        return dict(document["config"])
    return document
