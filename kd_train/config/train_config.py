"""``TrainConfig``: the closed, documented configuration of one training run."""

import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field as Key
from pydantic import field_validator

from pipeline.errors import SpecError
from pipeline.spec.renamed_keys import rename_keys
from pipeline.spec.yaml_model import (
    ClosedModel,
    apply_overrides,
    nearest,
    read_yaml,
    validate,
)

# Datasets of the paper; a file each in recipes/.
RECIPES = ("coll", "oc20")
BASELINE = "none"
STRATEGIES = ("none", "n2n", "e2n", "e2e", "v2v", "vanilla1", "vanilla2")
# Second names, for those who do not know the paper's.
STRATEGY_ALIASES = {"energy_force": "vanilla1", "per_atom_energy": "vanilla2"}


class StudentConfig(ClosedModel):
    """Which network learns."""

    preset: str = Key(
        "",
        description="a name of `kd-train --help`; default: the teacher's in the paper",
    )
    hyperparameters: dict[str, Any] = Key(
        default_factory=dict, description="changes to the preset"
    )


class OptimizerConfig(ClosedModel):
    """AdamW over student and adapters."""

    earlier_keys: ClassVar[Mapping[str, str]] = {"decayed": "weight_decay_on"}

    lr: float = Key(1e-3, gt=0)
    weight_decay: float = Key(2e-6, ge=0)
    weight_decay_on: Literal["all", "matrices"] = Key(
        "all", description="matrices: no decay of biases, embeddings and scalars"
    )
    amsgrad: bool = True
    eps: float = Key(1e-7, gt=0)
    clip_norm: float | None = Key(10.0, gt=0, description="of all gradients together")


class ScheduleConfig(ClosedModel):
    """Linear warm-up, then the learning rate falls."""

    kind: Literal["constant", "exponential", "cosine", "milestones"] = Key(
        "exponential",
        description="exponential: decay_rate^(step / decay_steps); cosine: to 0; "
        "milestones: decay_rate at each of them",
    )
    warmup_steps: int = Key(3750, ge=0)
    warmup_start: float = Key(
        0.0, ge=0, le=1, description="share of the rate that the warm-up begins from"
    )
    decay_rate: float = Key(0.01, gt=0, le=1)
    decay_steps: int = Key(4_000_000, ge=1)
    milestones: tuple[int, ...] = Key((), description="steps, ascending")


class LossConfig(ClosedModel):
    """L0 = energy_weight * MAE(E) + force_weight * force error over free atoms."""

    earlier_keys: ClassVar[Mapping[str, str]] = {
        "force_error": "force_loss",
        "teacher_labels": "pseudo_label_weight",
    }

    energy_weight: float = Key(1.0, ge=0)
    force_weight: float = Key(100.0, ge=0)
    force_loss: Literal["l2", "mae"] = Key(
        "l2", description="l2: mean of |dF|; mae: mean over components"
    )
    pseudo_label_weight: float = Key(
        0.0,
        ge=0,
        description="weight in L0 of samples without reference labels, with the "
        "teacher's energy and forces; 0 leaves them to the distillation terms",
    )


class LambdaSchedule(ClosedModel):
    """Factor of all distillation weights, by the step."""

    kind: Literal["constant", "linear", "cosine"] = Key(
        "constant", description="how the factor goes from start to end; constant: start"
    )
    start: float = Key(1.0, ge=0)
    end: float = Key(0.0, ge=0)
    first_step: int = Key(0, ge=0, description="the factor is start before")
    steps: int | None = Key(None, ge=1, description="default: to the end of training")


class DistillConfig(ClosedModel):
    """Weights of the distillation terms (the paper's lambda, Table 6, COLL)."""

    earlier_keys: ClassVar[Mapping[str, str]] = {"balance": "target_ratio"}
    key_aliases: ClassVar[Mapping[str, str]] = STRATEGY_ALIASES

    n2n: float = Key(100.0, ge=0)
    e2n: float = Key(10.0, ge=0)
    e2e: float = Key(10.0, ge=0)
    v2v: float = Key(10000.0, ge=0)
    vanilla1: float = Key(1.0, ge=0)
    vanilla2: float = Key(100.0, ge=0)
    schedule: LambdaSchedule = LambdaSchedule()
    target_ratio: float | None = Key(
        None,
        gt=0,
        description="keep the weighted terms together at this fraction of L0; the "
        "weights then only say how they share it",
    )


class TrainConfig(ClosedModel):
    """Everything that decides a run beside the store."""

    earlier_keys: ClassVar[Mapping[str, str]] = {
        "accumulate": "accumulate_steps",
        "best_by": "monitor",
        "buffer_blocks": "shuffle_blocks",
        "export": "export_weights",
    }
    earlier_values: ClassVar[Mapping[str, Mapping[str, str]]] = {
        "normalizer": {"unit": "none"}
    }

    strategy: str = Key("none", description="one of the strategies, or several with +")
    student: StudentConfig = StudentConfig()
    recipe: Literal["auto", "none", "coll", "oc20"] = Key(
        "auto",
        description="where values come from that are not set: the paper's for this "
        "student on COLL or OC20, or none; auto: by the student",
    )
    seed: int = Key(0, ge=0)
    steps: int = Key(10_000, ge=1, description="optimiser steps")
    accumulate_steps: int = Key(
        1, ge=1, description="batches in a step, of every process; as one large batch"
    )
    batch_size: int = Key(
        32,
        ge=1,
        description="samples in a batch of one process at most; default: of the "
        "recipe's batch this process's share",
    )
    batch_atoms: int | None = Key(
        None, ge=1, description="atoms in a batch at most; replaces batch_size when set"
    )
    shuffle_blocks: int = Key(
        16, ge=1, description="blocks of the store among which samples are shuffled"
    )
    loader_threads: int = Key(2, ge=1, description="threads that make batches ahead")
    train_split: str = Key("train", description="a split, or several joined with +")
    val_split: str = Key("val", description="likewise")
    test_split: str | None = Key(
        None,
        description="what the final metrics are of, by default val_split; of several "
        "joined with + they are the plain mean",
    )
    normalizer: Literal["store", "none"] = Key(
        "store",
        description="store: the teacher's, or that of the labels; none: energies and "
        "forces as they are, as the paper has it for COLL",
    )
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    loss: LossConfig = LossConfig()
    distill: DistillConfig = DistillConfig()
    ema_decay: float = Key(
        0.999, ge=0, lt=1, description="of the moving average; 0: the last weights"
    )
    precision: Literal["float32", "tf32", "bfloat16"] = Key(
        "float32", description="of matrix products; bfloat16 by autocast"
    )
    compile: bool = Key(False, description="torch.compile the student")
    deterministic: bool = Key(
        False, description="refuse operations that may differ between two runs"
    )
    eval_every: int = Key(1000, ge=1, description="steps between validations")
    export_weights: Literal["best", "last"] = Key(
        "best", description="which weights student.safetensors holds"
    )
    monitor: Literal["loss", "energy_mae", "forces_mae", "forces_cos", "efwt"] = Key(
        "loss",
        description="metric that decides which validation is the best; loss is L0 over "
        "the split",
    )
    patience: int | None = Key(
        None,
        ge=1,
        description="stop after so many validations without a better one",
    )

    @field_validator("strategy", mode="before")
    @classmethod
    def _by_its_name(cls, value: object) -> object:
        return strategy_name(value) if isinstance(value, str) else value

    @field_validator("strategy")
    @classmethod
    def _known_strategies(cls, value: str) -> str:
        for name in value.split("+"):
            if name not in STRATEGIES:
                raise ValueError(f"unknown strategy{nearest(name, STRATEGIES)}")
        names = value.split("+")
        if len(set(names)) < len(names) or ("none" in names and len(names) > 1):
            raise ValueError(
                "strategies may be joined with + once each, none only alone"
            )
        return value

    @field_validator("schedule")
    @classmethod
    def _milestones_ascend(cls, value: ScheduleConfig) -> ScheduleConfig:
        steps = value.milestones
        if any(a >= b for a, b in itertools.pairwise(steps)):
            raise ValueError("milestones must ascend")
        # Where one of them is not set, a recipe may bring it.
        complete = value.model_fields_set >= {"kind", "milestones"}
        if complete and (value.kind == "milestones") != bool(steps):
            raise ValueError("milestones belong to kind milestones, and to no other")
        return value

    @field_validator("train_split", "val_split", "test_split")
    @classmethod
    def _each_split_once(cls, value: str | None) -> str | None:
        names = [] if value is None else value.split("+")
        if len(set(names)) < len(names):
            raise ValueError("splits may be joined with + once each")
        return value

    @property
    def strategies(self) -> tuple[str, ...]:
        """Names of the distillation terms; empty for a baseline."""
        return () if self.strategy == "none" else tuple(self.strategy.split("+"))


def strategy_name(text: str) -> str:
    """Return ``text``, one strategy or several joined with +, without aliases."""
    return "+".join(STRATEGY_ALIASES.get(name, name) for name in text.split("+"))


def saved_settings(settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the configuration of an earlier run by the names of today."""
    return rename_keys(TrainConfig, settings, where, warn=False)


def load_config(
    path: Path | None, flags: dict[str, Any], overrides: Iterable[str]
) -> TrainConfig:
    """Configuration from defaults, then the file, then flags, then ``--set``.

    Raises
    ------
    SpecError
        A key is unknown, or a value is of the wrong kind or out of range.
    """
    document: dict[str, Any] = {}
    if path is not None:
        document = rename_keys(TrainConfig, read_yaml(path), str(path))
    for dotted, value in flags.items():
        if value is not None:
            *parents, last = dotted.split(".")
            target = document
            for key in parents:
                target = target.setdefault(key, {})
                if not isinstance(target, dict):
                    raise SpecError(f"{path}: {key!r} must hold keys.")
            target[last] = value
    apply_overrides(document, overrides, TrainConfig)
    return validate(TrainConfig, document, str(path or "configuration"))
