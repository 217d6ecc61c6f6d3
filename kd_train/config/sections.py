"""Sections of the configuration of a run: student, optimiser, loss, distillation."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field as Key
from pydantic import (
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from kd_train.config.strategy_names import BUILT_IN, STRATEGIES, term_names
from pipeline.spec.closed_model import ClosedModel

# Second names, for readers who do not know the names of the paper.
STRATEGY_ALIASES = {"energy_force": "vanilla1", "per_atom_energy": "vanilla2"}


class StudentConfig(ClosedModel):
    """The network that learns."""

    model: str = Key(
        "",
        description="a network without a preset: gemnet_oc | painn | schnet | the name "
        "of an installed plug-in; in place of preset",
    )
    preset: str = Key(
        "",
        description="Name of the student network; `kd-train --help` lists the names "
        "(default: the paper's student for the teacher in the store).",
    )
    hyperparameters: dict[str, Any] = Key(
        default_factory=dict,
        description="Hyperparameters that replace values of the preset.",
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

    earlier_keys: ClassVar[Mapping[str, str]] = {"decayed": "weight_decay_on"}

    lr: float = Key(1e-3, gt=0)
    weight_decay: float = Key(2e-6, ge=0)
    weight_decay_on: Literal["all", "matrices"] = Key(
        "all",
        description="Parameters with weight decay (default: all); matrices "
        "excludes biases, embeddings and scalars.",
    )
    amsgrad: bool = True
    eps: float = Key(1e-7, gt=0)
    clip_norm: float | None = Key(
        10.0,
        gt=0,
        description="Maximum norm of the gradient over all parameters; null disables "
        "clipping.",
    )


class ScheduleConfig(ClosedModel):
    """Linear warm-up, followed by decay of the learning rate."""

    kind: Literal["constant", "exponential", "cosine", "milestones"] = Key(
        "exponential",
        description="Decay after the warm-up (default: exponential); exponential is "
        "decay_rate^(step / decay_steps), cosine falls to 0, milestones multiplies "
        "by decay_rate at each milestone.",
    )
    warmup_steps: int = Key(3750, ge=0)
    warmup_start: float = Key(
        0.0,
        ge=0,
        le=1,
        description="Fraction of the learning rate at which the warm-up starts "
        "(default: 0).",
    )
    decay_rate: float = Key(0.01, gt=0, le=1)
    decay_steps: int = Key(4_000_000, ge=1)
    milestones: tuple[int, ...] = Key(
        (), description="Steps of the schedule milestones, in ascending order."
    )


class LossConfig(ClosedModel):
    """L0: weights times MAE(E), the force error of free atoms, and that of virials."""

    earlier_keys: ClassVar[Mapping[str, str]] = {
        "force_error": "force_loss",
        "teacher_labels": "pseudo_label_weight",
    }

    energy_weight: float = Key(1.0, ge=0)
    force_weight: float = Key(100.0, ge=0)
    virial_weight: float | None = Key(
        None,
        ge=0,
        description="Weight of the virial error per atom in L0 and vanilla1 (default: "
        "10 if the training split has virials and the student's forces are the "
        "gradient of its energy; else 0).",
    )
    force_loss: Literal["l2", "mae"] = Key(
        "l2",
        description="Force error in the loss (default: l2); l2 is the mean of "
        "|dF|, mae is the mean over components.",
    )
    pseudo_label_weight: float | None = Key(
        None,
        ge=0,
        description="Weight of pseudo-labels in L0: the teacher's energy and forces "
        "replace missing reference labels (default: 1 if a training split is "
        "unlabelled by its spec, with labels: none, generate or rattle; else 0, no "
        "pseudo-labels).",
    )


class JacobianConfig(ClosedModel):
    """Choice and differences of the columns of the strategy ``jacobian``."""

    fraction: float = Key(
        0.5,
        gt=0,
        le=1,
        description="Share of the structures of a batch of which a column is compared "
        "(default: 0.5).",
    )
    columns: int | None = Key(
        None,
        ge=1,
        description="Number of stored columns to use (default: all).",
    )
    step: float = Key(
        0.005,
        ge=1e-4,
        le=0.1,
        description="Displacement of an atom for the student's column, in Å "
        "(default: 0.005).",
    )
    difference: Literal["one_sided", "central"] = Key(
        "one_sided",
        description="Difference of the student's forces (default: one_sided, with one "
        "more graph for each column); central takes two graphs.",
    )


class LambdaSchedule(ClosedModel):
    """Factor of all distillation weights as a function of the step.

    The kind ``fade`` has no other keys.
    """

    kind: Literal["constant", "linear", "cosine", "fade"] = Key(
        "constant",
        description="Shape of the change from start to end (default: constant, "
        "the factor stays at start). With fade, terms on features fall linearly from "
        "1 to 0 at half of the steps, and the other terms keep their weights.",
    )
    start: float = Key(1.0, ge=0)
    end: float = Key(0.0, ge=0)
    first_step: int = Key(
        0,
        ge=0,
        description="Step at which the change begins; the factor is start before "
        "(default: 0).",
    )
    steps: int | None = Key(
        None,
        ge=1,
        description="Number of steps of the change (default: up to the end of "
        "training).",
    )


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
    jacobian: float = Key(50.0, ge=0)
    weights: dict[str, Annotated[float, Key(ge=0)]] = Key(
        default_factory=dict,
        description="weight of a term by the name of its strategy, built in or plug-in",
    )
    schedule: LambdaSchedule = LambdaSchedule()
    target_ratio: float | None = Key(
        None,
        gt=0,
        description="Ratio of all weighted distillation terms to L0, held by a "
        "common factor; the weights then only set the shares of the terms (default: "
        "no common factor).",
    )

    @field_validator("schedule", mode="before")
    @classmethod
    def _kind_alone(cls, value: object) -> object:
        """Read ``schedule: fade`` as the kind of the schedule."""
        return {"kind": value} if isinstance(value, str) else value

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

    @field_validator("schedule")
    @classmethod
    def _fade_alone(cls, value: LambdaSchedule) -> LambdaSchedule:
        others = sorted(value.model_fields_set - {"kind"})
        document = value.model_dump()
        changed = [k for k in others if document[k] != LambdaSchedule().model_dump()[k]]
        if value.kind == "fade" and changed:
            raise ValueError(f"kind fade has no key {changed[0]}; remove it")
        return value

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
