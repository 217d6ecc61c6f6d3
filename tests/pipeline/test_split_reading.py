"""What a split says of its files: several paths, conditions, keys, units."""

from pathlib import Path
from typing import Any

import ase
import ase.db
import pytest

from pipeline.datasets import open_dataset, open_split
from pipeline.errors import DataError, SpecError
from pipeline.spec.cache_spec import CacheSpec, load_spec
from pipeline.spec.sections import SplitSpec
from pipeline.spec.units import Units, parse_units
from tests.frames import frame, write_frames


def _frame(name: str, **keys: Any) -> str:
    header = " ".join(f"{key}={value}" for key, value in keys.items())
    return frame(name, ["H"], [[0, 0, 0]], energy=-1.0, header=header)


def _split(path: Any, **changes: Any) -> SplitSpec:
    names = [str(part) for part in path] if isinstance(path, list) else str(path)
    return SplitSpec.model_validate({"format": "extxyz", "path": names} | changes)


@pytest.fixture
def heads(tmp_path: Path) -> Path:
    texts = [
        _frame("a", head="pbe", charge=0, done="T"),
        _frame("b", head="scan", charge=0, done="F"),
        _frame("c", head="pbe", charge=1, done="T"),
        _frame("d", charge=-1, done="T"),
        _frame("e", head="pbe", charge=1.0, done="T"),
    ]
    return write_frames(tmp_path / "heads.xyz", texts)


@pytest.mark.parametrize(
    ("where", "more", "expected"),
    [
        ({}, {}, "abcde"),
        ({"head": "pbe"}, {}, "ace"),
        ({"head": ["pbe", "scan"]}, {}, "abce"),
        ({"charge": 1}, {}, "ce"),
        ({"charge": [0, -1.0]}, {}, "abd"),
        ({"done": True}, {}, "acde"),
        ({"HEAD": "pbe", "charge": 1}, {}, "ce"),
        ({"head": "pbe"}, {"offset": 1, "every": 1, "limit": 1}, "c"),
        ({"head": "pbe"}, {"every": 2}, "ae"),
    ],
)
def test_where_chooses_frames_by_their_values(
    where: Any, more: dict[str, int], expected: str, heads: Path
) -> None:
    """C: numbers as numbers, text as text; offset, every and limit count matches."""
    dataset = open_split(_split(heads, where=where, **more))
    assert "".join(dataset.sample_ids) == expected
    assert [dataset[i].sample_id for i in range(len(dataset))] == list(expected)
    assert len(dataset.n_atoms) == len(expected)


def test_bad_frames_are_chosen_by_their_headers(tmp_path: Path) -> None:
    """C: a frame of another kind is not among the bad ones."""
    bad = _frame("bad", head="pbe").replace("H 0.0", "H oh")
    texts = [_frame("a", head="pbe"), bad, bad.replace("pbe", "x").replace("bad", "b")]
    path = write_frames(tmp_path / "f.xyz", [*texts, _frame("c", head="x")])
    dataset = open_split(_split(path, where={"head": "x"}, on_bad_sample="skip"))
    assert list(dataset.sample_ids) == ["b", "c"]
    with pytest.raises(DataError, match="'oh0000000' is no number"):
        dataset[0]


def test_where_holds_in_every_format(tmp_path: Path) -> None:
    """C: databases by key-value pairs and data, chunks by their headers."""
    with ase.db.connect(tmp_path / "a.db") as database:
        for number in range(6):
            atoms = ase.Atoms("H", info={"number": number})
            data = {"kind": {"odd": number % 2}, "REF_energy": [-number]}
            pairs = {"head": "pbe" if number < 4 else "scan", "sid": number}
            database.write(atoms, key_value_pairs=pairs, data=data)
    split = _split(tmp_path / "a.db", format="ase_db", where={"head": "pbe"})
    assert list(open_split(split).sample_ids) == ["0", "1", "2", "3"]
    options = {
        "where": {"key_value_pairs.sid": [5, 3]},
        "energy_key": "data.REF_energy",
    }
    split = _split(tmp_path / "a.db", format="ase_db", **options)
    dataset = open_split(split)
    assert list(dataset.sample_ids) == ["3", "5"]
    assert [dataset[i].energy for i in range(2)] == [-3, -5]
    assert dataset.label_names(0) == []
    texts = [_frame(f"{i}", head="ab"[i % 2]) for i in range(6)]
    chunk = write_frames(tmp_path / "1.extxyz.xz", texts)
    split = _split(chunk, format="oc20_raw", where={"head": "b"}, offset=1)
    assert list(open_split(split).sample_ids) == ["3", "5"]


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ({"heads": "pbe"}, "no frame has the key 'heads'"),
        ({"head": "PBE"}, "selects no frame; head is 'pbe', 'scan', absent, not 'PBE'"),
        ({"charge": "0"}, "selects no frame; charge is 0, 1, -1"),
        ({"head": "scan", "charge": 1}, "selects no frame"),
    ],
)
def test_where_that_chooses_nothing_is_refused(
    where: Any, words: str, heads: Path
) -> None:
    with pytest.raises(DataError, match=words):
        open_split(_split(heads, where=where))


def test_several_paths_and_globs_are_read_in_counting_order(tmp_path: Path) -> None:
    """C: a list, a glob, and both."""
    for number in (2, 10, 1):
        write_frames(tmp_path / f"p{number}.xyz", [_frame(f"{number}")])
    listed = open_split(_split([tmp_path / "p10.xyz", tmp_path / "p1.xyz"]))
    assert list(listed.sample_ids) == ["10", "1"]
    assert list(open_split(_split(tmp_path / "p*.xyz")).sample_ids) == ["1", "2", "10"]
    mixed = _split([tmp_path / "p[12].xyz", tmp_path / "p10.xyz"])
    assert list(open_split(mixed).sample_ids) == ["1", "2", "10"]
    literal = write_frames(tmp_path / "odd[1].xyz", [_frame("odd")])
    assert list(open_split(_split(literal)).sample_ids) == ["odd"]
    with pytest.raises(DataError, match=r"q\*\.xyz matches no file"):
        open_split(_split(tmp_path / "q*.xyz"))


def test_the_same_file_twice_is_refused(tmp_path: Path) -> None:
    """A9: a file and its packed twin, in a folder, a glob or a list."""
    plain = write_frames(tmp_path / "t.xyz", [_frame("a")])
    packed = write_frames(tmp_path / "t.xyz.gz", [_frame("a")])
    other = write_frames(tmp_path / "u.extxyz", [_frame("b")])
    for path in (tmp_path, tmp_path / "t.*", [plain, packed], [plain, plain]):
        with pytest.raises(DataError, match="the same file twice") as error:
            open_split(_split(path))
        assert str(plain) in str(error.value)
    with pytest.raises(DataError, match="the same file twice"):
        open_split(_split([other, tmp_path / "." / "u.extxyz"]))
    assert list(open_split(_split([packed, other])).sample_ids) == ["a", "b"]
    assert list(open_dataset("extxyz", str(plain)).sample_ids) == ["a"]


@pytest.mark.parametrize(
    ("units", "energy", "forces"),
    [
        ("energy=eV", 1.0, 1.0),
        ("energy=Ha,length=Bohr", 27.211386, 51.422067),
        ("energy=hartree,length=A", 27.211386, 27.211386),
        ("energy=kcal/mol,length=Angstrom", 0.04336410, 0.04336410),
        ("energy=KJ/MOL, length=nm", 0.010364270, 0.0010364270),
        ("energy=meV,forces=eV/Å", 1e-3, 1.0),
        ("energy=Ry,forces=kcal/mol/Å", 13.605693, 0.04336410),
        ("length=pm,forces=Ha/a0", 1.0, 51.422067),
    ],
)
def test_units_have_the_names_of_the_field(
    units: str, energy: float, forces: float
) -> None:
    factors = parse_units(units).factors
    assert factors.energy == pytest.approx(energy, rel=1e-6)
    assert factors.forces == pytest.approx(forces, rel=1e-6)


def test_units_of_a_split_go_before_those_of_a_file() -> None:
    file = Units("Ha", "Bohr", "Ha/Bohr")
    assert Units().over(file) == file
    assert Units("eV").over(file) == Units("eV", "Bohr", None)
    assert Units(forces="eV/Å").over(file) == Units("Ha", "Bohr", "eV/Å")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"units": {"energy": "furlong"}}, "unknown unit of energy 'furlong' .known"),
        ({"units": {"energy": "MeV"}}, "unknown unit of energy 'MeV'"),
        ({"units": {"length": "eV"}}, "unknown unit of length 'eV'"),
        ({"units": {"forces": "Ha"}}, "must be energy/length"),
        ({"units": {"forces": "Ha/fm"}}, "unknown unit of length 'fm'"),
        ({"units": {"enery": "eV"}}, "unknown key 'splits.a.units.enery'"),
        ({"forces_key": "f", "gradient_key": "g"}, "forces_key and gradient_key"),
        ({"where": {"head": []}}, "'head' needs a number"),
        ({"where": {"head": {"a": 1}}}, "'head' needs a number"),
        ({"where": "head"}, "must be a map"),
        ({"path": []}, "must be a path or a list of paths"),
        ({"path": ["f.xyz", 3]}, "must be a path or a list of paths"),
        ({"path": ["f.xyz", "g.xyz"]}, "g.xyz does not exist"),
        ({"path": "g*.xyz"}, r"g\*.xyz matches no file"),
    ],
)
def test_wrong_keys_of_a_split_are_refused(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    write_frames(tmp_path / "f.xyz", [_frame("a")])
    with pytest.raises(SpecError, match=words) as error:
        _loaded(tmp_path, changes)
    assert "splits.a" in str(error.value)


def test_paths_of_a_split_are_made_absolute(tmp_path: Path) -> None:
    write_frames(tmp_path / "f.xyz", [_frame("a")])
    one = _loaded(tmp_path, {"path": ["f.xyz"]}).splits["a"]
    assert one.path == str(tmp_path / "f.xyz")
    some = _loaded(tmp_path, {"path": ["f.xyz", "*.xyz"]}).splits["a"]
    assert some.path == [str(tmp_path / "f.xyz"), str(tmp_path / "*.xyz")]


def _loaded(folder: Path, changes: dict[str, Any]) -> CacheSpec:
    import json

    split = {"format": "extxyz", "path": "f.xyz"} | changes
    document = {"splits": {"a": split}, "store": {"path": "s.zarr"}}
    # JSON is YAML.
    (folder / "spec.yaml").write_text(json.dumps(document))
    return load_spec(folder / "spec.yaml")
