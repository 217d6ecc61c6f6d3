"""Equal wall time: plain student, distilled from the cache, distilled from the teacher.

    python benchmarks/live_teacher.py caches/demo.zarr OUT --minutes 10 \
        --teacher cache_specs/demo/gemnet_teacher.safetensors \
        --config cache_specs/demo/student.yaml --student painn-small-demo

The three take turns of a few seconds in one process, so that whatever else the machine
does hits all alike. Only time inside a turn counts: batches (made in the turn, graphs
memorised after their first use), the teacher's forward pass where it is live, forward,
backward, optimiser, moving average. Validation is not counted. Each one's learning rate
falls with the share of its time that is spent, so all have finished their schedule when
time is up. Writes curves.csv, curves.png and table.txt.
"""

import csv
import io
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor
from torch_geometric.data import Data

from kd_train.config.train_config import load_config
from kd_train.loader.data import CachedSamples
from kd_train.loader.prefetch import move_to_device
from kd_train.loader.sampler import Positions, SamplerConfig, training_batches
from kd_train.trainer.trainer import Trainer
from pipeline.files.atomic import write_atomically
from pipeline.models.checkpoint import LoadedModel, load_checkpoint
from pipeline.parallel.device_choice import choose_device
from pipeline.store.reader import FeatureStore

# Learning rates are functions of the step; here so many stand for the whole time.
SCHEDULE_STEPS = 10_000
WARMUP_SHARE = 0.05
POINTS = 20
BASELINE, CACHED, LIVE = "baseline", "from cache", "teacher live"
COLORS = {BASELINE: "#4d4d4d", CACHED: "#0072b2", LIVE: "#d55e00"}
METRICS = {
    "forces_mae": "force MAE [meV/Å]",
    "energy_mae": "energy MAE [meV]",
    "forces_cos": "force cos",
    "efwt": "EFwT [%]",
}


@dataclass
class Contender:
    """A run with its batches, the seconds it has used, and what came of them."""

    run: Trainer
    make: Callable[[Positions], Data]
    draws: Iterator[Positions]
    steps: list[float] = field(default_factory=list)  # seconds of each
    turns: list[float] = field(default_factory=list)  # median step of each turn
    curve: list[dict[str, float]] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Training time used so far."""
        return math.fsum(self.steps)

    def take_turn(self, until: float, budget: float) -> None:
        """Train until ``until`` seconds are used; one step at least."""
        first, used = len(self.steps), self.seconds
        while used < until or len(self.steps) == first:
            started = time.perf_counter()
            share = min(used / budget, 1.0)
            self.run.progress.step = int(share * (SCHEDULE_STEPS - 1))
            self.run.step(self.make(next(self.draws)))
            synchronize(self.run.device)
            self.steps.append(time.perf_counter() - started)
            used += self.steps[-1]
        self.turns.append(statistics.median(self.steps[first:]))

    def validate(self) -> None:
        """Add a point to the curve: the averaged weights on the validation split."""
        result = self.run.validator(self.run.averaged_student)
        point = {"seconds": self.seconds, "step": float(len(self.steps))}
        self.curve.append(point | {name: result.metrics[name] for name in METRICS})


def synchronize(device: torch.device) -> None:
    """Wait for a GPU, whose work runs behind."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def teacher_fields(
    teacher: LoadedModel, batch: Data, names: tuple[str, ...]
) -> dict[str, Tensor]:
    """What the store keeps of ``teacher``, computed here and now; eV and Å."""
    with torch.no_grad():
        output = teacher.model(batch)
    scale = teacher.normalizer
    known = {
        "teacher_energy": scale.denormalize_energy(
            output.energy, batch.atomic_numbers, batch.batch
        ),
        "teacher_forces": scale.denormalize_forces(output.forces),
        "per_atom_energy": output.per_atom_energy * scale.energy_std,
    }
    return {n: known[n] if n in known else getattr(output, n) for n in names}


def live_batches(run: Trainer, teacher: LoadedModel) -> Callable[[Positions], Data]:
    """Batches of ``run`` whose features come from ``teacher`` and not from the store.

    The student's half needs structures and labels only; the teacher has its own edges.
    """
    split, student = run.train_samples.split, run.learner.student
    own = CachedSamples(split, student.graph_rule, student.elements)
    network = teacher.model.to(run.device).eval().requires_grad_(False)
    others = CachedSamples(split, network.graph_rule, network.elements)

    def make(positions: Positions) -> Data:
        batch = move_to_device(own.batch(positions), run.device)
        graph = move_to_device(others.batch(positions), run.device)
        for name, value in teacher_fields(teacher, graph, run.learner.fields).items():
            batch[name] = value
        return batch

    return make


def require_equal(
    cached: Data, live: Data, names: tuple[str, ...], loss: Callable[[Data], Tensor]
) -> None:
    """Refuse a teacher that is not the store's: features, then the loss itself.

    Stored halves are rounded by at most 2⁻¹¹ of a number; float32 sums in another order
    differ by far less than 1e-5 of a field's size.
    """
    for name in names:
        wanted, found = cached[name], live[name]
        room = 2**-11 * found.abs() + 1e-5 * found.square().mean().sqrt() + 2**-24
        worst = float(((wanted - found).abs() / room).max())
        if not worst <= 1:
            raise click.ClickException(
                f"{name} of the live teacher is not that of the store: {worst:.3g} "
                "times what rounding to float16 allows."
            )
    before, after = float(loss(cached)), float(loss(live))
    click.echo(f"loss of the first batch: {before:.6g} cached, {after:.6g} live")


def draws(run: Trainer) -> Iterator[Positions]:
    """Positions of the batches of ``run``, without end; the same for one seed."""
    split, config = run.train_samples.split, run.config
    blocks = [split.block_positions(block) for block in range(split.n_blocks)]
    rule = SamplerConfig(
        config.seed, config.batch_size, config.batch_atoms, config.shuffle_blocks
    )
    for draw in training_batches(blocks, split.n_atoms, rule):
        yield draw.positions


def contenders(
    store: FeatureStore,
    teacher: LoadedModel,
    config: Path,
    flags: dict[str, Any],
    strategy: str,
    device: torch.device,
) -> dict[str, Contender]:
    """The three, from equal weights and with the same batches."""
    warmup = int(WARMUP_SHARE * SCHEDULE_STEPS)
    settings = [f"steps={SCHEDULE_STEPS}", f"schedule.warmup_steps={warmup}"]
    settings.append("schedule.kind=cosine")
    runs = {}
    for name in (BASELINE, CACHED, LIVE):
        chosen = flags | {"strategy": "none" if name == BASELINE else strategy}
        resolved = load_config(config, chosen, settings)
        runs[name] = Trainer(resolved, store, Path("unused"), device)
        runs[name].modules.train()
    found = {}
    for name, run in runs.items():
        if name == LIVE:
            make = live_batches(run, teacher)
        else:

            def make(positions: Positions, run: Trainer = run) -> Data:
                return run.on_device(run.train_samples.batch(positions))

        found[name] = Contender(run, make, draws(run))
    cached, live = found[CACHED], found[LIVE]
    if len({run.learner.initial_digest for run in runs.values()}) > 1:
        raise click.ClickException("The students do not start from equal weights.")
    first = next(draws(cached.run))
    require_equal(
        cached.make(first),
        live.make(first),
        cached.run.learner.fields,
        lambda batch: cached.run.losses(batch)["loss"].detach(),
    )
    return found


def compete(found: dict[str, Contender], budget: float, turn: float) -> None:
    """Turns until every contender has used ``budget`` seconds; validate on the way."""
    for contender in found.values():
        contender.validate()
    order = list(found.values())
    turns = math.ceil(budget / turn)
    due = max(1, turns // POINTS)
    for number in range(1, turns + 1):
        for contender in order:
            until = min(number * turn, budget)
            if contender.seconds < until:
                contender.take_turn(until, budget)
        order.append(order.pop(0))  # none is always first
        if number % due == 0 or number == turns:
            for contender in found.values():
                contender.validate()


def table(found: dict[str, Contender]) -> str:
    """Steps, their time, its ratio to the others' of the same turn, and the end."""
    head = ["", "steps", "ms a step", "÷ baseline", "÷ cached", *METRICS.values()]
    rows = [head]
    for name, contender in found.items():
        ratios = []
        for other in (BASELINE, CACHED):
            pairs = zip(contender.turns, found[other].turns, strict=False)
            ratios.append(statistics.median(a / b for a, b in pairs))
        last = contender.curve[-1]
        step = 1e3 * statistics.median(contender.steps)
        cells = [name, str(len(contender.steps)), f"{step:.1f}"]
        cells += [f"{ratio:.3f}" for ratio in ratios]
        rows.append([*cells, *(f"{last[metric]:.3f}" for metric in METRICS)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in rows
    ]
    return "\n".join(lines) + "\n"


def curves_csv(found: dict[str, Contender]) -> bytes:
    """One line for every validation."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["run", "seconds", "step", *METRICS])
    for name, contender in found.items():
        for point in contender.curve:
            writer.writerow([name, *point.values()])
    return buffer.getvalue().encode()


def curves_png(found: dict[str, Contender], title: str) -> bytes:
    """Validation errors against time and against steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 6.0), layout="constrained")
    figure.suptitle(title)
    grid = figure.subplots(2, 2, sharey="row")
    axes_of = {"seconds": "training time [s]", "step": "steps"}
    for row, metric in zip(grid, ("forces_mae", "energy_mae"), strict=True):
        for axes, (key, label) in zip(row, axes_of.items(), strict=True):
            for name, contender in found.items():
                x = np.array([point[key] for point in contender.curve])
                y = np.array([point[metric] for point in contender.curve])
                axes.plot(x, y, color=COLORS[name], label=name)
            axes.set_yscale("log")
            axes.set_xlabel(label)
        row[0].set_ylabel(METRICS[metric])
    grid[0][0].legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


@click.command()
@click.argument("cache")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--teacher", required=True, type=click.Path(path_type=Path))
@click.option("--config", required=True, type=click.Path(path_type=Path))
@click.option("--student", default="painn-small-demo", show_default=True)
@click.option("--strategy", default="v2v+vanilla2", show_default=True)
@click.option(
    "--minutes", default=10.0, show_default=True, help="For each of the three."
)
@click.option("--turn", default=3.0, show_default=True, help="Seconds.")
@click.option("--seed", default=0, show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--device")
def main(
    cache: str,
    out: Path,
    teacher: Path,
    config: Path,
    student: str,
    strategy: str,
    minutes: float,
    turn: float,
    seed: int,
    threads: int,
    device: str | None,
) -> None:
    torch.set_num_threads(threads)
    flags = {"student.preset": student, "seed": seed}
    place = choose_device(device)
    store, loaded = FeatureStore.open(cache), load_checkpoint(teacher)
    found = contenders(store, loaded, config, flags, strategy, place)
    compete(found, 60 * minutes, turn)
    title = f"{student}, {strategy}, {minutes:g} min each, {threads} thread(s)"
    text = f"{title}, {place}, seed {seed}\n{table(found)}"
    write_atomically(out / "curves.csv", curves_csv(found))
    write_atomically(out / "curves.png", curves_png(found, title))
    write_atomically(out / "table.txt", text.encode())
    click.echo(text, nl=False)


if __name__ == "__main__":
    main()
