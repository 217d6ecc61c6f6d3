"""Runs in the rows of a comparison."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kd_train.config.strategy_names import STRATEGIES
from kd_train.report.documents import Metrics, Training
from kd_train.report.runs import FinishedRun, format_number

# Settings that may differ between a run and its baseline, besides distillation,
# the last of which changes no number.
_FREE = (
    "strategy",
    "seed",
    "train_split",
    "loss.pseudo_label_weight",
    "loader_threads",
)
# Settings that count together, with the number of processes: the batch of a step.
_BATCH = ("batch_size", "batch_atoms", "accumulate_steps")


@dataclass(frozen=True)
class Variant:
    """Runs of one row: alike in all settings but the seed, which ascends.

    ``settings`` names what distinguishes the row in its strategy: ``λ=100``.
    """

    strategy: str
    settings: str
    runs: tuple[FinishedRun, ...]

    @property
    def label(self) -> str:
        """Strategy and settings, such as ``v2v λ=100``."""
        return f"{self.strategy} {self.settings}".strip()

    @property
    def is_plain(self) -> bool:
        """Whether this is a baseline: it learns from reference labels alone."""
        return is_plain(self.runs[0])

    @property
    def training(self) -> Training | None:
        """What the runs were trained on, None if their folders do not record it."""
        found = (run.summary.training for run in self.runs)
        return next((one for one in found if one is not None), None)


@dataclass(frozen=True)
class Cohort:
    """All runs of one student: baselines first, then strategies, weights ascending."""

    student: str
    variants: tuple[Variant, ...]

    @property
    def runs(self) -> tuple[FinishedRun, ...]:
        """Runs of all variants, in their order."""
        return tuple(run for variant in self.variants for run in variant.runs)

    @property
    def teacher(self) -> Metrics | None:
        """Metrics of the stored teacher, None if the store has none."""
        return self.variants[0].runs[0].summary.teacher_metrics

    @property
    def plain(self) -> tuple[FinishedRun, ...]:
        """The baselines."""
        return tuple(run for run in self.runs if is_plain(run))

    def baseline_of(self, run: FinishedRun) -> FinishedRun | None:
        """Find the baseline with the seed and settings of ``run``, except distillation.

        Its training splits are those of ``run`` that have reference labels. If there is
        no such baseline, it has some of them, and is the only one with so few.
        """
        seed, settings = run.summary.seed, _bound(run)
        found = {
            _splits(one): one
            for one in self.plain
            if one.summary.seed == seed and _bound(one) == settings
        }
        if (labelled := _labelled_splits(run)) in found:
            return found[labelled]
        within = [splits for splits in found if splits < labelled]
        fewest = min(map(len, within), default=0)
        within = [splits for splits in within if len(splits) == fewest]
        return found[within[0]] if len(within) == 1 else None


def is_plain(run: FinishedRun) -> bool:
    """Return whether ``run`` used nothing of the teacher: no terms, no structures.

    A folder of an earlier version does not record which splits have labels, so all of
    them count as labelled.
    """
    training = run.summary.training
    if run.strategies:
        return False
    if training is None:
        return not run.settings["loss.pseudo_label_weight"]
    return training.is_reference_only


def _splits(run: FinishedRun) -> frozenset[str]:
    return frozenset(str(run.settings["train_split"]).split("+"))


def _labelled_splits(run: FinishedRun) -> frozenset[str]:
    """Return the training splits of ``run`` that have labels; all, if not known."""
    training = run.summary.training
    return _splits(run) if training is None else frozenset(training.labelled_splits)


def make_cohorts(runs: Sequence[FinishedRun]) -> list[Cohort]:
    """Group comparable runs by student, in order of first appearance."""
    students = dict.fromkeys(run.summary.student for run in runs)
    return [
        _cohort(student, [run for run in runs if run.summary.student == student])
        for student in students
    ]


def row_settings(run: FinishedRun) -> tuple[str, str, dict[str, Any]]:
    """Return student, strategy and labelled settings, which are equal within a row."""
    labels = _lambdas(run) | _choices(run)
    return run.summary.student, run.summary.strategy, labels


def _cohort(student: str, members: list[FinishedRun]) -> Cohort:
    choices = [_choices(run) for run in members]
    weights: dict[str, list[dict[str, Any]]] = {}
    for run in members:
        weights.setdefault(run.summary.strategy, []).append(_lambdas(run))
    rows: dict[tuple[Any, ...], list[FinishedRun]] = {}
    for run in sorted(members, key=lambda run: run.summary.seed):
        labels = _select_differing(_lambdas(run), weights[run.summary.strategy])
        labels |= _select_differing(_choices(run), choices)
        order = tuple(_sortable(value) for value in labels.values())
        key = (_rank(run.summary.strategy), order, _words(labels))
        rows.setdefault(key, []).append(run)
    variants = [
        Variant(rows[key][0].summary.strategy, key[2], tuple(rows[key]))
        for key in sorted(rows)
    ]
    return Cohort(student, tuple(variants))


def _lambdas(run: FinishedRun) -> dict[str, Any]:
    """Return the distillation weights in use, by the words of a label."""
    several = len(run.strategies) > 1
    return {
        f"λ({name})=" if several else "λ=": run.weight(name) for name in run.strategies
    }


def _choices(run: FinishedRun) -> dict[str, Any]:
    """Return all other settings by the words of a label, None for hidden ones."""
    settings = run.settings
    chosen: dict[str, Any] = {}
    if run.strategies:
        chosen["target_ratio="] = settings["distill.target_ratio"]
        chosen["λ schedule "] = _schedule(settings)
    chosen["pseudo_label_weight="] = _chosen_pseudo_weight(run)
    chosen["on "] = settings["train_split"]
    for key, value in _bound(run).items():
        chosen[f"{key}="] = "none" if value is None else value
    return chosen


def _chosen_pseudo_weight(run: FinishedRun) -> float | None:
    """Return the weight of pseudo-labels, None if it is the default of the splits."""
    weight: float = run.settings["loss.pseudo_label_weight"] or 0.0
    needed = run.summary.training is not None and _labelled_splits(run) != _splits(run)
    return None if weight == float(needed) else weight


def _schedule(settings: dict[str, Any]) -> str | None:
    """Describe the schedule of distillation weights, None if the factor is always 1."""
    kind, start, end, first, steps = (
        settings[f"distill.schedule.{key}"]
        for key in ("kind", "start", "end", "first_step", "steps")
    )
    if kind == "fade":
        return kind
    if kind == "constant":
        return None if start == 1 else f"×{format_number(start)}"
    since = f" from step {format_number(first)}" if first else ""
    length = "" if steps is None else f" within {format_number(steps)}"
    return f"{kind} {format_number(start)}→{format_number(end)}{since}{length}"


def _select_differing(
    own: dict[str, Any], all_runs: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return the ``own`` settings that differ in another run."""
    return {
        key: value
        for key, value in own.items()
        if any(other.get(key, value) != value for other in all_runs)
    }


def _words(labels: dict[str, Any]) -> str:
    parts = [f"{key}{format_number(v)}" for key, v in labels.items() if v is not None]
    return " ".join(parts)


def _sortable(value: Any) -> tuple[int, float, str]:
    """Return a sort key of ``value``: None first, then numbers, then words."""
    if isinstance(value, int | float):
        return 1, value, ""
    return (0, 0.0, "") if value is None else (2, 0.0, str(value))


def _bound(run: FinishedRun) -> dict[str, Any]:
    """Return the settings that a run must share with its baseline."""
    bound = {
        key: value
        for key, value in run.settings.items()
        if key not in (*_FREE, *_BATCH) and not key.startswith("distill.")
    }
    return bound | {"batch": run.batch}


def _rank(strategy: str) -> tuple[int, int, str]:
    """Return a sort key: single strategies in documented order, then joined ones."""
    parts = strategy.split("+")
    known = STRATEGIES.names()
    rank = known.index(parts[0]) if parts[0] in known else len(known)
    return len(parts), rank, strategy
