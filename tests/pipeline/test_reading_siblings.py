"""Siblings of files that were read wrong: other names, other readers, other places."""

import gzip
import lzma
import os
from pathlib import Path
from typing import Any

import ase
import ase.db
import ase.io
import numpy as np
import pytest
import torch

from pipeline.cli.main import main
from pipeline.datasets import ReadOptions, open_dataset
from pipeline.errors import DataError, SpecError
from tests.commands import refusal, run_command
from tests.pipeline.oc20_files import (
    aselmdb_row,
    packed_json,
    pyg2,
    pyg_fields,
    slabs,
    write_lmdb,
)
from tests.stores import spec_document, write_spec

SPECIES = "Properties=species:S:1:pos:R:3"
WATER = ("O 0 0 0", "H 0.96 0 0", "H -0.24 0.93 0")
PUSH = ("0 0.5 0", "0 -0.25 0", "0 -0.25 0")


def _frame(header: str, *columns: tuple[str, ...], shift: float = 0.0) -> str:
    """A water molecule with more columns after the positions."""
    rows = [f"O {shift} 0 0", *WATER[1:]]
    rows = [" ".join(parts) for parts in zip(rows, *columns, strict=True)]
    return "\n".join(["3", header, *rows]) + "\n"


def _open(path: Path, format: str = "extxyz", **options: Any) -> Any:
    return open_dataset(format, str(path), options=ReadOptions(**options))


def _text(folder: Path, *frames: str) -> Path:
    path = folder / "f.xyz"
    path.write_text("".join(frames))
    return path


def _spec(folder: Path, path: Path, **keys: Any) -> Path:
    sections = {"train": {"format": "extxyz", "path": str(path), **keys}}
    return write_spec(
        folder / "s.yaml", spec_document(sections, folder / "s.zarr", None)
    )


def _plan(folder: Path, path: Path, **keys: Any) -> str:
    """What planning a split of ``path`` says on standard error."""
    return run_command(main, ["plan", _spec(folder, path, **keys)]).stderr


@pytest.mark.parametrize(
    ("header", "columns", "words"),
    [
        (f"{SPECIES} energy=-1 Energy=-5", (), "has 'energy' and 'Energy' with"),
        (f"{SPECIES} Energy=-1 ENERGY=-5", (), "has 'Energy' and 'ENERGY' with"),
        (
            f"{SPECIES}:forces:R:3:force:R:3",
            (PUSH, PUSH[::-1]),
            "has 'forces' and 'force' with",
        ),
    ],
)
def test_labels_with_two_names_and_two_values_are_refused(
    header: str, columns: Any, words: str, tmp_path: Path
) -> None:
    """A2: neither of two values is taken without a word."""
    path = _text(tmp_path, _frame(header, *columns))
    with pytest.raises(DataError, match=words) as error:
        _open(path)
    assert str(error.value).endswith("_key.")


def test_labels_with_two_names_can_be_chosen_or_agree(tmp_path: Path) -> None:
    path = _text(tmp_path, _frame(f"{SPECIES} energy=-1 Energy=-5"))
    assert _open(path, energy_key="Energy")[0].energy == -5
    path = _text(tmp_path, _frame(f"{SPECIES} energy=-1 Energy=-1.0"))
    assert _open(path)[0].energy == -1


@pytest.mark.parametrize(
    ("name", "other"), [("energy", -5.0), ("forces", torch.zeros(5, 3))]
)
def test_two_labels_of_an_lmdb_are_refused(
    name: str, other: Any, tmp_path: Path
) -> None:
    """B2: ``y`` and ``energy`` with two values."""
    fields = pyg_fields(slabs(1)[0])
    path = write_lmdb(tmp_path / "d.lmdb", {"0": pyg2({**fields, name: other})})
    with pytest.raises(DataError, match="with different values"):
        _open(path, "oc20_lmdb")[0]
    # The same number in single precision is the same label.
    single = torch.tensor(fields["y"], dtype=torch.float32)
    path = write_lmdb(tmp_path / "e.lmdb", {"0": pyg2({**fields, "energy": single})})
    assert _open(path, "oc20_lmdb")[0].energy == fields["y"]


def test_a_count_of_atoms_that_disagrees_is_refused(tmp_path: Path) -> None:
    fields = pyg_fields(slabs(1)[0]) | {"natoms": 99}
    path = write_lmdb(tmp_path / "d.lmdb", {"0": pyg2(fields)})
    with pytest.raises(DataError, match="has 5 atomic numbers, but natoms=99"):
        _open(path, "oc20_lmdb")[0]


def test_energies_per_atom_are_no_labels(tmp_path: Path) -> None:
    """A2: the advice does not name what would be wrong, and the key refuses it."""
    path = _text(tmp_path, _frame(f"{SPECIES} energy_per_atom=-1"))
    told = _plan(tmp_path, path)
    assert "it has 'energy_per_atom', but energies are those of all atoms" in told
    with pytest.raises(SpecError, match="an energy per atom"):
        ReadOptions(energy_key="data.energy_per_atom")


@pytest.mark.parametrize("name", ["E", "U0", "etot", "y_relaxed", "data.E"])
def test_short_names_of_energies_are_named(name: str, tmp_path: Path) -> None:
    """A2: the names that a frame has instead are named, however short."""
    path = _text(tmp_path, _frame(f"{SPECIES} {name}=-1"))
    assert f"it has {name!r}, so set splits.train.energy_key" in _plan(tmp_path, path)


def test_a_label_that_is_nan_is_not_said_to_be_absent(tmp_path: Path) -> None:
    path = _text(tmp_path, _frame(f"{SPECIES} energy=nan"))
    assert "nothing else in it has a name like energy" in _plan(tmp_path, path)


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ('vec1="9 0 0"', "it has 'vec1' but no 'Lattice'"),
        ('abc="9 9 9"', "it has 'abc' but no 'Lattice'"),
        ("box_length=9", "it has 'box_length' but no 'Lattice'"),
        ('Lattice="9 0 0 0 9 0 0 0 9" periodic="T T F"', "it has 'periodic' but no"),
        ('Lattice="9 0 0 0 9 0 0 0 9" boundary="p p f"', "it has 'boundary' but no"),
        ("periodic=T", "it has 'periodic' but no 'pbc'"),
    ],
)
def test_cells_and_periodicity_by_other_names_are_refused(
    key: str, words: str, tmp_path: Path
) -> None:
    """A4: ``cell=`` has siblings."""
    with pytest.raises(DataError, match=words):
        _open(_text(tmp_path, _frame(f"{SPECIES} {key}")))


@pytest.mark.parametrize("format", ["extxyz", "oc20_raw"])
@pytest.mark.parametrize(
    "name", ["selective_dynamics:L:3", "frozen:L:1", "fix:I:1", "constraints:I:1"]
)
def test_columns_named_as_constraints_are_a_warning(
    name: str, format: str, tmp_path: Path, caplog: Any
) -> None:
    """A16: a mask whose meaning is not known is not dropped without a word."""
    width = int(name[-1])
    flags = (" ".join("1" * width), *2 * (" ".join("0" * width),))
    path = _text(tmp_path, _frame(f"{SPECIES}:{name} pbc=F", flags))
    _open(path, format)
    word = name.split(":")[0]
    assert f"constraints that are not kept: {word} (1); a store" in caplog.text


def _aselmdb(path: Path, metadata: Any, row: Any) -> Path:
    entries = {"1": row, "metadata": metadata}
    return write_lmdb(path, {key: packed_json(v) for key, v in entries.items()})


def test_forces_that_ase_keeps_are_not_in_the_units_of_data(tmp_path: Path) -> None:
    """A1: the metadata names units of ``data``; ASE's own forces are in eV/Å."""
    row = {
        "numbers": [1, 1],
        "positions": [[0, 0, 0], [0, 0, 1.5]],
        "forces": [[0, 0, 1], [0, 0, -1]],
        "data": {"energy": -1.0},
    }
    units = {"_property_unit_dict": {"energy": "Hartree"}, "_distance_unit": "Bohr"}
    path = _aselmdb(tmp_path / "d.aselmdb", units, row)
    sample = _open(path, "aselmdb", energy_key="data.energy")[0]
    assert sample.energy == pytest.approx(-27.2114)
    assert sample.forces[0].tolist() == [0, 0, 1]


def test_flags_choose_the_atoms_that_are_fixed(tmp_path: Path) -> None:
    """The indices of FixAtoms may be flags for all atoms."""
    kwargs = {"indices": [False, True]}
    row = {
        "numbers": [1, 1],
        "positions": [[0, 0, 0], [0, 0, 1.5]],
        "constraints": [{"name": "FixAtoms", "kwargs": kwargs}],
    }
    sample = _open(_aselmdb(tmp_path / "d.aselmdb", {}, row), "aselmdb")[0]
    assert sample.structure.fixed.tolist() == [False, True]


def test_structures_that_are_twice_in_a_split_are_a_warning(tmp_path: Path) -> None:
    """A9: a copy of a file has another name, and all its frames twice."""
    text = "".join(_frame(f"{SPECIES} energy=-1", shift=s) for s in (0, 0.1))
    for name in ("a.xyz", "b.xyz"):
        (tmp_path / name).write_text(text)
    told = _plan(tmp_path, tmp_path / "*.xyz")
    assert "splits.train: 2 of 4 samples have structures that an earlier one" in told
    assert "('2', '3')" in told


def _npz(path: Path, **changes: Any) -> Path:
    arrays = {
        "nuclear_charges": np.array([1, 1]),
        "coords": np.array([[[0, 0, 0], [0, 0, 0.7 + 0.1 * k]] for k in range(3)]),
        "energies": np.arange(3.0),
        "forces": np.ones((3, 2, 3)),
    }
    np.savez(path, **(arrays | changes))
    return path


@pytest.mark.parametrize("value", [np.nan, 1.5])
def test_indices_of_npz_that_are_no_ids_are_refused(
    value: float, tmp_path: Path
) -> None:
    """A15: a traceback, or ids that are cut to whole numbers."""
    path = _npz(tmp_path / "a.npz", old_indices=np.array([4, value, 6]))
    with pytest.raises(DataError, match=f"sample 1 has the old_indices {value}"):
        _open(path, "npz")
    dataset = _open(path, "npz", keep_bad=True)
    assert dataset.sample_ids == ["4", "1", "6"]
    with pytest.raises(DataError, match="old_indices"):
        dataset[1]


def test_indices_of_npz_in_a_column_are_ids(tmp_path: Path) -> None:
    path = _npz(tmp_path / "a.npz", old_indices=np.array([[4], [2], [6]]))
    assert _open(path, "npz").sample_ids == ["4", "2", "6"]


def test_masks_of_npz_are_a_warning(tmp_path: Path, caplog: Any) -> None:
    """A16: arrays that are named as constraints are not kept."""
    _open(_npz(tmp_path / "a.npz", fixed=np.array([1, 0])), "npz")
    assert "3 of 3 samples have constraints that are not kept: fixed (3)" in caplog.text


def _ani(path: Path, *molecules: dict[str, Any]) -> Path:
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        for number, changes in enumerate(molecules):
            arrays = {
                "atomic_numbers": np.array([1, 1]),
                "coordinates": np.array([[[0, 0, 0], [0, 0, 0.7]]] * 3),
                "wb97x_dz.energy": np.arange(3.0),
                "wb97x_dz.forces": np.ones((3, 2, 3)),
            } | changes
            group = file.create_group(f"m{number}")
            for name, values in arrays.items():
                if values is not None:
                    group[name] = values
    return path


@pytest.mark.parametrize(
    "energies", [np.arange(2.0), np.arange(4.0), np.array([1.0]), np.float64(1)]
)
def test_labels_of_hdf5_of_other_lengths_are_refused(
    energies: Any, tmp_path: Path
) -> None:
    """C: a traceback, surplus labels, or one label for all conformations."""
    dataset = _open(_ani(tmp_path / "a.h5", {"wb97x_dz.energy": energies}), "hdf5")
    with pytest.raises(DataError, match="but the molecule has 3 conformations"):
        dataset[0]


@pytest.mark.parametrize("name", ["pbc", "cell", "lattice_vectors"])
def test_cells_in_hdf5_are_refused(name: str, tmp_path: Path) -> None:
    """A4: the layouts have no cell, so one would be dropped."""
    dataset = _open(_ani(tmp_path / "a.h5", {name: np.eye(3)}), "hdf5")
    with pytest.raises(DataError, match=f"has '{name}', but the layout of ANI-1x has"):
        dataset[0]


@pytest.mark.parametrize("attribute", ["units", "unit"])
def test_molecules_of_hdf5_in_two_units_are_refused(
    attribute: str, tmp_path: Path
) -> None:
    """C: the units of the first molecule were taken for all."""
    h5py = pytest.importorskip("h5py")
    path = _ani(tmp_path / "a.h5", {}, {"wb97x_dz.forces": None}, {})
    with h5py.File(path, "a") as file:
        file["m2"]["wb97x_dz.energy"].attrs[attribute] = "kcal/mol"
    dataset = _open(path, "hdf5")
    assert dataset[3].energy == 0
    with pytest.raises(DataError, match="'wb97x_dz.energy' is in another unit than in"):
        dataset[6]


def _bad_lmdb(folder: Path) -> Path:
    values = [pyg2(pyg_fields(slab)) for slab in slabs(3)]
    entries = {"0": values[0], "1": b"torn", "2": values[2]}
    return write_lmdb(folder / "d.lmdb", entries)


def _bad_aselmdb(folder: Path) -> Path:
    rows = [aselmdb_row(slab) for slab in slabs(3)]
    rows[1]["data"] = {"sid": [1, 2]}
    entries = {str(i): packed_json(row) for i, row in enumerate(rows, 1)}
    return write_lmdb(folder / "d.aselmdb", entries)


def _bad_database(folder: Path) -> Path:
    with ase.db.connect(str(folder / "d.db")) as database:
        for sid in (7, [1, 2], 8):
            atoms = ase.Atoms("H2", [[0, 0, 0], [0, 0, 0.7 + 0.01 * len(database)]])
            database.write(atoms, data={"sid": sid})
    return folder / "d.db"


def _bad_trajectory(folder: Path) -> Path:
    images = [ase.Atoms("H2", [[0, 0, 0], [0, 0, 0.7 + k]]) for k in (0.0, 0.1, 0.2)]
    images[1].info["sid"] = [1, 2]
    ase.io.write(folder / "d.traj", images)
    return folder / "d.traj"


@pytest.mark.parametrize(
    ("format", "make"),
    [
        ("oc20_lmdb", _bad_lmdb),
        ("aselmdb", _bad_aselmdb),
        ("ase_db", _bad_database),
        ("traj", _bad_trajectory),
    ],
)
def test_rows_that_cannot_be_listed_are_skipped(
    format: str, make: Any, tmp_path: Path
) -> None:
    """B3: ``skip`` leaves out what is found while samples are listed, too."""
    path = make(tmp_path)
    with pytest.raises(DataError):
        _open(path, format)
    dataset = _open(path, format, keep_bad=True)
    assert len(dataset) == 3
    assert [len(dataset[i].structure) for i in (0, 2)] == [
        dataset.n_atoms[0],
        dataset.n_atoms[2],
    ]
    with pytest.raises(DataError):
        dataset[1]
    told = _plan(tmp_path, path, format=format, on_bad_sample="skip")
    assert "splits.train: 1 of 3 samples are skipped" in told


def test_conditions_do_not_hide_what_cannot_be_read(tmp_path: Path) -> None:
    """A torn sample meets every condition, and is named."""
    where = (("sid", (500,)),)
    path = _bad_lmdb(tmp_path)
    dataset = _open(path, "oc20_lmdb", where=where, keep_bad=True)
    assert dataset.sample_ids == ["500_0", "1", "500_2"]


def test_hard_links_are_the_same_file(tmp_path: Path) -> None:
    """A9: one file under two names counts twice."""
    path = _text(tmp_path, _frame(SPECIES))
    os.link(path, tmp_path / "g.xyz")
    with pytest.raises(DataError, match="are the same file twice"):
        _open(tmp_path / "*.xyz")


def test_hidden_files_are_no_data_and_case_does_not_matter(tmp_path: Path) -> None:
    """A9: what other systems leave in folders is not read, what is data is."""
    (tmp_path / "._a.xyz").write_bytes(b"\0\5\x16\7")
    (tmp_path / ".old.xyz").write_text(_frame(SPECIES))
    (tmp_path / "a.XYZ").write_text(_frame(SPECIES, shift=0.1))
    (tmp_path / "b.xyz").write_text(_frame(SPECIES))
    assert len(_open(tmp_path)) == 2


def test_a_packed_name_of_plain_text_is_read(tmp_path: Path) -> None:
    """B9: browsers unpack files and keep their names."""
    path = tmp_path / "f.xyz.gz"
    path.write_text(_frame(f"{SPECIES} energy=-1"))
    assert _open(path)[0].energy == -1
    assert _open(path, "oc20_raw")[0].energy == -1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (gzip.compress(gzip.compress(b"1\n\nH 0 0 0\n")), "packed twice"),
        (lzma.compress(b"1\n\nH 0 0 0\n", lzma.FORMAT_ALONE), "packed by lzma"),
        (b"\x1f\x9d\x90abc", "packed by compress"),
    ],
    ids=["twice", "lzma", "compress"],
)
def test_other_packers_are_named(content: bytes, words: str, tmp_path: Path) -> None:
    """B9: says what a file looks like."""
    path = tmp_path / "f.xyz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"{words}.*; unpack it first"):
        _open(path)


def test_trajectories_that_are_packed_or_empty_are_named(tmp_path: Path) -> None:
    for name, content, words in (
        ("a.traj", gzip.compress(b"x"), "it is packed; unpack it first"),
        ("b.traj", b"", "it is empty"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=words):
            _open(tmp_path / name, "traj")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("random7,-1.0", "has no reference energy in system.txt"),
        ("random5 -1.0", "has no reference energy in system.txt"),
        ("random5,-1.0\nrandom5,-2.0", "has two energies for the system 'random5'"),
    ],
)
def test_systems_that_are_not_listed_once_are_refused(
    line: str, words: str, tmp_path: Path
) -> None:
    """C: with a ``system.txt`` total energies are not taken without a word."""
    (tmp_path / "random5.extxyz").write_text(_frame(f"{SPECIES} energy=-3"))
    (tmp_path / "system.txt").write_text(line)
    with pytest.raises(DataError, match=words):
        open_dataset("oc20_raw", str(tmp_path))
    (tmp_path / "system.txt").write_text("random5,-1.0")
    assert open_dataset("oc20_raw", str(tmp_path))[0].energy == -2


def test_a_selection_of_nothing_names_what_was_wanted(tmp_path: Path) -> None:
    path = _text(tmp_path, _frame(f"{SPECIES} charge=0"), _frame(SPECIES))
    with pytest.raises(DataError, match="charge is 0, absent, not '0'"):
        _open(path, where=(("charge", ("0",)),))


def test_an_offset_past_the_end_names_the_file(tmp_path: Path) -> None:
    path = _text(tmp_path, _frame(SPECIES))
    with pytest.raises(DataError, match=f"^{path} has no sample left after offset=7"):
        open_dataset("extxyz", str(path), offset=7)


def test_errors_after_a_pass_begin_a_line(tmp_path: Path) -> None:
    """One sentence on a line of its own, whatever bars there are."""
    path = _text(tmp_path, _frame(f"{SPECIES} energy=-1"))
    spec = _spec(tmp_path, path, energy_key="REF_energy")
    told = run_command(main, ["plan", spec])
    assert told.exit_code == 2
    assert "\nError: " in f"\n{told.stderr}"


CLOSE = "2\nProperties=species:S:1:pos:R:3 sample_id=close\nH 0 0 0\nH 0 0 0.05\n"


@pytest.mark.parametrize("words", [["check-teacher"], ["label", "--out", "labels"]])
def test_commands_without_a_store_refuse_or_skip_bad_samples(
    words: list[str], teacher_file: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """A12: planning refuses atoms that are too close, and so do trials and labels."""
    monkeypatch.chdir(tmp_path)
    path = _text(tmp_path, _frame(f"{SPECIES} sample_id=w"), CLOSE)
    name, *more = words
    options = ["--samples", 2] if name == "check-teacher" else []
    command = [name, "s.yaml", *more, *options, "--device", "cpu"]
    section = {"format": "extxyz", "path": str(path)}
    for keys in ({}, {"on_bad_sample": "skip"}):
        document = spec_document(
            {"train": section | keys}, tmp_path / "s.zarr", teacher_file
        )
        write_spec(tmp_path / "s.yaml", document)
        if not keys:
            assert "Sample 'close': atoms 0 (H) and 1 (H)" in refusal(main, command)
            continue
        told = run_command(main, command)
        assert "1 of 2 samples are skipped: 'close'" in told.stderr
        assert "the store names" not in told.stderr
    if name == "label":
        written = _open(tmp_path / "labels" / "train.extxyz")
        assert written.sample_ids == ["w"]
