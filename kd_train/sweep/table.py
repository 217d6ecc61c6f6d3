"""The one table of a sweep with its web page, and what did not finish."""

from collections.abc import Iterable, Mapping

from kd_train.report.report import write_report
from kd_train.sweep.jobs import JobResult, read_outcome, saved_step
from kd_train.sweep.plan import Plan
from pipeline.files.atomic import write_atomically


def write_sweep_report(chosen: Plan) -> str:
    """Write the report; return its table and a list of skipped runs.

    Writes all that ``kd-report --partial`` does in the folder ``report`` of the sweep,
    and this text in sweep.txt.

    Raises
    ------
    SpecError
        Runs cannot be compared.
    """
    sweep, out = chosen.sweep, chosen.sweep.out / "report"
    outcomes = {run.name: read_outcome(sweep, run.name) for run in chosen.runs}
    # Results that are there, but of other settings than the file has now.
    refused = {
        name: str(outcome.error)
        for name, outcome in outcomes.items()
        if outcome is not None
        and outcome.state == "failed"
        and (sweep.folder(name) / "metrics.json").exists()
    }
    folders = [sweep.folder(name) for name in outcomes if name not in refused]
    text = f"{_counts(chosen, outcomes.values())}\n"
    if folders:
        text += f"\n{write_report(folders, out, partial=True)}"
    for title, reasons in (("Refused", refused), ("Skipped", chosen.skipped)):
        if reasons:
            lines = (f"  {name}: {reason}\n" for name, reason in reasons.items())
            text += f"\n{title}:\n{''.join(lines)}"
    write_atomically(out / "sweep.txt", text.encode())
    return text


def run_states(chosen: Plan) -> dict[str, str]:
    """Return the state of every run by its name, or why it is skipped."""
    sweep, states = chosen.sweep, {}
    for run in sweep.runs:
        outcome = read_outcome(sweep, run.name)
        step = saved_step(sweep.folder(run.name))
        if run.name in chosen.skipped:
            state = f"skipped: {chosen.skipped[run.name]}"
        elif outcome is not None:
            reason = "" if outcome.error is None else f": {outcome.error}"
            state = outcome.state + reason
        elif step is not None:
            state = f"at step {step}"
        else:
            state = "waiting"
        states[run.name] = state
    return states


def status_lines(states: Mapping[str, str]) -> str:
    """Format the states of runs, a line for each run."""
    width = max(map(len, states))
    return "\n".join(f"{name:{width}}  {state}" for name, state in states.items())


def _counts(chosen: Plan, outcomes: Iterable[JobResult | None]) -> str:
    states = ["waiting" if outcome is None else outcome.state for outcome in outcomes]
    states += ["skipped"] * len(chosen.skipped)
    parts = [
        f"{states.count(state)} {state}"
        for state in ("done", "failed", "waiting", "skipped")
        if state in states
    ]
    return f"{chosen.sweep.path.name}: {len(states)} runs, {', '.join(parts)}"
