"""The one table of a sweep, its web pages, and what did not finish."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from kd_train.report import write_report
from kd_train.runs import Cohort, FinishedRun, read_run
from kd_train.sweep.grid import BASELINE, Sweep, SweepRun, weighted
from kd_train.sweep.jobs import Outcome, read_outcome, saved_step
from kd_train.sweep.plan import Plan
from kd_train.tables import csv_table, make_table, text_table
from pipeline.files import write_atomically


def write_sweep_report(chosen: Plan) -> str:
    """Table of the finished runs and a list of the others, for a terminal.

    Writes sweep.txt and sweep.csv in the folder ``report`` of the sweep, and the web
    pages of ``kd-report`` there: one where every strategy ran in one way, else one in a
    folder for every variant and choice of weights.

    Raises
    ------
    SpecError
        A finished run is damaged, or runs cannot be compared.
    """
    sweep, out = chosen.sweep, chosen.sweep.out / "report"
    outcomes = {run.name: read_outcome(sweep, run.name) for run in chosen.runs}
    finished = [run for run in chosen.runs if _is_done(outcomes[run.name])]
    text = f"{_counts(chosen, outcomes.values())}\n"
    if finished:
        table = make_table(_cohorts(sweep, finished))
        text += f"\n{text_table(table)}"
        write_atomically(out / "sweep.csv", csv_table(table).encode())
        for name, runs in _pages(sweep, finished).items():
            write_report([sweep.folder(run.name) for run in runs], out / name)
    text += "".join(
        f"\n{title}:\n" + "".join(f"  {line}\n" for line in lines)
        for title, lines in _others(chosen, outcomes).items()
        if lines
    )
    write_atomically(out / "sweep.txt", text.encode())
    return text


def states(chosen: Plan) -> str:
    """One line for every run: its name, and how far it is or why it is left out."""
    sweep, lines = chosen.sweep, {}
    for run in sweep.runs:
        outcome = read_outcome(sweep, run.name)
        step = saved_step(sweep.folder(run.name))
        if run.name in chosen.skipped:
            state = f"skipped: {chosen.skipped[run.name]}"
        elif outcome is not None:
            state = outcome.state + (
                "" if outcome.error is None else f": {outcome.error}"
            )
        elif step is not None:
            state = f"at step {step}"
        else:
            state = "waiting"
        lines[run.name] = state
    width = max(map(len, lines))
    return "".join(f"{name:{width}}  {state}\n" for name, state in lines.items())


def _is_done(outcome: Outcome | None) -> bool:
    return outcome is not None and outcome.state == "done"


def _counts(chosen: Plan, outcomes: Iterable[Outcome | None]) -> str:
    states = ["waiting" if outcome is None else outcome.state for outcome in outcomes]
    states += ["skipped"] * len(chosen.skipped)
    parts = [
        f"{states.count(state)} {state}"
        for state in ("done", "failed", "waiting", "skipped")
        if state in states
    ]
    return f"{chosen.sweep.path.name}: {len(states)} runs, {', '.join(parts)}"


def _others(chosen: Plan, outcomes: dict[str, Outcome | None]) -> dict[str, list[str]]:
    failed, waiting = [], []
    for name, outcome in outcomes.items():
        if outcome is None:
            waiting.append(name)
        elif outcome.state == "failed":
            step = "" if outcome.step is None else f" after step {outcome.step}"
            failed.append(f"{name}{step}: {outcome.error}")
    skipped = [f"{name}: {reason}" for name, reason in chosen.skipped.items()]
    return {"Failed": failed, "Waiting": waiting, "Skipped": skipped}


def _cohorts(sweep: Sweep, finished: Sequence[SweepRun]) -> list[Cohort]:
    """Runs that share baselines; strategies are named with weights and variant."""
    found: dict[str, list[FinishedRun]] = {_title(sweep, r): [] for r in finished}
    for run in sorted(finished, key=lambda run: run.strategy != BASELINE):
        label = weighted(run.strategy, dict(run.weights))
        if run.variant is not None and not sweep.config.own_baseline(run.variant):
            label += f" {run.variant}"
        known = read_run(sweep.folder(run.name))
        summary = known.summary.model_copy(update={"strategy": label})
        found[_title(sweep, run)].append(replace(known, summary=summary))
    return [Cohort(title, tuple(runs)) for title, runs in found.items()]


def _title(sweep: Sweep, run: SweepRun) -> str:
    own = sweep.config.own_baseline(run.variant)
    return f"{run.student} {run.variant}" if own else run.student


def _pages(sweep: Sweep, finished: Sequence[SweepRun]) -> dict[str, list[SweepRun]]:
    """Runs that one page can compare, with their baselines, by the page's folder."""
    pages: dict[str, list[SweepRun]] = {}
    for run in finished:
        if run.strategy != BASELINE:
            terms = [f"{term}={value:g}" for term, value in run.weights]
            name = "_".join(filter(None, [run.variant, *terms]))
            pages.setdefault(name, []).append(run)
    if len(pages) <= 1:
        return {"": list(finished)}
    plain = [run for run in finished if run.strategy == BASELINE]
    return {
        name: [run for run in plain if _shares_baseline(sweep, run, runs[0])] + runs
        for name, runs in pages.items()
    }


def _shares_baseline(sweep: Sweep, plain: SweepRun, run: SweepRun) -> bool:
    own = sweep.config.own_baseline(run.variant)
    return plain.variant == (run.variant if own else None)
