"""The report of a sweep, and what did not finish."""

from collections.abc import Iterable

from kd_train.report import write_report
from kd_train.sweep.jobs import Outcome, read_outcome, saved_step
from kd_train.sweep.plan import Plan
from pipeline.files import write_atomically


def write_sweep_report(chosen: Plan) -> str:
    """Report of all runs that ended, and a list of the others, for a terminal.

    Writes what ``kd-report`` does in the folder ``report`` of the sweep, and sweep.txt.

    Raises
    ------
    SpecError
        Runs cannot be compared.
    """
    sweep, out = chosen.sweep, chosen.sweep.out / "report"
    outcomes = {run.name: read_outcome(sweep, run.name) for run in chosen.runs}
    text = f"{_counts(chosen, outcomes.values())}\n"
    ended = [sweep.folder(name) for name, outcome in outcomes.items() if outcome]
    if ended:
        text += f"\n{write_report(ended, out, partial=True)}"
    waiting = [name for name, outcome in outcomes.items() if outcome is None]
    skipped = [f"{name}: {reason}" for name, reason in chosen.skipped.items()]
    for title, lines in {"Waiting": waiting, "Skipped": skipped}.items():
        if lines:
            text += f"\n{title}:\n" + "".join(f"  {line}\n" for line in lines)
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


def _counts(chosen: Plan, outcomes: Iterable[Outcome | None]) -> str:
    states = ["waiting" if outcome is None else outcome.state for outcome in outcomes]
    states += ["skipped"] * len(chosen.skipped)
    parts = [
        f"{states.count(state)} {state}"
        for state in ("done", "failed", "waiting", "skipped")
        if state in states
    ]
    return f"{chosen.sweep.path.name}: {len(states)} runs, {', '.join(parts)}"
