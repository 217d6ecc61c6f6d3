"""The fingerprint changes with everything that decides numbers and nothing else."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.build.build import make_build_plan
from pipeline.spec.cache_spec import load_spec
from tests.frames import collision_frames, frame, write_frames
from tests.stores import save_teacher, spec_document, write_spec


def _fingerprint(spec: Path, *overrides: str) -> str:
    return str(make_build_plan(load_spec(spec, overrides)).attributes["fingerprint"])


def test_fingerprint_follows_content_and_not_places(
    tmp_path: Path, collisions: Callable[..., Path], teacher_file: Path
) -> None:
    data = collisions(4)
    document = spec_document({"train": data}, tmp_path / "s.zarr", teacher_file)
    spec = write_spec(tmp_path / "s.yaml", document)
    first = _fingerprint(spec)
    packed = write_frames(tmp_path / "elsewhere.extxyz.xz", collision_frames(4))
    copied = tmp_path / "copied.safetensors"
    shutil.copy(teacher_file, copied)
    assert first == _fingerprint(
        spec,
        f"splits.train.path={packed}",
        f"teacher.checkpoint={copied}",
        "store.path=other.zarr",
    )
    other_teacher = save_teacher(tmp_path / "other.safetensors", seed=5)
    texts = collision_frames(4)
    texts[2] = texts[2].replace("energy=-", "energy=-1")
    other_data = write_frames(tmp_path / "other.extxyz", texts)
    changed = {
        _fingerprint(spec, change)
        for change in (
            f"teacher.checkpoint={other_teacher}",
            f"splits.train.path={other_data}",
            "splits.train.limit=3",
            "splits.train.features=false",
            "splits.train.reference_energies=none",
            "features.node_features.dtype=float16",
            "store.seed=1",
            "store.rows_per_block=2048",
        )
    }
    assert len(changed) == 8
    assert first not in changed


@pytest.mark.parametrize(
    ("name", "columns", "flags"),
    [
        ("fixed", {"fixed": ("I", [1, 0])}, "T T F"),
        ("tags", {"tags": ("I", [0, 2])}, "T T F"),
        ("pbc", {}, "T T T"),
    ],
)
def test_every_part_of_a_structure_is_in_the_fingerprint(
    name: str, columns: dict[str, Any], flags: str, tmp_path: Path
) -> None:
    """Periodic flags change the graph and so the features; the others the losses."""

    def fingerprint(columns: dict[str, Any], flags: str) -> str:
        header = f'pbc="{flags}" Lattice="4 0 0 0 4 0 0 0 4"'
        places = [[0, 0, 0], [1, 0, 0]]
        text = frame("a", ["H", "O"], places, header=header, columns=columns)
        data = write_frames(tmp_path / "d.extxyz", [text])
        document = spec_document({"train": data}, tmp_path / "s.zarr")
        return _fingerprint(write_spec(tmp_path / "s.yaml", document))

    assert fingerprint(columns, flags) != fingerprint({}, "T T F"), name


@pytest.mark.parametrize("part", ["energy", "forces"])
def test_labels_that_change_places_change_the_fingerprint(
    part: str, tmp_path: Path
) -> None:
    """Statistics over the labels stay as they are, so the labels themselves count."""

    def fingerprint(order: tuple[int, int]) -> str:
        frames = []
        for number, other in enumerate(order):
            label = {"energy": number, "forces": number} | {part: other}
            forces = [[1.0 + label["forces"], 0.0, 0.0], [0.0, 2.0, 0.0]]
            places = [[0, 0, 0], [1, 0, 0]]
            energy = -5.0 - label["energy"]
            frames.append(
                frame(f"s{number}", ["H", "O"], places, energy=energy, forces=forces)
            )
        data = write_frames(tmp_path / "d.extxyz", frames)
        document = spec_document({"train": data}, tmp_path / "s.zarr")
        return _fingerprint(write_spec(tmp_path / "s.yaml", document))

    assert fingerprint((0, 1)) != fingerprint((1, 0))
