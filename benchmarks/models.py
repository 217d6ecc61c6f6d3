"""Time of our models ÷ time of the original ones, forward and training step.

    python benchmarks/models.py --reference PYTHON

PYTHON is the interpreter of an environment with fairchem-core 1.x. It gets our weights,
its outputs are compared with ours once, then both take turns on the same slabs, so that
whatever else the machine does hits both. Each builds its graphs inside the time.
Without it PaiNN is compared with its plain message sum, all edges at once, and the
others are timed alone. The floor is the time that the counted matrix products alone
take at the rate of a large one, measured in the same run.
"""

import json
import statistics
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import click
import numpy as np
import torch
from ase import Atoms
from ase.build import add_adsorbate, fcc111, hcp0001, molecule
from original import timed
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from pipeline.graphs.batch import collate
from pipeline.graphs.neighbors import neighbor_edges
from pipeline.models import messages, painn
from pipeline.models.zoo import PRESETS, build_model
from pipeline.structure import Structure

MODELS = ("painn-big-oc20", "painn-small-oc20", "schnet-oc20", "gemnet-oc-oc20")
SLABS = {"forward": 4, "train": 8}
Times = dict[str, float]


def slabs(count: int) -> list[Structure]:
    """Rattled metal slabs of 74-83 atoms under an adsorbate, the lower layers fixed."""
    kinds: list[tuple[Callable[..., Atoms], str, tuple[int, int, int], Atoms]] = [
        (fcc111, "Cu", (3, 4, 6), molecule("CO")),
        (fcc111, "Pt", (3, 4, 6), molecule("OH")),
        (fcc111, "Ni", (4, 4, 5), molecule("NH2")),
        (hcp0001, "Ru", (3, 4, 6), molecule("CH3")),
    ]
    built = []
    for number in range(count):
        surface, metal, size, adsorbate = kinds[number % len(kinds)]
        slab = surface(metal, size, vacuum=10.0)
        layer = slab.get_tags()  # 1 is the top
        add_adsorbate(slab, adsorbate, 2.0, "ontop")
        tags = np.full(len(slab), 2, np.int8)
        tags[: len(layer)] = layer == 1
        slab.rattle(0.1, seed=number)
        slab.wrap(pbc=(True, True, False))
        fixed = np.zeros(len(slab), bool)
        fixed[: len(layer)] = layer > 2
        built.append(
            Structure(
                slab.numbers.astype(np.uint8),
                # The original computes in single precision from the start.
                slab.positions.astype(np.float32).astype(np.float64),
                slab.cell.array.astype(np.float32).astype(np.float64),
                np.array([True, True, False]),
                tags,
                fixed,
            )
        )
    return built


class Ours:
    """A model of this project, from structures to energies and forces."""

    def __init__(self, preset: str) -> None:
        torch.manual_seed(0)
        self.name, self.hyperparameters = PRESETS[preset]
        self.model = build_model(self.name, self.hyperparameters)
        self.structures = {kind: slabs(count) for kind, count in SLABS.items()}

    def predict(self, kind: str) -> tuple[Tensor, Tensor]:
        """Energies (B,) and forces (N, 3)."""
        rule = self.model.graph_rule
        structures = self.structures[kind]
        batch = collate(structures, [neighbor_edges(s, rule) for s in structures])
        output = self.model(batch)
        assert output.forces is not None  # every preset gives forces
        return output.energy, output.forces

    def forward(self) -> tuple[Tensor, Tensor]:
        """Inference, graph included."""
        self.model.eval()
        with torch.no_grad():
            return self.predict("forward")

    def train(self) -> None:
        """Forward, loss and backward, graph included."""
        self.model.train()
        energy, forces = self.predict("train")
        loss = energy.abs().mean() + torch.linalg.vector_norm(forces, dim=1).mean()
        self.model.zero_grad(set_to_none=True)
        loss.backward()

    def run(self, kind: str) -> Times:
        """Times of one forward pass or training step."""
        return timed(self.forward if kind == "forward" else self.train)


class Plain(Ours):
    """PaiNN with the definition of its message sum in place of blocks of pairs."""

    def run(self, kind: str) -> Times:
        """Times of one forward pass or training step."""
        painn.sum_messages = plain_sum
        try:
            return super().run(kind)
        finally:
            painn.sum_messages = messages.sum_messages


def plain_sum(
    y: Tensor, vec: Tensor | None, weight: Tensor, edges: messages.EdgeTensors
) -> tuple[Tensor, Tensor]:
    """Gather, filter and scatter of all edges at once."""
    pieces = [
        (source, target, edges.basis[rows], sign * edges.direction[rows])
        for rows, source, target, sign in edges.pairs.directions()
    ]
    source, target, basis, direction = map(torch.cat, zip(*pieces, strict=True))
    message = y[source] * (basis @ weight.t())  # (E, 3H)
    parts = message.chunk(2 if vec is None else 3, dim=1)
    vectors = direction[:, :, None] * parts[-1][:, None]  # (E, 3, H)
    if vec is not None:
        vectors = vectors + vec[source] * parts[1][:, None]
    dx = y.new_zeros(len(y), parts[0].shape[1]).index_add(0, target, parts[0])
    dvec = y.new_zeros(len(y), *vectors.shape[1:]).index_add(0, target, vectors)
    return dx, dvec


class Original:
    """The same model of fairchem-core in a process of its own."""

    def __init__(self, ours: Ours, python: str, threads: int, flush: bool) -> None:
        frames = {kind: [*map(frame, ours.structures[kind])] for kind in SLABS}
        hyperparameters = {**ours.model.hyperparameters, **ours.hyperparameters}
        weights = ours.model.state_dict()
        job = {"model": ours.name, "weights": weights, "frames": frames}
        with tempfile.TemporaryDirectory() as folder:
            torch.save({**job, "hyperparameters": hyperparameters}, f"{folder}/job.pt")
            script = Path(__file__).with_name("original.py")
            self.process = subprocess.Popen(
                [python, str(script), folder, str(threads), str(flush)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            self.difference = difference(ours.forward(), self.ask("predict"))

    def ask(self, word: str) -> dict[str, Any]:
        """Answer of the process to one request."""
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None  # both are pipes
        assert stdout is not None
        print(word, file=stdin, flush=True)
        for line in stdout:
            if line.startswith("answer "):
                return json.loads(line.removeprefix("answer "))
        raise click.ClickException("The original failed; its message is above.")

    def run(self, kind: str) -> Times:
        """Times of one forward pass or training step."""
        return self.ask(kind)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()


def frame(structure: Structure) -> dict[str, Any]:
    """One structure under the names of the original."""
    return {
        "pos": torch.from_numpy(structure.positions).float(),
        "cell": torch.from_numpy(structure.cell).float()[None],
        "pbc": torch.from_numpy(structure.pbc)[None],
        "atomic_numbers": torch.from_numpy(structure.atomic_numbers).float(),
        "tags": torch.from_numpy(structure.tags).long(),
        "fixed": torch.from_numpy(structure.fixed).long(),
        "natoms": len(structure),
    }


def difference(ours: tuple[Tensor, Tensor], original: dict[str, Any]) -> float:
    """Largest deviation of energies and forces, relative to their root mean square."""
    largest = 0.0
    for mine, name in zip(ours, ("energy", "forces"), strict=True):
        other = torch.tensor(original[name])
        deviation = (mine - other).abs().max() / other.square().mean().sqrt()
        largest = max(largest, float(deviation))
    return largest


def product_rate() -> float:
    """FLOP per second of processor time in a large product of single precision."""
    left, right = torch.rand(4096, 512), torch.rand(512, 1536)
    best = min(timed(lambda: left @ right)["cpu"] for _ in range(10))
    return 2 * 4096 * 512 * 1536 / best


def count_flops(work: Callable[[], object]) -> float:
    """FLOP of all matrix products in one call."""
    with FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())


def print_profile(ours: Ours) -> None:
    """Operators that take most of the processor's time, with their shares."""
    for kind, work in (("forward", ours.forward), ("train step", ours.train)):
        work()
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            work()
        rows = [(e.key, e.self_cpu_time_total) for e in profiler.key_averages()]
        total = sum(spent for _, spent in rows)
        click.echo(f"{kind}: share of time, operator")
        for key, spent in sorted(rows, key=lambda row: -row[1])[:10]:
            click.echo(f"  {100 * spent / total:5.1f} %  {key}")


def compare(ours: Ours, other: Original | Plain | None, kind: str, rounds: int) -> str:
    """Cells of a table: best times, ratios of best and median, floor."""
    runners = [ours] if other is None else [ours, other]
    for runner in runners:
        runner.run(kind)
    times = [[runner.run(kind) for runner in runners] for _ in range(rounds)]
    best = [min(turn[i]["cpu"] for turn in times) for i in range(len(runners))]
    flops = count_flops(ours.forward if kind == "forward" else ours.train)
    floor = flops / product_rate()
    row = f"{kind:8} {best[0]:8.3f} {floor:8.3f} {flops / 1e9:8.1f}"
    if other is None:
        return row
    cpu = statistics.median(mine["cpu"] / theirs["cpu"] for mine, theirs in times)
    wall = statistics.median(mine["wall"] / theirs["wall"] for mine, theirs in times)
    return f"{row} {best[1]:9.3f} {best[0] / best[1]:7.3f} {cpu:7.3f} {wall:7.3f}"


@click.command()
@click.option("--reference", help="Python of an environment with fairchem-core 1.x.")
@click.option("--model", "models", multiple=True, default=MODELS, show_default=True)
@click.option("--kind", "kinds", multiple=True, default=SLABS, show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--flush", is_flag=True, help="Take subnormal numbers for zero in both.")
@click.option("--profile", "profiled", help="Profile this model instead.")
def main(
    reference: str | None,
    models: tuple[str, ...],
    kinds: tuple[str, ...],
    rounds: int,
    threads: int,
    flush: bool,
    profiled: str | None,
) -> None:
    torch.set_num_threads(threads)
    torch.set_flush_denormal(flush)
    if profiled is not None:
        print_profile(Ours(profiled))
        return
    click.echo(
        f"processor seconds, {threads} thread(s), {SLABS['forward']} slabs forward, "
        f"{SLABS['train']} in a step, best of {rounds}; ratios ours ÷ other"
    )
    click.echo(
        f"{'':8} {'ours':>8} {'floor':>8} {'GFLOP':>8} {'other':>9} {'best':>7} "
        f"{'median':>7} {'wall':>7}"
    )
    for preset in models:
        ours = Ours(preset)
        size = sum(weight.numel() for weight in ours.model.parameters())
        click.echo(f"{preset}, {size} parameters")
        if reference is None:
            plain = Plain(preset) if ours.name == "painn" else None
            for kind in kinds:
                click.echo(compare(ours, plain, kind, rounds))
            continue
        with Original(ours, reference, threads, flush) as original:
            click.echo(f"outputs agree to {original.difference:.0e} of their size")
            for kind in kinds:
                click.echo(compare(ours, original, kind, rounds))


if __name__ == "__main__":
    main()
