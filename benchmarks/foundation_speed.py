"""The teacher's pass beside the potential's own ASE calculator, in turns.

    python benchmarks/foundation_speed.py SPEC --samples 32 --batches 1,64,512,2048

Takes the first split of SPEC. Each round runs the ASE calculator over all samples one
at a time (energy and forces), then our pass with every limit of atoms per batch
(energy, forces and all fields), and prints the medians of samples per second and of
the ratio within a round. Both make their own graphs; nothing is written. On a CPU,
seconds are those that the process had the processor, on a GPU those of the clock.
"""

import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ase
import click
import numpy as np
import torch

from pipeline.build.inputs import BuildInputs
from pipeline.spec.cache_spec import load_spec
from pipeline.structure import Sample
from pipeline.teachers.runner import TeacherRunner


def ase_calculator(model: str, device: str) -> Any:
    if model == "sevennet":
        from sevenn.calculator import SevenNetCalculator

        return SevenNetCalculator("7net-0", device=device)
    if model == "chgnet":
        from chgnet.model.dynamics import CHGNetCalculator

        return CHGNetCalculator(use_device=device)
    raise click.UsageError(f"{model} has no calculator here; take sevennet or chgnet.")


def one_at_a_time(calculator: Any, samples: Sequence[Sample], periodic: bool) -> None:
    for sample in samples:
        structure = sample.structure
        atoms = ase.Atoms(
            numbers=structure.atomic_numbers,
            positions=structure.positions,
            cell=structure.cell,
            # CHGNet reads periodic structures only; the box keeps images apart.
            pbc=structure.pbc | periodic,
        )
        atoms.calc = calculator
        atoms.get_potential_energy()
        atoms.get_forces()


def seconds(work: Callable[[], object], device: str) -> float:
    clock = time.process_time if device == "cpu" else time.perf_counter
    begin = clock()
    work()
    return clock() - begin


@click.command()
@click.argument("spec", type=click.Path(exists=True, path_type=Path))
@click.option("--samples", default=32, show_default=True)
@click.option("--batches", default="1,64,512,2048", show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--set", "overrides", multiple=True)
def main(
    spec: Path,
    samples: int,
    batches: str,
    rounds: int,
    threads: int,
    device: str,
    overrides: tuple[str, ...],
) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(threads)
    chosen = load_spec(spec, overrides)
    source = BuildInputs.open(chosen, device)
    teacher = source.teacher
    assert teacher is not None, "the spec needs a teacher"
    split, dataset = next(iter(source.datasets.items()))
    places = np.linspace(0, len(dataset) - 1, min(samples, len(dataset)), dtype=int)
    taken = [dataset[int(place)] for place in places]
    fields = source.fields(split)
    passes = {}
    for limit in batches.split(","):
        changed = teacher.spec.model_copy(update={"batch_atoms": int(limit)})
        passes[limit] = TeacherRunner(teacher.potential, changed, teacher.device)
    model = teacher.spec.model
    calculator = ase_calculator(model, device)
    atoms = [len(sample.structure) for sample in taken]
    click.echo(f"{model}, {len(taken)} samples of {min(atoms)}-{max(atoms)} atoms")

    def run_ase() -> None:
        one_at_a_time(calculator, taken, model == "chgnet")

    # Everything once, so that nobody pays for compilation.
    for one in passes.values():
        one.predict(taken, fields)
    run_ase()
    times: dict[str, list[float]] = {"ase": [], **{limit: [] for limit in passes}}
    for _ in range(rounds):
        times["ase"].append(seconds(run_ase, device))
        for limit, one in passes.items():
            work = partial(one.predict, taken, fields)
            times[limit].append(seconds(work, device))
    for name, found in times.items():
        rate = len(taken) / np.median(found)
        ratio = np.median(np.array(times["ase"]) / np.array(found))
        label = "ASE, one at a time" if name == "ase" else f"pass, {name} atoms"
        click.echo(f"{label:24} {rate:8.2f} samples/s  {ratio:6.2f} x")


if __name__ == "__main__":
    main()
