"""Price of a training step: torch operations, native kernels and other checkouts.

    python benchmarks/step_variants.py STORE [--strategy S] [--against CHECKOUT ...]

Every variant is a process of its own and takes the same steps, in turn, so that
whatever else the machine does hits all. CPU seconds of all threads of a process count.
The table has medians, ratios to the first row step by step, and the largest relative
difference of a loss. Writes JSON with ``--json``.
"""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import click

WARM_UP = 8


class Variant:
    """A process that takes steps on request, and what they took."""

    def __init__(self, checkout: Path, arguments: list[str]) -> None:
        worker = Path(__file__).with_name("step_variants_worker.py")
        self._process = subprocess.Popen(
            [sys.executable, str(worker), *arguments],
            env={**os.environ, "PYTHONPATH": str(checkout)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.reads: list[float] = []
        self.steps: list[float] = []
        self.losses: list[float] = []

    def step(self, noted: bool) -> None:
        """Take a step and note its CPU seconds and loss."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        read, step, loss = map(float, self._process.stdout.readline().split())
        if noted:
            self.reads.append(read)
            self.steps.append(step)
        self.losses.append(loss)

    def end(self) -> None:
        """Let the process end."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def measure(variants: dict[str, Variant], rounds: int) -> None:
    """Let all variants take steps in turn, and end them."""
    for number in range(-WARM_UP, rounds):
        for variant in variants.values():
            variant.step(noted=number >= 0)
    for variant in variants.values():
        variant.end()


def compare(one: Variant, first: Variant) -> dict[str, float]:
    """Return milliseconds of a variant, and how it differs from the first variant."""
    steps = zip(one.steps, first.steps, strict=True)
    losses = zip(one.losses, first.losses, strict=True)
    return {
        "read_ms": 1e3 * statistics.median(one.reads),
        "step_ms": 1e3 * statistics.median(one.steps),
        "ratio": statistics.median(a / b for a, b in steps),
        "loss_difference": max(abs(a / b - 1) for a, b in losses),
    }


@click.command()
@click.argument("store", type=click.Path(exists=True))
@click.option("--student", default="painn-small-demo", show_default=True)
@click.option("--strategy", default="none", show_default=True)
@click.option("--batch-size", default=32, show_default=True)
@click.option("--rounds", default=40, show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--against", type=click.Path(path_type=Path), multiple=True)
@click.option("--json", "target", type=click.Path(path_type=Path))
def main(
    store: str,
    student: str,
    strategy: str,
    batch_size: int,
    rounds: int,
    threads: int,
    against: tuple[Path, ...],
    target: Path | None,
) -> None:
    """Measure torch operations and native kernels of this checkout, and others."""
    arguments = [store, student, strategy, str(batch_size), str(threads)]
    own = Path(__file__).resolve().parents[1]
    variants = {str(path): Variant(path, arguments) for path in against}
    variants["torch"] = Variant(own, arguments)
    variants["native"] = Variant(own, [*arguments, "native_kernels=true"])
    measure(variants, rounds)
    first: Variant = next(iter(variants.values()))
    rows: dict[str, dict[str, Any]] = {
        name: compare(one, first) for name, one in variants.items()
    }
    click.echo(f"{'variant':24} {'read':>7} {'step':>7} {'ratio':>7} {'loss':>9}")
    for name, row in rows.items():
        click.echo(
            f"{name[-24:]:24} {row['read_ms']:7.2f} {row['step_ms']:7.2f} "
            f"{row['ratio']:7.3f} {row['loss_difference']:9.1e}"
        )
    if target is not None:
        target.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
