"""Which runs can stand in one table: equal store, samples, training and start."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from kd_train.report.grouping import is_plain, row_settings
from kd_train.report.runs import FinishedRun, LeftOut
from pipeline.errors import SpecError


@dataclass(frozen=True)
class Misfit:
    """A run that cannot stand in one table with ``other``, and what forbids it."""

    run: FinishedRun
    other: FinishedRun
    reason: str

    def refusal(self) -> SpecError:
        """The misfit as an error."""
        return SpecError(
            f"{self.run.folder} cannot be compared with {self.other.folder}: "
            f"{self.reason}; leave one of them out or report them separately."
        )

    def listed(self) -> LeftOut:
        """The misfit as one of the runs that are not in the table."""
        summary = self.run.summary
        what = f"{summary.student}, {summary.strategy}, seed {summary.seed}"
        return LeftOut(
            self.run.folder, what, f"unlike {self.other.folder}: {self.reason}"
        )


@dataclass(frozen=True)
class _Demand:
    """``value`` must be equal in all runs of a ``group``; ``words`` where it is not."""

    group: Callable[[FinishedRun], Hashable]
    value: Callable[[FinishedRun], str]
    words: str


# The words are filled with the values of a run and of the other, and their seed.
_DEMANDS = (
    # The teacher's row is the same for all students, and so is its data.
    _Demand(
        lambda run: "all",
        lambda run: run.summary.fingerprint,
        "different stores (fingerprints {:.12}… and {:.12}…)",
    ),
    _Demand(
        lambda run: "all",
        lambda run: run.summary.val_split,
        "metrics of different splits, test_split or else val_split ({} and {})",
    ),
    # Learning curves share their axes.
    _Demand(
        lambda run: "all",
        lambda run: str(run.settings["val_split"]),
        "different val_split ({} and {})",
    ),
    _Demand(
        lambda run: run.summary.student,
        lambda run: str(run.summary.steps),
        "different steps ({} and {})",
    ),
    _Demand(
        lambda run: run.summary.student,
        lambda run: run.batch,
        "different batches in a step ({} and {}: batch_size or batch_atoms, times "
        "accumulate, times processes)",
    ),
    _Demand(
        lambda run: (run.summary.student, run.summary.seed),
        lambda run: run.header.initial_weights,
        "different initial weights ({:.12}… and {:.12}…) though both have seed {seed}, "
        "so their hyperparameters or versions are not the same",
    ),
)


def comparable(runs: Sequence[FinishedRun]) -> tuple[list[FinishedRun], list[Misfit]]:
    """Runs that can stand in one table, and those that do not fit to them.

    What most runs have decides; of equally many, what a plain student has.
    """
    kept, unlike = list(runs), []
    for demand in _DEMANDS:
        kept, others = _alike(kept, demand)
        unlike += [(run, demand) for run in others]
    kept, twice = _once_each(kept)
    return kept, [*(_misfit(run, demand, kept) for run, demand in unlike), *twice]


def _alike(
    runs: Sequence[FinishedRun], demand: _Demand
) -> tuple[list[FinishedRun], list[FinishedRun]]:
    """Runs with the values of their groups, and the others."""
    groups: dict[Hashable, dict[str, list[FinishedRun]]] = {}
    for run in runs:
        group = groups.setdefault(demand.group(run), {})
        group.setdefault(demand.value(run), []).append(run)
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
        fits = demand.value(run) == values[demand.group(run)]
        (kept if fits else others).append(run)
    return kept, others


def _misfit(run: FinishedRun, demand: _Demand, kept: Sequence[FinishedRun]) -> Misfit:
    """``run`` against the first of its group that is ``kept``, which some always is."""
    other = next(one for one in kept if demand.group(one) == demand.group(run))
    values = demand.value(run), demand.value(other)
    return Misfit(run, other, demand.words.format(*values, seed=run.summary.seed))


def _once_each(
    runs: Sequence[FinishedRun],
) -> tuple[list[FinishedRun], list[Misfit]]:
    """The first of every seed of every row, and those that are there again."""
    kept: list[FinishedRun] = []
    misfits = []
    places = [(row_settings(run), run.summary.seed) for run in runs]
    for run, place in zip(runs, places, strict=True):
        first = runs[places.index(place)]
        if first is run:
            kept.append(run)
            continue
        summary = run.summary
        reason = (
            f"both are {summary.student} with strategy {summary.strategy} and seed "
            f"{summary.seed}, in equal settings"
        )
        misfits.append(Misfit(run, first, reason))
    return kept, misfits
