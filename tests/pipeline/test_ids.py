"""``ids:`` of a split: a file names the samples that are read."""

from pathlib import Path
from typing import Any

import ase
import ase.db
import numpy as np
import pytest

from pipeline.build.build import build_store
from pipeline.cli.main import main
from pipeline.cli.workflow import data_files
from pipeline.datasets import open_split
from pipeline.errors import SpecError, StoreError
from pipeline.spec.cache_spec import load_spec
from pipeline.spec.id_list import write_ids
from pipeline.store.reader import FeatureStore
from tests.commands import refusal, run_command
from tests.frames import collision_frames, frame, write_frames
from tests.stores import build, spec_document, write_spec


def _frame(name: str, **keys: Any) -> str:
    header = " ".join(f"{key}={value}" for key, value in keys.items())
    return frame(name, ["H", "H"], [[0, 0, 0], [0.8, 0, 0]], energy=-1.0, header=header)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    frames = [_frame(name, even="FT"[k % 2 == 0]) for k, name in enumerate("abcdef")]
    return write_frames(tmp_path / "data.xyz", frames)


def _spec(data: Path, text: str | None, **changes: Any) -> Path:
    """Spec of a store of ``data`` with a file of ids that has ``text``."""
    section: dict[str, Any] = {"format": "extxyz", "path": str(data)}
    if text is not None:
        (data.parent / "ids.txt").write_text(text)
        section["ids"] = "ids.txt"
    document = spec_document({"train": section | changes}, data.parent / "s.zarr")
    return write_spec(data.parent / "spec.yaml", document)


def _names(spec: Path) -> list[str]:
    dataset = open_split(load_spec(spec).splits["train"])
    names = [dataset[index].sample_id for index in range(len(dataset))]
    assert names == list(dataset.sample_ids)
    return names


@pytest.mark.parametrize(
    ("text", "changes", "expected"),
    [
        ("e\nb\nc\n", {}, "bce"),
        ("\ufeff# chosen by hand\n e\t\r\n\n#b\nc", {}, "ce"),
        ("c\nd", {"offset": 2, "limit": 2}, "cd"),
        ("e\na", {"where": {"even": True}}, "ae"),
        ("e\na", {"where": {"even": True}, "every": 2}, "ae"),
    ],
)
def test_the_split_has_these_samples_in_the_order_of_the_source(
    text: str, changes: dict[str, Any], expected: str, data: Path
) -> None:
    assert "".join(_names(_spec(data, text, **changes))) == expected


def test_copies_are_made_of_the_named_samples(data: Path, teacher_file: Path) -> None:
    (data.parent / "ids.txt").write_text("d\nb\n")
    section = {"format": "extxyz", "path": str(data), "ids": "ids.txt"}
    section["rattle"] = {"copies": 2, "sigma": 0.01}
    document = spec_document({"train": section}, data.parent / "s.zarr", teacher_file)
    spec = write_spec(data.parent / "spec.yaml", document)
    assert _names(spec) == ["b~r0", "b~r1", "d~r0", "d~r1"]


@pytest.mark.parametrize(
    ("text", "changes", "words"),
    [
        ("x\na\ny\n", {}, ["lacks 2 of the 3 ids in ", "ids.txt, the first is 'x'"]),
        ("a\nb\n", {"offset": 1}, ["lacks 1 of the 2 ids", "'a'", "offset"]),
        ("a\nb\na\n", {}, ["splits.train.ids: ", "the id 'a' in lines 1 and 3"]),
        ("# nothing\n\n", {}, ["splits.train.ids: ", "has no id"]),
        (None, {"ids": "absent.txt"}, ["splits.train.ids: ", "--set splits.train.ids"]),
        (None, {"ids": "."}, ["splits.train.ids: ", "cannot be read"]),
        (None, {"ids": ["a", "b"]}, ["splits.train.ids: "]),
    ],
)
def test_wrong_ids_are_refused_in_one_sentence(
    text: str | None, changes: dict[str, Any], words: list[str], data: Path
) -> None:
    said = refusal(main, ["plan", _spec(data, text, **changes)])
    for word in words:
        assert word in said


def test_a_file_that_is_no_text_is_refused(data: Path) -> None:
    spec = _spec(data, "a\n")
    (data.parent / "ids.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SpecError, match="is not text"):
        load_spec(spec)


def test_the_file_counts_by_its_content(data: Path) -> None:
    """It is a part of what a finished store was made from, wherever it lies."""
    spec = _spec(data, "a\nb\n")
    store = build(spec)
    assert {*map(str, store.splits["train"].sample_ids)} == {"a", "b"}
    scan = data.parent / "s.zarr.scan-cache" / "train.scan.npz"
    made = scan.stat().st_mtime_ns
    ids = data.parent / "ids.txt"
    ids.write_text("# in another order\nb\na\n")
    (data.parent / "moved.txt").write_bytes(ids.read_bytes())
    for change in ("store.seed=0", "splits.train.ids=moved.txt"):
        assert build_store(load_spec(spec, [change]))
    assert scan.stat().st_mtime_ns == made
    ids.write_text("b\nc\n")
    with pytest.raises(StoreError, match="was planned for another spec"):
        build_store(load_spec(spec))


def test_the_file_counts_for_formats_that_keep_listings(tmp_path: Path) -> None:
    with ase.db.connect(tmp_path / "data.db") as database:
        for k in range(6):
            atoms = ase.Atoms("H2", [[0, 0, 0], [0.7 + k / 50, 0, 0]])
            database.write(atoms, sample_id="abcdef"[k], data={"energy": -1.0 - k})
    changes = {"format": "ase_db", "energy_key": "data.energy"}
    for text in ("a\nb\n", "b\nf\nc\n"):
        spec = _spec(tmp_path / "data.db", text, **changes)
        chosen = load_spec(spec, [f"store.path={tmp_path / 's.zarr'}"])
        if (tmp_path / "s.zarr").exists():
            (tmp_path / "s.zarr").rename(tmp_path / "earlier.zarr")
        assert build_store(chosen)
        train = FeatureStore.open(tmp_path / "s.zarr").splits["train"]
        assert sorted(map(str, train.sample_ids)) == sorted(text.split())
        energy = train.read(train.positions(["b"]), ["labels/energy"])
        np.testing.assert_array_equal(energy["labels/energy"], [-2.0])


def test_the_file_is_an_input_of_the_workflow(data: Path) -> None:
    found = {Path(file).name for file in data_files(_spec(data, "a\n"), [])}
    assert found == {"data.xyz", "ids.txt"}


def test_chosen_samples_make_a_store(small_store: FeatureStore, tmp_path: Path) -> None:
    """From the choice in a store of features to a store of the labels of the chosen."""
    ids = tmp_path / "ids.txt"
    words = ["--split", "train", "--budget", 12, "--out", ids]
    assert run_command(main, ["select", small_store.path, *words]).exit_code == 0
    source = write_frames(tmp_path / "data.xyz", collision_frames(170))
    store = build(_spec(source, ids.read_text()))
    chosen = store.splits["train"]
    names = ids.read_text().splitlines()
    assert sorted(map(str, chosen.sample_ids)) == sorted(names)
    pool = small_store.splits["train"]
    np.testing.assert_array_equal(
        chosen.checksums[chosen.positions(names)], pool.checksums[pool.positions(names)]
    )


@pytest.mark.parametrize("name", ["#1", " a", "a\nb"])
def test_ids_that_no_line_can_hold_are_not_written(name: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="cannot be a line"):
        write_ids(tmp_path / "ids.txt", ["a", name])
    assert not (tmp_path / "ids.txt").exists()
