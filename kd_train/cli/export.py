"""``kd-export``. Heavy imports happen inside the command."""

from pathlib import Path

import click

from pipeline.console import (
    FILE,
    HELP,
    PATH,
    json_option,
    one_sentence_errors,
    print_result,
    version_option,
)
from pipeline.errors import SpecError
from pipeline.parallel.device_choice import choose_device


@click.command(context_settings=HELP)
@version_option
@click.argument("run", type=PATH)
@click.option(
    "--out",
    required=True,
    type=FILE,
    help="File for the program, usually *.pt2, or *.pt of metatomic.",
)
@click.option(
    "--to",
    "kind",
    type=click.Choice(("torch", "metatomic")),
    default="torch",
    show_default=True,
    help="Kind of program: of torch.export, or a model of metatomic, which ASE, i-PI, "
    "LAMMPS and GROMACS read.",
)
@click.option(
    "--device",
    default="cpu",
    show_default=True,
    help="Device that the program runs on: cpu, cuda or cuda:1.",
)
@click.option(
    "--dtype",
    type=click.Choice(("float32", "float64")),
    help="Precision of a model of metatomic. Default: float64.",
)
@json_option
@one_sentence_errors
def export_main(
    run: Path, out: Path, kind: str, device: str, dtype: str | None, as_json: bool
) -> None:
    """Write the student in RUN as a program that torch runs without this package."""
    if kind == "metatomic":
        from kd_train.evaluation.metatomic import export_metatomic

        worst = export_metatomic(run, out, device=device, dtype=dtype or "float64")
    else:
        if dtype is not None:
            raise SpecError("--dtype is for --to metatomic; leave it out.")
        from kd_train.evaluation.export import export_student
        from kd_train.evaluation.load_student import load_student

        worst = export_student(load_student(run, choose_device(device)), out)
    text = (
        f"{out}: largest deviation from the model on batches of other sizes "
        f"{worst['energy']:.2g} eV and {worst['forces']:.2g} eV/Å"
    )
    print_result({"path": str(out), "largest_deviation": worst}, text, as_json)
