"""A sweep file and its runs, without opening the store or importing torch."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field as Key
from pydantic import field_validator

from kd_train.config.sections import DistillConfig
from kd_train.config.strategy_names import BASELINE, BUILT_IN, term_names
from kd_train.config.train_config import TrainConfig, strategy_name
from pipeline.errors import SpecError
from pipeline.spec.renamed_keys import rename_keys
from pipeline.spec.yaml_model import (
    ClosedModel,
    expand_path,
    nearest,
    read_yaml,
    validate,
)

_VARIANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]*")
_DISTILL = "distill."

Document = dict[str, Any]
Weight = Annotated[float, Key(ge=0)]
Seed = Annotated[int, Key(ge=0)]


class SweepConfig(ClosedModel):
    """Content of a sweep file, with paths relative to its folder."""

    store: str = Key(description="Folder, zip archive or URL of the store.")
    out: str = Key(description="Folder for the runs and their report.")
    config: str | None = Key(
        None, description="Configuration file with the settings of all runs."
    )
    settings: Document = Key(
        default_factory=dict,
        description="Settings that replace settings of the file; keys may be dotted.",
    )
    students: tuple[str, ...] = Key(min_length=1)
    strategies: tuple[str, ...] = Key(min_length=1)
    weights: dict[str, tuple[Weight, ...]] = Key(
        default_factory=dict,
        description="Weights to try, a list for each distillation term.",
    )
    seeds: tuple[Seed, ...] = Key((0,), min_length=1)
    variants: dict[str, Document] = Key(
        default_factory=dict,
        description="Named changes of the settings; each is a variant of the runs.",
    )
    skip_impossible: bool = Key(
        True,
        description="Whether to skip strategies whose features a student lacks "
        "(default: true); false refuses the sweep.",
    )
    threads: int = Key(1, ge=1, description="CPU threads of each run (default: 1).")
    gpus: int = Key(
        0, ge=0, le=1, description="GPUs that each run reserves, 0 or 1 (default: 0)."
    )
    device: str | None = Key(
        None, description="Device of kd-train (default: cpu if gpus is 0, else cuda)."
    )

    def own_baseline(self, variant: str | None) -> bool:
        """Return whether a variant also changes the baseline, not only distillation."""
        changes = {} if variant is None else self.variants[variant]
        return not all(key.startswith(_DISTILL) for key in _leaves(changes))

    @field_validator("strategies", mode="before")
    @classmethod
    def _without_aliases(cls, values: object) -> object:
        if not isinstance(values, list | tuple):
            return values
        return [strategy_name(v) if isinstance(v, str) else v for v in values]

    @field_validator("weights", mode="before")
    @classmethod
    def _terms_without_aliases(cls, weights: object) -> object:
        if not isinstance(weights, dict):
            return weights
        return rename_keys(DistillConfig, weights, "weights")

    @field_validator("students", "strategies", "seeds")
    @classmethod
    def _once_each(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        _require_distinct(values)
        return values

    @field_validator("weights")
    @classmethod
    def _known_terms(
        cls, weights: dict[str, tuple[float, ...]]
    ) -> dict[str, tuple[float, ...]]:
        terms = term_names()
        for name, values in weights.items():
            if name not in terms:
                raise ValueError(f"unknown strategy {name!r}{nearest(name, terms)}")
            if not values:
                raise ValueError(f"{name!r} has no values")
            _require_distinct(values)
        return weights

    @field_validator("variants")
    @classmethod
    def _plain_names(cls, variants: dict[str, Document]) -> dict[str, Document]:
        for name in variants:
            if not _VARIANT.fullmatch(name):
                raise ValueError(
                    f"the name {name!r} may contain only letters, digits, dots and "
                    "hyphens"
                )
        return variants


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep: its place in the grid and its settings for kd-train."""

    name: str
    student: str
    strategy: str
    weights: tuple[tuple[str, float], ...]
    seed: int
    variant: str | None
    document: Document
    config: TrainConfig


@dataclass(frozen=True)
class Sweep:
    """A sweep file with its runs."""

    path: Path
    config: SweepConfig
    store: str
    out: Path
    runs: tuple[SweepRun, ...]

    @property
    def device(self) -> str:
        """For kd-train, which refuses a GPU that is not there."""
        return self.config.device or ("cuda" if self.config.gpus else "cpu")

    def folder(self, name: str) -> Path:
        """Return the folder of the run called ``name``."""
        return self.out / "runs" / name

    def run(self, name: str) -> SweepRun:
        """Return the run called ``name``.

        Raises
        ------
        SpecError
            The sweep has no such run.
        """
        for run in self.runs:
            if run.name == name:
                return run
        known = [run.name for run in self.runs]
        raise SpecError(f"{self.path} has no run {name!r}{nearest(name, known)}.")


def load_sweep(path: Path) -> Sweep:
    """Read the sweep file at ``path`` and expand it.

    Raises
    ------
    SpecError
        A key or a value is wrong, in the file or in what it makes of a run.
    """
    config = _by_todays_names(validate(SweepConfig, read_yaml(path), str(path)), path)
    folder = path.resolve().parent
    shared: Document = {}
    if config.config is not None:
        file = expand_path(config.config, folder, "config")
        shared = rename_keys(TrainConfig, read_yaml(file), str(file))
    store = config.store
    if "://" not in store:
        store = str(expand_path(store, folder, "store"))
    out = expand_path(config.out, folder, "out")
    return Sweep(path, config, store, out, expand_runs(config, shared, str(path)))


def _by_todays_names(config: SweepConfig, path: Path) -> SweepConfig:
    """``config`` whose settings and variants have the names of today."""
    settings = rename_keys(TrainConfig, config.settings, f"{path}: settings")
    variants = {
        name: rename_keys(TrainConfig, changes, f"{path}: variants.{name}")
        for name, changes in config.variants.items()
    }
    return config.model_copy(update={"settings": settings, "variants": variants})


def expand_runs(
    config: SweepConfig, shared: Mapping[str, Any], where: str
) -> tuple[SweepRun, ...]:
    """Expand to all runs: students × strategies × variants × weights × seeds.

    The weights of a term concern the strategies that have it. The baseline has none.
    Variants that change only distillation share one baseline, whose name has no
    variant.

    Raises
    ------
    SpecError
        A setting is wrong, sets what the grid does, or two runs are the same.
    """
    _check_terms(config, where)
    _check_free(config, where)
    base = _merge(shared, config.settings)
    runs = tuple(
        _make_run(config, base, where, student, strategy, variant, weights, seed)
        for student, strategy in product(config.students, config.strategies)
        for variant in _variants(config, strategy)
        for weights in _weights(config, strategy)
        for seed in config.seeds
    )
    _require_different(runs, where)
    return runs


def _make_run(
    config: SweepConfig,
    base: Document,
    where: str,
    student: str,
    strategy: str,
    variant: str | None,
    weights: tuple[tuple[str, float], ...],
    seed: int,
) -> SweepRun:
    changes = {} if variant is None else config.variants[variant]
    chosen: Document = {"student.preset": student, "strategy": strategy, "seed": seed}
    chosen |= {_weight_keys(term)[-1]: value for term, value in weights}
    document = _merge(_merge(base, changes), chosen)
    name = _name(student, strategy, variant, dict(weights), seed)
    train_config = validate(TrainConfig, document, f"{where}, run {name}")
    return SweepRun(
        name, student, strategy, weights, seed, variant, document, train_config
    )


def _weight_keys(term: str) -> tuple[str, ...]:
    """Keys that set the weight of ``term``; built-in strategies have a second one."""
    own = (_DISTILL + term,) if term in BUILT_IN else ()
    return (f"{_DISTILL}weights.{term}", *own)


def _name(
    student: str,
    strategy: str,
    variant: str | None,
    weights: Mapping[str, float],
    seed: int,
) -> str:
    """Name a run, such as ``schnet-n2n=100+vanilla2-balanced-s0``.

    The name does not change when the grid grows.
    """
    parts = [student, _strategy_label(strategy, weights), variant, f"s{seed}"]
    return "-".join(part for part in parts if part is not None)


def _strategy_label(strategy: str, weights: Mapping[str, float]) -> str:
    """Format ``strategy`` with weights of its terms, such as ``n2n=100+vanilla2``."""
    # The shortest digits that read back as the same number.
    return "+".join(
        f"{term}={repr(weights[term]).removesuffix('.0')}" if term in weights else term
        for term in strategy.split("+")
    )


def _variants(config: SweepConfig, strategy: str) -> Sequence[str | None]:
    names = list(config.variants)
    if strategy != BASELINE:
        return names or [None]
    own = [name for name in names if config.own_baseline(name)]
    return own if own and own == names else [None, *own]


def _weights(
    config: SweepConfig, strategy: str
) -> Iterator[tuple[tuple[str, float], ...]]:
    terms = [term for term in strategy.split("+") if term in config.weights]
    for values in product(*(config.weights[term] for term in terms)):
        yield tuple(zip(terms, values, strict=True))


def _merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> Document:
    """Return ``base`` with ``changes``, whose keys may be dotted."""
    document = dict(base)
    for key, value in changes.items():
        first, dot, rest = key.partition(".")
        before = document.get(first)
        below = before if isinstance(before, Mapping) else {}
        if dot:
            document[first] = _merge(below, {rest: value})
        elif isinstance(value, Mapping):
            document[first] = _merge(below, value)
        else:
            document[first] = value
    return document


def _leaves(document: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield dotted names of everything that ``document`` sets."""
    for key, value in document.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _check_terms(config: SweepConfig, where: str) -> None:
    used = {term for strategy in config.strategies for term in strategy.split("+")}
    for term in config.weights:
        if term not in used:
            raise SpecError(
                f"{where}: weights: no strategy of the sweep has the term {term!r}; "
                "add a strategy with it or remove its weights."
            )
    seen: dict[frozenset[str], str] = {}
    for strategy in config.strategies:
        terms = frozenset(strategy.split("+"))
        if terms in seen:
            raise SpecError(
                f"{where}: strategies: {seen[terms]!r} and {strategy!r} are the "
                "same; remove one."
            )
        seen[terms] = strategy


def _check_free(config: SweepConfig, where: str) -> None:
    """Refuse settings of what the grid decides."""
    decided = {"student.preset": "students", "strategy": "strategies", "seed": "seeds"}
    decided |= {key: "weights" for term in config.weights for key in _weight_keys(term)}
    parts = {"settings": config.settings}
    parts |= {f"variants.{name}": part for name, part in config.variants.items()}
    for part, changes in parts.items():
        for key in _leaves(changes):
            if key in decided:
                raise SpecError(
                    f"{where}: {part} sets {key!r}, which {decided[key]} sets for "
                    f"the sweep; remove it from {part}."
                )


def _require_different(runs: Sequence[SweepRun], where: str) -> None:
    seen: dict[str, str] = {}
    for run in runs:
        other = seen.setdefault(run.config.model_dump_json(), run.name)
        if other != run.name:
            raise SpecError(
                f"{where}: {other} and {run.name} are the same run; remove one of "
                "the variants or change its settings."
            )


def _require_distinct(values: Sequence[Any]) -> None:
    for number, value in enumerate(values):
        if value in values[:number]:
            raise ValueError(f"{value!r} occurs twice")
