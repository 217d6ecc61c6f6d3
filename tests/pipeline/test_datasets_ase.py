"""ASE databases and fairchem's .aselmdb files as datasets."""

import json
import os
import pickle
import sqlite3
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ase.db
import numpy as np
import pytest
from ase.constraints import FixCartesian

from pipeline.datasets import open_dataset
from pipeline.datasets.ase_db import WINDOW
from pipeline.datasets.aselmdb import MAX_ROW_BYTES
from pipeline.errors import DataError
from pipeline.structure import Sample
from tests.pipeline.oc20_files import (
    Slab,
    aselmdb_row,
    atoms_of,
    data_folder,
    packed_json,
    slabs,
    write_lmdb,
)


def _assert_is(sample: Sample, slab: Slab) -> None:
    structure = sample.structure
    assert sample.sample_id == f"{slab.sid}_{slab.fid}"
    assert sample.energy == slab.energy
    assert np.array_equal(sample.forces, slab.forces)
    assert np.array_equal(structure.atomic_numbers, slab.numbers)
    assert np.array_equal(structure.positions, slab.positions)
    assert np.array_equal(structure.cell, slab.cell)
    assert np.array_equal(structure.tags, slab.tags)
    assert np.array_equal(structure.fixed, slab.fixed)
    assert structure.pbc.all()


def _write(path: Path, count: int = 6) -> tuple[str, list[Slab]]:
    """A database of slabs in the format of the path's suffix; returns the format."""
    made = slabs(count)
    if path.suffix == ".aselmdb":
        rows = {str(i + 1): packed_json(aselmdb_row(s)) for i, s in enumerate(made)}
        write_lmdb(path, rows | {"nextid": packed_json(count + 1)})
        return "aselmdb", made
    with ase.db.connect(path) as database:
        for slab in made:
            database.write(atoms_of(slab), data={"sid": slab.sid, "fid": slab.fid})
    return "ase_db", made


SUFFIXES = [".db", ".json", ".aselmdb"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_rows_are_what_was_written(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"d{suffix}"
    format, made = _write(path)
    dataset = open_dataset(format, str(path))
    assert len(dataset) == 6
    assert dataset.n_atoms.tolist() == [len(s.numbers) for s in made]
    for i, slab in enumerate(made):
        _assert_is(dataset[i], slab)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_subsets_pickles_and_threads(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"d{suffix}"
    format, made = _write(path, 9)
    dataset = open_dataset(format, str(path), offset=2, every=3, limit=2)
    assert dataset[0].energy == made[2].energy
    again = pickle.loads(pickle.dumps(dataset))
    assert list(again.sample_ids) == [f"{made[i].sid}_{made[i].fid}" for i in (2, 5)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(again.__getitem__, [0, 1] * 10))
    for i, sample in enumerate(found):
        _assert_is(sample, made[(2, 5)[i % 2]])


def test_reading_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    for suffix in SUFFIXES:
        path = tmp_path / f"d{suffix}"
        format, _ = _write(path, 2)
        before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
        open_dataset(format, str(path))[0]
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize("suffix", [".db", ".json"])
def test_ids_in_rows_and_row_numbers(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"d{suffix}"
    atoms = ase.Atoms("CO", [[0, 0, 0], [0, 0, 1.1]])
    with ase.db.connect(path) as database:
        database.write(atoms)
        database.write(atoms, sample_id="mine")
        database.write(atoms, sid="random31", fid=2)
        database.write(atoms, data={"sid": 9})
        database.write(atoms)
        del database[1]
    dataset = open_dataset("ase_db", str(path))
    assert list(dataset.sample_ids) == ["mine", "31_2", "9", "5"]
    sample = dataset[3]
    assert np.isnan(sample.energy)
    assert np.isnan(sample.forces).all()
    assert sample.structure.tags.tolist() == [2, 2]
    assert not sample.structure.pbc.any()
    assert not sample.structure.cell.any()


def test_long_databases_are_read_through(tmp_path: Path) -> None:
    path = tmp_path / "d.db"
    count = WINDOW + 5
    atoms = [ase.Atoms("H", [[0, 0, i]]) for i in range(3)]
    with ase.db.connect(path, serial=True) as database:
        for i in range(count):
            database.write(atoms[i % 3])
    dataset = open_dataset("ase_db", str(path))
    assert list(dataset.sample_ids) == [str(i + 1) for i in range(count)]
    last = open_dataset("ase_db", str(path), offset=WINDOW - 1, every=2)
    assert list(last.sample_ids) == [str(WINDOW + i) for i in (0, 2, 4)]
    assert last[1].structure.positions[0, 2] == (WINDOW + 1) % 3
    assert len(open_dataset("ase_db", str(path), limit=WINDOW)) == WINDOW


@pytest.mark.parametrize("suffix", [".db", ".json"])
def test_atoms_held_on_all_axes_are_fixed(suffix: str, tmp_path: Path) -> None:
    atoms = ase.Atoms("H4", np.arange(12.0).reshape(4, 3))
    atoms.set_constraint([FixCartesian([1, 2]), FixCartesian([3], mask=(1, 0, 1))])
    path = tmp_path / f"d{suffix}"
    ase.db.connect(path).write(atoms)
    structure = open_dataset("ase_db", str(path))[0].structure
    assert structure.fixed.tolist() == [False, True, True, False]


def test_files_that_are_no_databases(tmp_path: Path) -> None:
    for name, content in (("a.db", b"no database" * 99), ("b.json", b"{broken")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match="cannot be read as an ASE database") as e:
            open_dataset("ase_db", str(tmp_path / name))
        assert str(tmp_path / name) in str(e.value)
        assert "\n" not in str(e.value)
    with pytest.raises(DataError, match="must end in"):
        open_dataset("ase_db", str(tmp_path / "c.xyz"))
    with pytest.raises(DataError, match="does not exist"):
        open_dataset("ase_db", str(tmp_path / "absent.db"))
    assert not (tmp_path / "absent.db").exists()
    ase.db.connect(tmp_path / "none.json").write(ase.Atoms("H"))
    del ase.db.connect(tmp_path / "none.json")[1]
    with pytest.raises(DataError, match="holds no samples"):
        open_dataset("ase_db", str(tmp_path / "none.json"))


def test_damaged_rows_are_named(tmp_path: Path) -> None:
    path = tmp_path / "d.db"
    _write(path, 3)
    dataset = open_dataset("ase_db", str(path))
    connection = sqlite3.connect(path)
    connection.execute("UPDATE systems SET positions = x'00' WHERE id = 2")
    connection.commit()
    connection.close()
    with pytest.raises(DataError, match=r"d\.db: sample 2"):
        dataset[1]


def _rows(path: Path, *rows: Any) -> Path:
    return write_lmdb(path, {str(i + 1): packed_json(r) for i, r in enumerate(rows)})


def test_folders_of_aselmdb_files(tmp_path: Path) -> None:
    made = slabs(5)
    _rows(tmp_path / "data.0001.aselmdb", *map(aselmdb_row, made[3:]))
    _rows(tmp_path / "data.0000.aselmdb", *map(aselmdb_row, made[:3]))
    dataset = open_dataset("aselmdb", str(tmp_path))
    for i, slab in enumerate(made):
        _assert_is(dataset[i], slab)
    bare = [aselmdb_row(slab) | {"data": {}} for slab in made]
    folder = tmp_path / "bare"
    folder.mkdir()
    _rows(folder / "a.aselmdb", *bare[:2])
    _rows(folder / "b.aselmdb", *bare[2:])
    ids = ["a_1", "a_2", "b_1", "b_2", "b_3"]
    assert list(open_dataset("aselmdb", str(folder)).sample_ids) == ids
    single = open_dataset("aselmdb", str(folder / "b.aselmdb"))
    assert list(single.sample_ids) == ["1", "2", "3"]


def test_deleted_rows_and_other_keys_are_passed_over(tmp_path: Path) -> None:
    made = slabs(4)
    rows = {str(i + 1): packed_json(aselmdb_row(s)) for i, s in enumerate(made)}
    del rows["2"]
    rows |= {"nextid": packed_json(5), "deleted_ids": packed_json([2])}
    path = write_lmdb(tmp_path / "d.aselmdb", rows | {"metadata": packed_json({})})
    dataset = open_dataset("aselmdb", str(path))
    assert len(dataset) == 3
    for i, slab in enumerate((made[0], made[2], made[3])):
        _assert_is(dataset[i], slab)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"nextid": 9}, "announce 7; rows may be missing"),
        ({"nextid": 3, "deleted_ids": []}, "announce 2; all are read"),
        ({"nextid": 5}, None),
        ({}, None),
    ],
)
def test_a_count_that_disagrees_is_a_warning(
    changes: dict[str, Any], words: str | None, tmp_path: Path, caplog: Any
) -> None:
    """B2: ``nextid`` and ``deleted_ids`` hide no row and no loss."""
    rows = {str(i + 1): packed_json(aselmdb_row(s)) for i, s in enumerate(slabs(4))}
    entries = {"deleted_ids": [2, 2], **changes} if changes else {}
    rows |= {key: packed_json(value) for key, value in entries.items()}
    if 2 in entries.get("deleted_ids", []):
        del rows["2"]
    path = write_lmdb(tmp_path / "d.aselmdb", rows)
    dataset = open_dataset("aselmdb", str(path))
    assert len(dataset) == len(rows) - len(entries)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == (words is not None)
    for message in messages:
        assert words is not None
        assert words in message


def test_rows_marked_as_deleted_are_no_rows(tmp_path: Path) -> None:
    """B2: fairchem does not read them either."""
    rows = {str(i + 1): packed_json(aselmdb_row(s)) for i, s in enumerate(slabs(3))}
    rows |= {"nextid": packed_json(4), "deleted_ids": packed_json([1, -1, 10**30])}
    path = write_lmdb(tmp_path / "d.aselmdb", rows)
    dataset = open_dataset("aselmdb", str(path))
    assert list(dataset.sample_ids) == ["500_1", "500_2"]


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"nextid": packed_json("x")}, "'nextid' holds a str, not a int"),
        ({"deleted_ids": packed_json({})}, "'deleted_ids' holds a dict"),
        ({"deleted_ids": packed_json(["x"])}, "holds something but numbers"),
        ({"nextid": b"no zlib"}, "'nextid' is damaged"),
    ],
)
def test_damaged_counts_are_refused(
    entries: dict[str, bytes], words: str, tmp_path: Path
) -> None:
    rows = {"1": packed_json(aselmdb_row(slabs(1)[0]))} | entries
    path = write_lmdb(tmp_path / "d.aselmdb", rows)
    with pytest.raises(DataError, match=words) as error:
        open_dataset("aselmdb", str(path))
    assert str(path) in str(error.value)


def test_rows_under_other_keys_are_read(tmp_path: Path) -> None:
    """B2: padded numbers and texts are keys of rows, too."""
    bare = [packed_json(aselmdb_row(s) | {"data": {}}) for s in slabs(3)]
    rows = dict(zip(("00", "a", "10"), bare, strict=True))
    path = write_lmdb(tmp_path / "d.aselmdb", rows)
    dataset = pickle.loads(pickle.dumps(open_dataset("aselmdb", str(path))))
    assert list(dataset.sample_ids) == ["00", "10", "a"]
    assert dataset[2].energy == slabs(3)[1].energy


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"sid": "\ud800"}, r"the sid '\\ud800', which is no valid text"),
        ({"sample_id": "a\udfffb"}, "which is no valid text"),
        ({"sid": 1, "fid": "\ud800"}, "the fid"),
        ({"sample_id": [1]}, r"the sample_id \[1\], which is neither text"),
        ({"sid": {"a": 1}}, "neither text nor a whole number"),
        ({"sid": 1.5}, "the sid 1.5"),
        ({"sid": True}, "the sid True"),
    ],
)
def test_ids_that_are_none_are_refused(
    data: dict[str, Any], words: str, tmp_path: Path
) -> None:
    """B11: a lone surrogate cannot be written; lists and fractions name nothing."""
    row = aselmdb_row(slabs(1)[0]) | {"data": data}
    path = write_lmdb(tmp_path / "d.aselmdb", {"3": packed_json(row)})
    with pytest.raises(DataError, match=words) as error:
        open_dataset("aselmdb", str(path))
    assert f"{path}: sample '3' has the " in str(error.value)


def test_whole_numbers_are_ids_in_every_form(tmp_path: Path) -> None:
    """B11: 7.0 and arrays of one number are the id 7."""
    one = {"__ndarray__": [[1], "int64", [7]]}
    rows = [aselmdb_row(s) for s in slabs(2)]
    rows[0]["data"], rows[1]["data"] = {"sid": 7.0, "fid": 1}, {"sid": one, "fid": None}
    dataset = open_dataset("aselmdb", str(_rows(tmp_path / "d.aselmdb", *rows)))
    assert list(dataset.sample_ids) == ["7_1", "7"]


def test_rows_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    made = slabs(12)
    dataset = open_dataset(
        "aselmdb", str(_rows(tmp_path / "d.aselmdb", *map(aselmdb_row, made)))
    )
    assert list(dataset.sample_ids) == [f"{s.sid}_{s.fid}" for s in made]


GOOD = aselmdb_row(slabs(1)[0])
N = {"__ndarray__": [[2], "int64", [1, 1]]}


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (zlib.compress(b" " * (MAX_ROW_BYTES + 1)), "unpacks to more than 16 MB"),
        (zlib.compress(b"{}"), "has no atoms"),
        (zlib.compress(b"[1]"), "holds a list"),
        (zlib.compress(b"{"), "is damaged"),
        (zlib.compress(b"[" * 100_000), "is damaged"),
        (packed_json(GOOD)[:-9], "is damaged"),
        (b"no zlib", "is damaged"),
        (packed_json(GOOD | {"numbers": 3}), "has no atoms"),
        (packed_json(GOOD | {"numbers": N}), "expected"),
        (packed_json({"numbers": N}), "has no positions"),
        (
            packed_json(GOOD | {"numbers": {"__ndarray__": [[1], "object", [1]]}}),
            "has no atoms",
        ),
        (
            packed_json(GOOD | {"numbers": {"__ndarray__": [[3], "int64", [1]]}}),
            "is damaged",
        ),
        (
            packed_json(GOOD | {"numbers": {"__ndarray__": [[1], "int8", [1000]]}}),
            "is damaged",
        ),
        (packed_json(GOOD | {"constraints": [{"name": "FixAtoms"}]}), "constraints"),
        (
            packed_json(
                GOOD
                | {"constraints": [{"name": "FixAtoms", "kwargs": {"indices": [9]}}]}
            ),
            "constraints",
        ),
        (
            packed_json(
                GOOD | {"positions": {"__ase_objtype__": "atoms", "numbers": [1]}}
            ),
            "positions with values that are no numbers",
        ),
    ],
)
def test_rows_that_cannot_be_are_refused_by_name(
    raw: bytes, words: str, tmp_path: Path
) -> None:
    path = write_lmdb(tmp_path / "d.aselmdb", {"7": raw})
    with pytest.raises(DataError, match=words) as error:
        open_dataset("aselmdb", str(path))[0]
    assert f"{path}: sample '7'" in str(error.value)
    assert "\n" not in str(error.value)


def test_pickles_in_rows_are_only_bytes(tmp_path: Path) -> None:
    """A pickle in place of a row, as other LMDB formats have it, is not unpickled."""

    class Touch:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path / 'mark'}",)

    raw = pickle.dumps(Touch())
    for value in (raw, zlib.compress(raw), zlib.compress(json.dumps("x").encode())):
        path = write_lmdb(tmp_path / "d.aselmdb", {"1": value})
        with pytest.raises(DataError):
            open_dataset("aselmdb", str(path))
        path.unlink()
    assert not (tmp_path / "mark").exists()


def test_real_rows_equal_their_frames() -> None:
    """A file that fairchem's own backend wrote, against the trajectories."""
    path = data_folder("oc20_formats") / "s2ef_20.aselmdb"
    dataset = open_dataset("aselmdb", str(path))
    assert len(dataset) == 20
    sources = {}
    for sid in ("1000169", "1000164"):
        file = data_folder("oc20_s2ef_debug") / f"random{sid}.extxyz.xz"
        source = open_dataset("oc20_raw", str(file))
        sources |= {name: (source, i) for i, name in enumerate(source.sample_ids)}
    for i in range(20):
        sample = dataset[i]
        source, place = sources[sample.sample_id]
        expected = source[place]
        assert sample.energy == expected.energy
        assert np.array_equal(sample.forces, expected.forces)
        one, other = sample.structure, expected.structure
        assert one.checksum == other.checksum
        for field in ("pbc", "tags", "fixed"):
            assert np.array_equal(getattr(one, field), getattr(other, field))
