"""``TrainConfig``: the closed, documented configuration of one training run."""

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field as Key
from pydantic import (
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from kd_train.config.strategy_names import BASELINE, BUILT_IN, STRATEGIES, term_names
from pipeline.errors import SpecError
from pipeline.spec.yaml_model import (
    ClosedModel,
    apply_overrides,
    read_yaml,
    validate,
)

# Datasets of the paper; a file each in recipes/.
RECIPES = ("coll", "oc20")


class StudentConfig(ClosedModel):
    """Which network learns."""

    model: str = Key(
        "",
        description="a network without a preset: gemnet_oc | painn | schnet | the name "
        "of an installed plug-in; in place of preset",
    )
    preset: str = Key(
        "",
        description="a name of `kd-train --help`; default: the teacher's in the paper",
    )
    hyperparameters: dict[str, Any] = Key(
        default_factory=dict, description="changes to the preset"
    )

    @model_validator(mode="after")
    def _one_name(self) -> "StudentConfig":
        if self.model and self.preset:
            raise ValueError("model and preset exclude each other; leave one out")
        return self

    @model_serializer(mode="wrap")
    def _without_no_model(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Runs from before there were plug-ins resume, since they have no such key.
        document: dict[str, Any] = dump(self)
        return {k: v for k, v in document.items() if k != "model" or v}

    @property
    def name(self) -> str:
        """The preset, or the network without one; empty if neither is chosen."""
        return self.preset or self.model


class OptimizerConfig(ClosedModel):
    """AdamW over student and adapters."""

    lr: float = Key(1e-3, gt=0)
    weight_decay: float = Key(2e-6, ge=0)
    decayed: Literal["all", "matrices"] = Key(
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

    energy_weight: float = Key(1.0, ge=0)
    force_weight: float = Key(100.0, ge=0)
    force_error: Literal["l2", "mae"] = Key(
        "l2", description="l2: mean of |dF|; mae: mean over components"
    )
    teacher_labels: float = Key(
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

    n2n: float = Key(100.0, ge=0)
    e2n: float = Key(10.0, ge=0)
    e2e: float = Key(10.0, ge=0)
    v2v: float = Key(10000.0, ge=0)
    vanilla1: float = Key(1.0, ge=0)
    vanilla2: float = Key(100.0, ge=0)
    weights: dict[str, Annotated[float, Key(ge=0)]] = Key(
        default_factory=dict,
        description="weight of a term by the name of its strategy, built in or plug-in",
    )
    schedule: LambdaSchedule = LambdaSchedule()
    balance: float | None = Key(
        None,
        gt=0,
        description="keep the weighted terms together at this fraction of L0; the "
        "weights then only say how they share it",
    )

    @model_validator(mode="before")
    @classmethod
    def _built_in_weights(cls, document: Any) -> Any:
        """Give weights of built-in strategies the keys of their own."""
        weights = document.get("weights") if isinstance(document, dict) else None
        if not isinstance(weights, dict):
            return document
        for name in weights:
            if name in BUILT_IN and name in document:
                raise ValueError(
                    f"{name} and weights.{name} are one key; leave one out"
                )
        own = {name: weights[name] for name in weights if name in BUILT_IN}
        rest = {name: weights[name] for name in weights if name not in BUILT_IN}
        return {**document, **own, "weights": rest}

    @field_validator("weights")
    @classmethod
    def _known_terms(cls, weights: dict[str, float]) -> dict[str, float]:
        for name in weights:
            if name not in term_names():
                raise ValueError(f"unknown strategy {name!r}{STRATEGIES.known()}")
        return weights

    @model_serializer(mode="wrap")
    def _without_no_weights(
        self, dump: SerializerFunctionWrapHandler
    ) -> dict[str, Any]:
        # Runs from before there were plug-ins resume, since they have no such key.
        document: dict[str, Any] = dump(self)
        return {k: v for k, v in document.items() if k != "weights" or v}

    def weight(self, strategy: str) -> float | None:
        """Weight of the term of ``strategy``; None if it is the plug-in's default."""
        if strategy in BUILT_IN:
            return float(getattr(self, strategy))
        return self.weights.get(strategy)

    @property
    def set_weights(self) -> frozenset[str]:
        """Strategies whose weight was set."""
        return frozenset(self.weights) | self.model_fields_set & BUILT_IN.keys()


class TrainConfig(ClosedModel):
    """Everything that decides a run beside the store."""

    strategy: str = Key("none", description="one of the strategies, or several with +")
    student: StudentConfig = StudentConfig()
    recipe: Literal["auto", "none", "coll", "oc20"] = Key(
        "auto",
        description="where values come from that are not set: the paper's for this "
        "student on COLL or OC20, or none; auto: by the student",
    )
    seed: int = Key(0, ge=0)
    steps: int = Key(10_000, ge=1, description="optimiser steps")
    accumulate: int = Key(
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
    buffer_blocks: int = Key(
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
    normalizer: Literal["store", "unit"] = Key(
        "store",
        description="store: the teacher's, or that of the labels; unit: energies and "
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
    export: Literal["best", "last"] = Key(
        "best", description="which weights student.safetensors holds"
    )
    best_by: Literal["loss", "energy_mae", "forces_mae", "forces_cos", "efwt"] = Key(
        "loss",
        description="what the best validation is chosen by; loss is L0 over the split",
    )
    patience: int | None = Key(
        None,
        ge=1,
        description="stop after so many validations without a better one",
    )

    @field_validator("strategy")
    @classmethod
    def _known_strategies(cls, value: str) -> str:
        for name in value.split("+"):
            if name not in STRATEGIES.names():
                raise ValueError(f"unknown strategy {name!r}{STRATEGIES.known()}")
        names = value.split("+")
        if len(set(names)) < len(names) or (BASELINE in names and len(names) > 1):
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
        return () if self.strategy == BASELINE else tuple(self.strategy.split("+"))


def load_config(
    path: Path | None, flags: dict[str, Any], overrides: Iterable[str]
) -> TrainConfig:
    """Configuration from defaults, then the file, then flags, then ``--set``.

    Raises
    ------
    SpecError
        A key is unknown, or a value is of the wrong kind or out of range.
    """
    document = {} if path is None else read_yaml(path)
    for dotted, value in flags.items():
        if value is not None:
            *parents, last = dotted.split(".")
            target = document
            for key in parents:
                target = target.setdefault(key, {})
                if not isinstance(target, dict):
                    raise SpecError(f"{path}: {key!r} must hold keys.")
            target[last] = value
    apply_overrides(document, overrides)
    return validate(TrainConfig, document, str(path or "configuration"))
