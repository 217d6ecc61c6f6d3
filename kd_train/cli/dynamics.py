"""``kd-eval --dynamics``. Heavy imports happen inside."""

import logging
import sys
from pathlib import Path

import click

from pipeline.console import CHECK_FAILED, print_result
from pipeline.errors import SpecError
from pipeline.files.atomic import hold_lock
from pipeline.logs import log_to_file

# Parameters of kd-eval that --dynamics takes; the others are of --data.
_TAKEN = frozenset(
    {"run", "dynamics", "out", "device", "threads", "any_element", "as_json"}
)


def default_folder(run: Path, run_folder: Path | None, dynamics: Path) -> Path:
    """Return the folder for results without --out: in that of the run.

    Raises
    ------
    SpecError
        ``run`` is a model file without a run folder.
    """
    if run_folder is None:
        raise SpecError(
            f"{run} is not in a run folder, so --dynamics has no folder for its "
            "results; add --out."
        )
    return run_folder / "dynamics" / dynamics.stem


def evaluate_dynamics(
    run: Path,
    dynamics: Path,
    out: Path,
    device: str | None,
    threads: int | None,
    any_element: bool,
    as_json: bool,
) -> None:
    """Measure, print the results, and exit with 1 if a threshold is exceeded."""
    _refuse_options_of_data()
    from kd_train.dynamics.spec import load_dynamics

    spec = load_dynamics(dynamics)
    import torch

    from kd_train.dynamics.run import run_dynamics

    if threads is not None:
        torch.set_num_threads(threads)
    with hold_lock(out):
        log_to_file(out / "eval.log", logging.WARNING)
        results = run_dynamics(run, spec, out, device, any_element)
    print_result(results.to_dict(), results.to_text(), as_json)
    if results.faults():
        sys.exit(CHECK_FAILED)


def _refuse_options_of_data() -> None:
    context = click.get_current_context()
    for option in context.command.params:
        name = option.name or ""
        source = context.get_parameter_source(name)
        if source is click.core.ParameterSource.COMMANDLINE and name not in _TAKEN:
            raise SpecError(
                f"{option.opts[0]} cannot be combined with --dynamics, whose file "
                "names the structure; leave one of them out."
            )
