"""Memory that a training step takes for each sample, in float32: what fits a GPU.

    python benchmarks/step_memory.py

A step (forward, loss, backward) of each student runs in processes of their own on
batches of slabs of 74 to 83 atoms, two sizes of batch; the difference of their largest
memory, divided by that of their samples, is what a sample takes. It is measured on a
CPU, where kernels need other work space than on a GPU.
"""

import json
import subprocess
import sys

import click
from models import Ours, slabs
from two_million import Memory

BATCHES = {"painn-big-oc20": 32, "painn-small-oc20": 32, "schnet-oc20": 192}
SIZES = (4, 8)


def peak(preset: str, samples: int) -> int:
    """Largest memory, in bytes, of a step of ``samples``."""
    ours = Ours(preset)
    ours.structures["train"] = slabs(samples)
    ours.train()
    memory = Memory(pause=0.002)
    ours.train()
    return memory.largest


@click.command()
@click.option("--step", nargs=2, type=(str, int), help="Only this, as JSON.")
def main(step: tuple[str, int] | None) -> None:
    """Print memory by student, for a sample and for the paper's batch."""
    if step is not None:
        click.echo(json.dumps(peak(*step)))
        return
    click.echo(f"{'student':20}{'MB a sample':>14}{'batch':>8}{'GB':>8}")
    for preset, batch in BATCHES.items():
        few, many = (_in_process(preset, size) for size in SIZES)
        each = (many - few) / (SIZES[1] - SIZES[0])
        click.echo(f"{preset:20}{each / 1e6:14.0f}{batch:8}{each * batch / 1e9:8.1f}")


def _in_process(preset: str, samples: int) -> int:
    command = [sys.executable, __file__, "--step", preset, str(samples)]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)


if __name__ == "__main__":
    main()
