"""OC20's LMDB files: what they say, in every layout, and what is refused."""

import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
import torch

from pipeline.datasets import ReadOptions, open_dataset, warn_of_missing_labels
from pipeline.errors import DataError
from pipeline.spec.units import Units
from pipeline.structure import Sample
from tests.pipeline.oc20_files import (
    Slab,
    data_folder,
    pyg1,
    pyg2,
    pyg_fields,
    slabs,
    write_lmdb,
    write_oc20,
)


def _open(path: Path, **options: Any) -> Any:
    return open_dataset("oc20_lmdb", str(path), **options)


def _assert_is(sample: Sample, slab: Slab) -> None:
    structure = sample.structure
    assert sample.sample_id == f"{slab.sid}_{slab.fid}"
    assert sample.energy == slab.energy
    assert np.array_equal(sample.forces, slab.forces)
    assert sample.forces.dtype == np.float32
    assert np.array_equal(structure.atomic_numbers, slab.numbers)
    assert structure.atomic_numbers.dtype == np.uint8
    assert np.array_equal(structure.positions, slab.positions)
    assert structure.positions.dtype == np.float64
    assert np.array_equal(structure.cell, slab.cell)
    assert structure.pbc.tolist() == [True, True, True]
    assert np.array_equal(structure.tags, slab.tags)
    assert structure.tags.dtype == np.int8
    assert np.array_equal(structure.fixed, slab.fixed)
    assert structure.fixed.dtype == np.bool_


@pytest.mark.parametrize("make", [pyg1, pyg2])
@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("length", [None, 6])
def test_samples_of_both_generations(
    make: Any, protocol: int, length: int | None, tmp_path: Path
) -> None:
    made = slabs(6)
    values = {str(i): make(pyg_fields(s), protocol) for i, s in enumerate(made)}
    dataset = _open(write_lmdb(tmp_path / "d.lmdb", values, length=length))
    assert len(dataset) == 6
    assert dataset.n_atoms.tolist() == [len(s.numbers) for s in made]
    assert dataset.n_atoms.dtype == np.int32
    for i, slab in enumerate(made):
        _assert_is(dataset[i], slab)


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    made = slabs(7)
    parts = {"data.0001.lmdb": made[2:6], "data.0000.lmdb": made[:2]}
    parts |= {"data.0002.lmdb": made[6:]}
    for name, part in parts.items():
        values = {str(i): pyg2(pyg_fields(slab)) for i, slab in enumerate(part)}
        write_lmdb(tmp_path / name, values, length=len(part))
    (tmp_path / "data.0000.lmdb-lock").touch()
    (tmp_path / "log.txt").touch()
    dataset = _open(tmp_path)
    assert len(dataset) == 7
    for i, slab in enumerate(made):
        _assert_is(dataset[i], slab)
    chosen = _open(tmp_path, offset=1, every=3, limit=2)
    assert list(chosen.sample_ids) == [dataset.sample_ids[i] for i in (1, 4)]
    _assert_is(chosen[1], made[4])


def test_folders_of_lmdb_folders(tmp_path: Path) -> None:
    made = slabs(4)
    for name, part in (("a", made[:2]), ("b", made[2:])):
        values = {str(i): pyg1(pyg_fields(slab)) for i, slab in enumerate(part)}
        write_lmdb(tmp_path / name, values)
    for path, expected in ((tmp_path, made), (tmp_path / "b", made[2:])):
        dataset = _open(path)
        assert len(dataset) == len(expected)
        for i, slab in enumerate(expected):
            _assert_is(dataset[i], slab)


def test_only_chosen_samples_are_looked_at(tmp_path: Path) -> None:
    values = {str(i): pyg2(pyg_fields(slab)) for i, slab in enumerate(slabs(6))}
    values |= {"0": b"broken", "4": b"broken", "5": b"broken"}
    path = write_lmdb(tmp_path / "d.lmdb", values, length=6)
    assert list(_open(path, offset=1, limit=3).sample_ids) == [
        "500_1",
        "500_2",
        "501_0",
    ]
    assert len(_open(path, offset=1, every=2, limit=2)) == 2
    with pytest.raises(DataError, match="sample '4'"):
        _open(path, offset=1)


def _with(tmp_path: Path, **changes: Any) -> Path:
    """A file with one good sample and one whose fields are changed; None removes."""
    good, other = (pyg_fields(slab) for slab in slabs(2))
    fields = {k: v for k, v in (other | changes).items() if v is not None}
    return write_lmdb(tmp_path / "d.lmdb", {"0": pyg2(good), "1": pyg2(fields)})


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"sid": 7, "fid": None}, "7"),
        ({"sid": None}, "1"),
        ({"sid": "random71", "fid": "frame3"}, "71_3"),
        ({"sid": "mine", "fid": 2}, "mine_2"),
        ({"sid": torch.tensor(71), "fid": torch.tensor([3])}, "71_3"),
        ({"sid": np.int64(71), "fid": np.int32(3)}, "71_3"),
    ],
)
def test_ids_come_from_sid_and_fid(
    changes: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    dataset = _open(_with(tmp_path, **changes))
    assert list(dataset.sample_ids) == ["500_0", expected]
    assert dataset[1].sample_id == expected


def test_labels_that_are_absent_are_nan(tmp_path: Path) -> None:
    sample = _open(_with(tmp_path, y=None, force=None))[1]
    assert np.isnan(sample.energy)
    assert sample.forces.shape == (6, 3)
    assert np.isnan(sample.forces).all()


def test_a_relaxed_energy_is_none_of_the_structure_at_hand(tmp_path: Path) -> None:
    assert np.isnan(_open(_with(tmp_path, y=None, y_relaxed=-3.0))[1].energy)


def test_labels_by_other_names_are_named_and_read(tmp_path: Path, caplog: Any) -> None:
    """A1, A2: initial structures, whose only energy is that of the relaxed one."""
    extra = {"y_relaxed": -3.0, "f_dft": torch.ones(6, 3), "head": "pbe"}
    path = _with(tmp_path, y=None, force=None, **extra)
    dataset = _open(path, offset=1)
    warn_of_missing_labels("splits.a", dataset)
    assert (
        "splits.a: 1 of 1 samples have no energy; the first is '500_1' and has "
        "'y_relaxed'; set splits.a.energy_key" in caplog.messages
    )
    options = ReadOptions("y_relaxed", "f_dft", where=(("head", ("pbe",)),))
    sample = _open(path, options=options)[0]
    assert sample.sample_id == "500_1"
    assert sample.energy == -3.0
    assert sample.forces.tolist() == [[1.0] * 3] * 6
    doubled = ReadOptions(gradient_key="f_dft", units=Units(forces="Hartree/Å"))
    forces = _open(path, options=doubled, offset=1)[0].forces
    assert forces == pytest.approx(-27.211386 * np.ones((6, 3)), rel=1e-6)


def test_other_names_and_shapes_of_labels(tmp_path: Path) -> None:
    forces = torch.arange(18.0).view(6, 3)
    for name, energy in (("a", torch.tensor([-2.5])), ("b", np.float64(-2.5))):
        changes = {"y": None, "energy": energy, "force": None, "forces": forces}
        folder = tmp_path / name
        folder.mkdir()
        sample = _open(_with(folder, **changes))[1]
        assert sample.energy == -2.5
        assert sample.forces.tolist() == forces.tolist()


def test_defaults_where_a_sample_is_silent(tmp_path: Path) -> None:
    pbc = torch.tensor([[True, True, False]])
    structure = _open(_with(tmp_path, tags=None, fixed=None, pbc=pbc))[1].structure
    assert structure.tags.tolist() == [2] * 6
    assert not structure.fixed.any()
    assert structure.pbc.tolist() == [True, True, False]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pos": None}, "no pos"),
        ({"cell": None}, "no cell"),
        ({"atomic_numbers": None}, "no atomic_numbers"),
        ({"pos": torch.full((6, 3), torch.nan)}, "positions with numbers"),
        ({"pos": torch.full((6, 3), torch.inf)}, "positions with numbers"),
        ({"pos": torch.zeros(6, 2)}, r"positions of shape \(6, 2\)"),
        ({"pos": torch.zeros(5, 3)}, r"positions of shape \(5, 3\)"),
        ({"pos": torch.zeros(0, 3), "atomic_numbers": torch.zeros(0)}, "no atoms"),
        ({"cell": torch.full((1, 3, 3), torch.nan)}, "a cell with numbers"),
        ({"cell": torch.zeros(2, 3, 3)}, "a cell of shape"),
        ({"atomic_numbers": torch.full((6,), 119.0)}, "atomic number 119"),
        ({"atomic_numbers": torch.full((6,), 0.0)}, "atomic number 0"),
        ({"atomic_numbers": torch.full((6,), 6.5)}, "atomic number 6.5"),
        ({"atomic_numbers": torch.full((6,), torch.nan)}, "atomic number nan"),
        ({"tags": torch.zeros(5)}, "tags of shape"),
        ({"force": torch.zeros(5, 3)}, "forces of shape"),
        ({"y": torch.zeros(2)}, "an energy of shape"),
        ({"y": "low"}, "an energy with values that are no numbers"),
        ({"pos": "far"}, "where numbers are needed"),
        ({"sid": torch.zeros(2)}, "2 values"),
        ({"sid": 7.5}, "the sid 7.5, which is neither text nor a whole number"),
    ],
)
def test_impossible_samples_are_refused_by_name(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    path = _with(tmp_path, **changes)
    with pytest.raises(DataError, match=words) as error:
        _open(path)[1]
    assert f"{path}: sample '1'" in str(error.value)
    assert "\n" not in str(error.value)


class Touch:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


def test_hostile_samples_and_lengths_are_refused_by_name(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    good, other = (pyg_fields(slab) for slab in slabs(2))
    values = {"0": pyg2(good), "1": pyg2(other | {"y": Touch(mark)})}
    path = write_lmdb(tmp_path / "sample.lmdb", values)
    with pytest.raises(DataError, match=r"sample '1' is refused: .*'posix\.system'"):
        _open(path)
    values = {"0": pyg2(good), "length": pickle.dumps(Touch(mark))}
    path = write_lmdb(tmp_path / "length.lmdb", values)
    with pytest.raises(DataError, match=r"'length' is refused: .*'posix\.system'"):
        _open(path)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("keys", "order"),
    [
        (["0", "2", "5", "9"], [0, 1, 2, 3]),
        (["10", "9", "1", "2"], [2, 3, 1, 0]),
        (["00", "10", "02", "01"], [0, 3, 2, 1]),
        (["000000", "000001", "000010"], [0, 1, 2]),
        (["b", "a", "ä", "a b"], [1, 3, 0, 2]),
        (["x", "11", "2"], [2, 1, 0]),
        ([str(10**18), str(10**30), "-1", "3"], [3, 0, 2, 1]),
    ],
)
def test_every_key_is_a_sample(
    keys: list[str], order: list[int], tmp_path: Path, caplog: Any
) -> None:
    """B2: gaps, other first numbers, padded numbers and texts as keys."""
    made = slabs(4)[: len(keys)]
    values = {k: pyg2(pyg_fields(s)) for k, s in zip(keys, made, strict=True)}
    path = write_lmdb(tmp_path / "d.lmdb", values, length=len(keys))
    dataset = pickle.loads(pickle.dumps(_open(path)))
    assert len(dataset) == len(keys)
    for i, which in enumerate(order):
        _assert_is(dataset[i], made[which])
    chosen = _open(path, offset=1, every=2)
    _assert_is(chosen[0], made[order[1]])
    assert not caplog.records


def test_entries_beside_samples_are_none(tmp_path: Path) -> None:
    """B2: what OCP, fairchem and tensorpack keep beside the samples is passed over."""
    values = {"1": pyg2(pyg_fields(slabs(1)[0])), "metadata": b"{}", "__len__": b"1"}
    assert len(_open(write_lmdb(tmp_path / "d.lmdb", values, length=1))) == 1


@pytest.mark.parametrize(
    ("length", "words"),
    [(3, "3; samples may be missing"), (1, "1; all are read")],
)
def test_a_length_that_disagrees_is_a_warning(
    length: int, words: str, tmp_path: Path, caplog: Any
) -> None:
    """B2: a wrong ``length`` hides no sample and no loss."""
    made = slabs(2)
    values = {k: pyg2(pyg_fields(s)) for k, s in zip("02", made, strict=True)}
    path = write_lmdb(tmp_path / "d.lmdb", values, length=length)
    dataset = _open(path)
    assert [s.sample_id for s in (dataset[0], dataset[1])] == ["500_0", "500_1"]
    (record,) = caplog.records
    assert record.getMessage() == f"{path} holds 2 samples, but its length is {words}"


def test_samples_that_vanish_are_named(tmp_path: Path) -> None:
    values = {str(i): pyg2(pyg_fields(slab)) for i, slab in enumerate(slabs(2))}
    path = write_lmdb(tmp_path / "d.lmdb", values)
    packed = pickle.dumps(_open(path))
    path.unlink()
    write_lmdb(path, {"0": values["0"]})
    with pytest.raises(DataError, match=r"sample '1' is missing; fetch the file"):
        pickle.loads(packed)[1]


def test_cut_files_are_refused_in_one_sentence(tmp_path: Path) -> None:
    """At every length; reading beyond the end would kill the process."""
    path, cut = tmp_path / "whole.lmdb", tmp_path / "cut.lmdb"
    # Larger than half a page, so that every sample lies on pages of its own.
    fields = pyg_fields(slabs(1)[0]) | {"extra": torch.arange(2500.0)}
    samples = {str(i): pyg2(fields | {"sid": i}) for i in range(12)}
    write_lmdb(path, samples, length=12)
    raw = path.read_bytes()
    for end in [*range(0, len(raw), 4096), len(raw) - 1]:
        cut.write_bytes(raw[:end])
        with pytest.raises(DataError) as error:
            _open(cut)
        message = str(error.value)
        assert str(cut) in message
        assert "\n" not in message
        if end > 8192:
            assert f"it has {end} bytes, but its header announces {len(raw)}" in message


def test_files_without_their_last_free_pages_must_be_written_anew(
    tmp_path: Path,
) -> None:
    """LMDB now and then never writes the last pages, where these are free."""
    path, copy = tmp_path / "d.lmdb", tmp_path / "copy.lmdb"
    made = write_oc20(path)
    raw = bytearray(path.read_bytes())
    for meta in (0, 4096):
        last = int.from_bytes(raw[meta + 136 : meta + 144], "little")
        raw[meta + 136 : meta + 144] = (last + 3).to_bytes(8, "little")
    path.write_bytes(raw)
    with pytest.raises(DataError, match="rewrite it with mdb_dump and mdb_load"):
        _open(path)
    with (
        lmdb.open(str(path), subdir=False, readonly=True, lock=False) as whole,
        whole.begin() as transaction,
    ):
        write_lmdb(copy, {key.decode(): raw for key, raw in transaction.cursor()})
    _assert_is(_open(copy)[5], made[5])


def test_an_archive_may_unpack_to_a_folder_in_a_folder(tmp_path: Path) -> None:
    """B1: files one folder further down are read; two such folders are named."""
    (tmp_path / "inner").mkdir()
    (tmp_path / "README").touch()
    made = write_oc20(tmp_path / "inner" / "a.lmdb")
    dataset = _open(tmp_path)
    _assert_is(dataset[5], made[5])
    (tmp_path / "other" / "set").mkdir(parents=True)
    write_oc20(tmp_path / "other" / "b.lmdb", 2)
    with pytest.raises(DataError, match=r"several of its folders do \(inner, other\)"):
        _open(tmp_path)


def test_files_that_hold_the_same_are_refused(tmp_path: Path) -> None:
    """A9: a file beside its own folder, or under two names, gives no sample twice."""
    write_oc20(tmp_path / "a.lmdb")
    (tmp_path / "b.lmdb").symlink_to(tmp_path / "a.lmdb")
    with pytest.raises(
        DataError, match=r"a\.lmdb and .*b\.lmdb are the same file twice"
    ):
        _open(tmp_path)
    (tmp_path / "b.lmdb").unlink()
    write_oc20(tmp_path / "a")
    with pytest.raises(DataError, match=r"/a and .*/a\.lmdb are the same file twice"):
        _open(tmp_path)


@pytest.mark.parametrize("content", [b"", b"no LMDB" * 2000])
def test_other_files_are_refused_by_name(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "d.lmdb"
    path.write_bytes(content)
    with pytest.raises(DataError, match="cannot be read as LMDB") as error:
        _open(path)
    assert str(path) in str(error.value)


def test_absent_and_empty_places_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        _open(tmp_path / "absent")
    with pytest.raises(DataError, match=r"holds no \.lmdb files"):
        _open(tmp_path)
    with pytest.raises(DataError, match="holds no samples"):
        _open(write_lmdb(tmp_path / "none.lmdb", {}, length=0))
    twice = {key: pyg2(pyg_fields(slabs(1)[0])) for key in ("0", "1")}
    with pytest.raises(DataError, match="share the id '500_0'"):
        _open(write_lmdb(tmp_path / "twice.lmdb", twice))


def test_two_splits_may_share_a_file(tmp_path: Path) -> None:
    path = tmp_path / "d.lmdb"
    made = write_oc20(path)
    first, second = _open(path, limit=2), _open(path, offset=2)
    for i, slab in enumerate(made):
        _assert_is(first[i] if i < 2 else second[i - 2], slab)


def test_datasets_can_be_sent_to_other_processes(tmp_path: Path) -> None:
    path = tmp_path / "d.lmdb"
    made = write_oc20(path)
    dataset = _open(path)
    assert dataset[0].energy == made[0].energy
    packed = pickle.dumps(dataset)
    assert len(packed) < 2000
    del dataset
    again = pickle.loads(packed)
    for i, slab in enumerate(made):
        _assert_is(again[i], slab)


def test_threads_read_the_same(tmp_path: Path) -> None:
    path = tmp_path / "d.lmdb"
    made = write_oc20(path)
    dataset = _open(path)
    with ThreadPoolExecutor(8) as pool:
        for i, sample in enumerate(pool.map(dataset.__getitem__, [*range(6)] * 20)):
            _assert_is(sample, made[i % 6])


@pytest.mark.parametrize("name", ["s2ef_pyg1style_20.lmdb", "s2ef_pyg2_20.lmdb"])
def test_real_samples_equal_their_frames(name: str) -> None:
    """DFT data in the layouts of OC20, against the trajectories they come from."""
    path = data_folder("oc20_formats") / name
    frames = data_folder("oc20_s2ef_debug")
    dataset = _open(path)
    assert len(dataset) == 20
    sources = {}
    for sid in ("1000169", "1000164"):
        file = frames / f"random{sid}.extxyz.xz"
        source = open_dataset("extxyz", str(file))
        sources |= {source.sample_ids[i]: source[i] for i in range(len(source))}
    for i in range(20):
        sample = dataset[i]
        expected = sources[sample.sample_id]
        assert sample.energy == expected.energy
        assert np.array_equal(sample.forces, expected.forces)
        one, other = sample.structure, expected.structure
        for field in ("atomic_numbers", "pbc", "tags", "fixed"):
            assert np.array_equal(getattr(one, field), getattr(other, field))
        for field in ("positions", "cell"):
            rounded = getattr(other, field).astype(np.float32)
            assert np.array_equal(getattr(one, field), rounded)
        assert 0 < one.fixed.sum() < len(one)
        assert sample.forces[one.fixed].any()
