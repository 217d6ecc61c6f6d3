"""``kd-eval --throughput --engine``. Heavy imports happen inside."""

import json
from dataclasses import dataclass
from pathlib import Path

import click

from pipeline.console import print_result
from pipeline.errors import SpecError
from pipeline.files.atomic import hold_lock, write_atomically

ENGINES = ("ase", "lammps", "openmm")
FILE_NAME = "engine_speed.json"
# For each number, and the step in fs.
MEASURED_SECONDS, TIMESTEP = 2.0, 0.5
# The cell itself and 2 × 2 × 2 cells.
_REPEATS = (1, 2)
# Parameters of kd-eval that --engine takes.
_TAKEN = frozenset(
    {"run", "data", "throughput", "engines", "repeats", "dtype", "out"}
    | {"device", "threads", "any_element", "as_json"}
)


@dataclass(frozen=True)
class EngineOptions:
    """Options of ``kd-eval --engine``: programs, cells along each axis, and place."""

    engines: tuple[str, ...]
    repeats: tuple[int, ...]
    dtype: str | None
    device: str | None
    threads: int | None
    any_element: bool


def evaluate_engines(
    run: Path, structure: str, out: Path | None, options: EngineOptions, as_json: bool
) -> None:
    """Measure dynamics in MD programs, print a table, and write it to ``out``."""
    _refuse_other_options()
    import torch

    from kd_train.dynamics.run import warnings_logged
    from kd_train.dynamics.structures import read_start
    from kd_train.engine_speed import TimedPotential, measure_engines, to_text
    from pipeline.spec.sections import MIN_PAIR_DISTANCE

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    atoms = read_start(Path(structure), 0, MIN_PAIR_DISTANCE)
    cells = sorted(set(options.repeats or _repeats(atoms.pbc.all())))
    chosen = list(dict.fromkeys(options.engines))
    with warnings_logged():
        potential = TimedPotential(
            run,
            device=options.device,
            dtype=options.dtype or "float64",
            any_element=options.any_element,
        )
        speeds = list(
            measure_engines(potential, atoms, chosen, cells, TIMESTEP, MEASURED_SECONDS)
        )
    document = {
        "structure": structure,
        "dtype": str(potential.dtype).removeprefix("torch."),
        "device": str(potential.device),
        "threads": torch.get_num_threads(),
        "speeds": [speed.to_dict() for speed in speeds],
    }
    if out is not None:
        with hold_lock(out):
            text = json.dumps(document, indent=2, sort_keys=True) + "\n"
            write_atomically(out / FILE_NAME, text.encode())
    print_result(document, to_text(speeds, potential), as_json)


def _repeats(periodic: bool) -> tuple[int, ...]:
    return _REPEATS if periodic else (1,)


def _refuse_other_options() -> None:
    context = click.get_current_context()
    if not context.params["engines"]:
        raise SpecError("--repeat and --dtype are for --engine; add --engine.")
    if not context.params["throughput"]:
        raise SpecError("--engine measures speed; add --throughput.")
    for option in context.command.params:
        name = option.name or ""
        source = context.get_parameter_source(name)
        if source is click.core.ParameterSource.COMMANDLINE and name not in _TAKEN:
            raise SpecError(
                f"{option.opts[0]} cannot be combined with --engine, which takes the "
                "first structure of --data; leave one of them out."
            )
