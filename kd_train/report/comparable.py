"""Comparability of runs: equal store, samples, training and initial weights."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from kd_train.report.grouping import is_plain, row_settings
from kd_train.report.runs import FinishedRun, SkippedRun
from pipeline.errors import SpecError


@dataclass(frozen=True)
class Mismatch:
    """A run that is not comparable with ``other``, and the reason."""

    run: FinishedRun
    other: FinishedRun
    reason: str

    def as_error(self) -> SpecError:
        """Return the mismatch as an error."""
        return SpecError(
            f"{self.run.folder} cannot be compared with {self.other.folder}: "
            f"{self.reason}; remove one of the runs or report them separately."
        )

    def as_skipped(self) -> SkippedRun:
        """Return the run as one that the table skips."""
        summary = self.run.summary
        description = f"{summary.student}, {summary.strategy}, seed {summary.seed}"
        return SkippedRun(
            self.run.folder, description, f"unlike {self.other.folder}: {self.reason}"
        )


@dataclass(frozen=True)
class _Requirement:
    """A ``value`` that all runs of a ``group`` must share, and the ``words`` if not."""

    group: Callable[[FinishedRun], Hashable]
    value: Callable[[FinishedRun], str]
    words: str


# The words are filled with the values of a run and of the other, and their seed.
_REQUIREMENTS = (
    # The teacher's row is the same for all students, and so is its data.
    _Requirement(
        lambda run: "all",
        lambda run: run.summary.fingerprint,
        "different stores (fingerprints {:.12}… and {:.12}…)",
    ),
    _Requirement(
        lambda run: "all",
        lambda run: run.summary.val_split,
        "different splits for the metrics, test_split or else val_split ({} and {})",
    ),
    # Learning curves share their axes.
    _Requirement(
        lambda run: "all",
        lambda run: str(run.settings["val_split"]),
        "different val_split ({} and {})",
    ),
    _Requirement(
        lambda run: run.summary.student,
        lambda run: str(run.summary.steps),
        "different steps ({} and {})",
    ),
    _Requirement(
        lambda run: run.summary.student,
        lambda run: run.batch,
        "different batches per step ({} and {}: batch_size or batch_atoms, times "
        "accumulate_steps, times processes)",
    ),
    _Requirement(
        lambda run: (run.summary.student, run.summary.seed),
        lambda run: run.header.initial_weights,
        "different initial weights ({:.12}… and {:.12}…) although both have seed "
        "{seed}, so hyperparameters or versions differ",
    ),
)


def comparable(runs: Sequence[FinishedRun]) -> tuple[list[FinishedRun], list[Mismatch]]:
    """Divide runs into comparable runs and mismatches.

    What most runs have decides; of equally many, what a plain student has.
    """
    kept, unlike = list(runs), []
    for requirement in _REQUIREMENTS:
        kept, others = _alike(kept, requirement)
        unlike += [(run, requirement) for run in others]
    kept, twice = _once_each(kept)
    return kept, [
        *(_make_mismatch(run, requirement, kept) for run, requirement in unlike),
        *twice,
    ]


def _alike(
    runs: Sequence[FinishedRun], requirement: _Requirement
) -> tuple[list[FinishedRun], list[FinishedRun]]:
    """Divide runs by whether they have the value of their group."""
    groups: dict[Hashable, dict[str, list[FinishedRun]]] = {}
    for run in runs:
        group = groups.setdefault(requirement.group(run), {})
        group.setdefault(requirement.value(run), []).append(run)
    # Of equally many, max takes the first.
    values = {
        name: max(
            group,
            key=lambda value: (len(group[value]), any(map(is_plain, group[value]))),
        )
        for name, group in groups.items()
    }
    kept: list[FinishedRun] = []
    others: list[FinishedRun] = []
    for run in runs:
        fits = requirement.value(run) == values[requirement.group(run)]
        (kept if fits else others).append(run)
    return kept, others


def _make_mismatch(
    run: FinishedRun, requirement: _Requirement, kept: Sequence[FinishedRun]
) -> Mismatch:
    """Compare ``run`` with the first run of its group in ``kept``.

    There is always such a run.
    """
    other = next(
        one for one in kept if requirement.group(one) == requirement.group(run)
    )
    values = requirement.value(run), requirement.value(other)
    return Mismatch(
        run, other, requirement.words.format(*values, seed=run.summary.seed)
    )


def _once_each(
    runs: Sequence[FinishedRun],
) -> tuple[list[FinishedRun], list[Mismatch]]:
    """Return the first run of every seed and row, and mismatches for repeated runs."""
    kept: list[FinishedRun] = []
    mismatches = []
    rows = [(row_settings(run), run.summary.seed) for run in runs]
    for run, row in zip(runs, rows, strict=True):
        first = runs[rows.index(row)]
        if first is run:
            kept.append(run)
            continue
        summary = run.summary
        reason = (
            f"both are {summary.student} with strategy {summary.strategy} and seed "
            f"{summary.seed}, with the same settings"
        )
        mismatches.append(Mismatch(run, first, reason))
    return kept, mismatches
