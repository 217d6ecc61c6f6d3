"""A student of a foundation potential, with and without the potential's features.

    python benchmarks/foundation.py cache_specs/sevennet_acac.yaml OUT

Writes the structures of SPEC with the potential's energies and forces as labels, builds
the store of those files, and trains the same student with every strategy and seed
(benchmarks/compare.py). Finished parts are kept, so it may be killed and repeated; the
extra of the potential is needed for the first two parts only.
"""

import subprocess
import sys
from pathlib import Path

import click

from pipeline.build.build import build_store
from pipeline.build.label import label_splits
from pipeline.spec.cache_spec import CacheSpec, load_spec


def labelled_spec(spec: Path, overrides: tuple[str, ...], out: Path) -> CacheSpec:
    """SPEC with files of the teacher's own labels, written once, as its splits."""
    chosen = load_spec(spec, (*overrides, f"store.path={out.resolve() / 'store.zarr'}"))
    folder = out.resolve() / "labels"
    files = {name: folder / f"{name}.extxyz" for name in chosen.splits}
    if not all(file.exists() for file in files.values()):
        label_splits(chosen, folder)
    changes = {"format": "extxyz", "offset": 0, "every": 1, "limit": None}
    splits = {
        name: split.model_copy(update=changes | {"path": str(files[name])})
        for name, split in chosen.splits.items()
    }
    return chosen.model_copy(update={"splits": splits})


@click.command()
@click.argument("spec", type=click.Path(exists=True, path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--student", default="painn-small-demo", show_default=True)
@click.option("--strategies", default="none,n2n,v2v,n2n+v2v", show_default=True)
@click.option("--seeds", default="0,1,2", show_default=True)
@click.option("--config", default="cache_specs/demo/student.yaml", show_default=True)
@click.option("--set", "overrides", multiple=True, help="of the spec")
@click.option("--train-set", multiple=True, help="of the student's configuration")
@click.option("--jobs", default=1, show_default=True)
def main(
    spec: Path,
    out: Path,
    student: str,
    strategies: str,
    seeds: str,
    config: str,
    overrides: tuple[str, ...],
    train_set: tuple[str, ...],
    jobs: int,
) -> None:
    store = out / "store.zarr"
    if not store.exists() or not build_is_whole(store):
        build_store(labelled_spec(spec, overrides, out))
    command = [sys.executable, str(Path(__file__).with_name("compare.py"))]
    command += [str(store), str(out / "runs"), "--student", student, "--seeds", seeds]
    command += ["--strategies", strategies, "--config", config, "--jobs", str(jobs)]
    command += [part for change in train_set for part in ("--set", change)]
    subprocess.run(command, check=True)


def build_is_whole(store: Path) -> bool:
    """Whether the store at ``store`` is sealed."""
    from pipeline.store.writer import StoreWriter

    return StoreWriter(store).sealed


if __name__ == "__main__":
    main()
