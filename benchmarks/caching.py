"""Stage one ÷ the teacher's forward passes inside it, and bytes and rates per sample.

    python benchmarks/caching.py cache_specs/demo.yaml [--set splits.train.limit=500]

Wall time of a whole build (planning, graphs, forward, copies, checksums, writing) over
that of its forward passes; both in one run, so other load hits both.
"""

import tempfile
import time
from pathlib import Path

import click
import torch

from pipeline.build.build import create_or_match, make_build_plan
from pipeline.build.fill import fill_blocks
from pipeline.build.worker import FillOptions
from pipeline.spec.cache_spec import load_spec
from pipeline.store.describe import describe_store
from pipeline.store.writer import StoreWriter


class ForwardTime:
    """Adds up the seconds that a network spends in its forward passes."""

    def __init__(self, network: torch.nn.Module) -> None:
        self.seconds = 0.0
        self._started = 0.0
        network.register_forward_pre_hook(self._start)
        network.register_forward_hook(self._stop)

    def _start(self, *_: object) -> None:
        self._started = time.perf_counter()

    def _stop(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._started


@click.command()
@click.argument("spec", type=click.Path(path_type=Path))
@click.option("--set", "overrides", multiple=True)
@click.option("--threads", default=1, show_default=True)
def main(spec: Path, overrides: tuple[str, ...], threads: int) -> None:
    """Build the store of SPEC in a temporary folder and take the times."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store.zarr"
        chosen = load_spec(spec, (*overrides, f"store.path={store}"))
        begin = time.perf_counter()
        job = make_build_plan(chosen)
        create_or_match(job, store)
        planned = time.perf_counter()
        teacher = job.source.teacher
        assert teacher is not None, "the spec needs a teacher"
        forward = ForwardTime(teacher.potential.loaded.model)
        writer = StoreWriter(store)
        filled: list[int] = []
        fill_blocks(
            job.source,
            writer,
            FillOptions(),
            lambda _, samples, left: filled.append(samples),
        )
        writer.seal()
        done = time.perf_counter()
        fill = done - planned
        click.echo(
            f"{sum(filled)} samples, {threads} thread(s), planning and first look "
            f"{planned - begin:.1f} s, filling {fill:.1f} s"
        )
        click.echo(f"filling ÷ forward passes: {fill / forward.seconds:.3f}")
        click.echo(
            f"whole build ÷ forward passes: {(done - begin) / forward.seconds:.3f}"
        )
        for name, part in describe_store(store)["splits"].items():
            click.echo(
                f"split {name}, {part['atoms'] / part['samples']:.1f} atoms each"
            )
            for path, field in part["fields"].items():
                click.echo(f"  {path:34}{field['bytes_per_sample']:12.1f} B/sample")


if __name__ == "__main__":
    main()
