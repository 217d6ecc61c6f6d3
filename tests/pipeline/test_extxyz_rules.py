"""What extended-XYZ files of the trade look like: read right, or refused by name."""

import bz2
import gzip
import io
import tarfile
from pathlib import Path
from typing import Any

import ase
import ase.io
import numpy as np
import pytest
from numcodecs import zstd

from pipeline.build.filter_samples import Demands, find_bad_samples
from pipeline.datasets import ReadOptions, open_dataset
from pipeline.errors import DataError
from pipeline.structure import Sample
from tests.frames import frame, write_frames

CELL = "4 0 0 0 5 0 1 0 6"
LATTICE = f'Lattice="{CELL}"'
SPECIES_POS = "Properties=species:S:1:pos:R:3"
BARE = ("H 0 0 0", "O 0 0 1")
SMALL = b"1\nenergy=-1\nH 0 0 0\n"


def _text(header: str, *rows: str) -> str:
    rows = rows or BARE
    return "\n".join([str(len(rows)), header, *rows]) + "\n"


def _read(folder: Path, header: str, *rows: str) -> Sample:
    path = folder / "f.xyz"
    path.write_text(_text(header, *rows))
    dataset = open_dataset("extxyz", str(path))
    assert len(dataset) == 1
    return dataset[0]


def _refusal(path: Path, **options: Any) -> str:
    with pytest.raises(DataError) as error:
        open_dataset("extxyz", str(path), **options)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    return str(error.value)


def _refused(folder: Path, header: str, *rows: str) -> str:
    path = folder / "f.xyz"
    path.write_text(_text(header, *rows))
    return _refusal(path)


@pytest.mark.parametrize(
    "header",
    [
        f'lattice="{CELL}" energy=-1 properties=species:S:1:pos:R:3:force:R:3',
        f'LATTICE="{CELL}" Energy=-1 PROPERTIES=Species:S:1:POS:r:3:Forces:R:3',
        f'cell="{CELL}" energy=-1 Properties="species:S:1:pos:R:3:forces:R:3"',
        f"{LATTICE} energy = -1 Properties = species:S:1:pos:R:3:forces:R:3",
        f"Lattice={{{CELL}}} pbc='T T T' energy= -1.0D+00 "
        "Properties=symbols:S:1:positions:R:3:force:R:3",
        f"Lattice=[{CELL.replace(' ', ', ')}] pbc=[T, T, T] energy=np.float64(-1.0) "
        "Properties=species:S:1:pos:R:3:forces:R:3",
        f'{LATTICE} pbc="1 1 1" energy=[-1] Properties=species:S:1:pos:R:3:forces:R:3',
    ],
)
def test_keys_of_any_case_and_spelling_are_read(header: str, tmp_path: Path) -> None:
    """A3, A4, B9: what NEP, GPUMD, numpy and Fortran write; a cell is periodic."""
    sample = _read(tmp_path, header, "H 0 0 0 1 2 3", "O 0 0 1 0 0 0")
    assert sample.energy == -1
    assert sample.forces.tolist() == [[1, 2, 3], [0, 0, 0]]
    assert sample.structure.cell.tolist() == [[4, 0, 0], [0, 5, 0], [1, 0, 6]]
    assert sample.structure.pbc.tolist() == [True] * 3


@pytest.mark.parametrize(
    ("header", "rows", "words"),
    [
        (SPECIES_POS, ("H 0 0 0 1", "O 0 0 1 1"), "atom 0 has 5 columns"),
        (SPECIES_POS, ("H 0 0 0", "O 0 0"), "atom 1 has 3 columns"),
        ("plain comment", ("H 0 0 0 7",), "without Properties has an element and x"),
        (f"Lattice: {CELL}", BARE, "'Lattice' is not followed by '='"),
        (f'Lattice "{CELL}" energy=-1', BARE, "'Lattice' is not followed by '='"),
        (f'cell="4 5 6" {SPECIES_POS}', BARE, "'cell' has 3 values"),
        (f'box="{CELL}" {SPECIES_POS}', BARE, "'box' but no 'Lattice'"),
        (f'{LATTICE} cell="{CELL} 1" {SPECIES_POS}', BARE, "'cell' has 10 values"),
        (f'{LATTICE} cell="{CELL[:-1]}7" {SPECIES_POS}', BARE, "different cells"),
        ("Lattice=[[4,1,0],[0,4,0],[0,0,4]]", BARE, "nested array"),
        (f'pbc="T T" {LATTICE}', BARE, "pbc has 2 values"),
        (f'pbc="p p f" {LATTICE}', BARE, "'p' is neither true nor false"),
        (f"pbc= {LATTICE}", BARE, "'pbc' has no value"),
        (f"{SPECIES_POS} PROPERTIES=Z:I:1:pos:R:3", BARE, "'properties' twice"),
        ("Properties=species:S:1:position:R:3", BARE, "no column 'pos'"),
        ("Properties=species:S:1:frac:R:3", BARE, "no column 'pos'"),
        ("Properties=species:S:1:pos:R:2", ("H 0 0",), "'pos' with 2 numbers"),
        ("Properties=element:S:1:pos:R:3", BARE, "no column 'species'"),
        ("Properties=species:S:1:pos:R:3:pos:R:3", BARE, "'pos' twice"),
        ("Properties=species:S:1:pos:Q:3", BARE, "pos:Q:3"),
        ("Properties=species:S:1:pos", BARE, "not name:type"),
        (f'note="energy=5" energy=-3 {SPECIES_POS}', BARE, "contains 'energy='"),
        (f"note=a=b=energy=5 {SPECIES_POS}", BARE, "contains 'energy='"),
        (f'a="it energy=-3 {LATTICE} {SPECIES_POS}', BARE, "no blank after"),
        (f'size=5" energy=-3 {SPECIES_POS}', BARE, "in the middle of"),
        (f'note="never closed energy=-3 {SPECIES_POS}', BARE, "is not closed"),
        (f'n=" sample_id=x m=" {SPECIES_POS}', BARE, "contains 'sample_id='"),
        (f"sample_id= word {SPECIES_POS}", BARE, "is not clear whether 'word'"),
        (f"energy=-1 energy=-2 {SPECIES_POS}", BARE, "'energy' is there twice"),
        ("Properties=species:S:1:pos:R:3:energy:R:1 energy=1", ("H 0 0 0 1",), "both"),
        (SPECIES_POS, ("C_1 0 0 0",), "'C_1' is no element"),
        (SPECIES_POS, ("X 0 0 0",), "atomic number 0"),
        (SPECIES_POS, ("H 0 0 1_0",), "'1_0' is no number"),
        (SPECIES_POS, ("H 0 0 *****",), "is no number"),
        ("Properties=species:S:1:pos:R:3:tags:I:1", ("H 0 0 0 300",), "value 300"),
    ],
)
def test_frames_that_could_be_misread_are_refused(
    header: str, rows: tuple[str, ...], words: str, tmp_path: Path
) -> None:
    """A3, A4, A7, A12, B9: one sentence with file and frame, nothing dropped."""
    assert words in _refused(tmp_path, header, *rows)


def test_an_empty_value_swallows_nothing(tmp_path: Path) -> None:
    """A7: ASE writes ``comment= energy=-3.1``, and its reader loses the energy."""
    atoms = ase.Atoms("HO", [[0, 0, 0], [0, 0, 1]], cell=[4, 5, 6], pbc=True)
    atoms.info = {"comment": "", "energy": -3.1, "note": "dir\\"}
    ase.io.write(tmp_path / "a.xyz", atoms, format="extxyz")
    assert "energy" not in ase.io.read(tmp_path / "a.xyz").info
    sample = open_dataset("extxyz", str(tmp_path / "a.xyz"))[0]
    assert sample.energy == -3.1
    assert sample.structure.cell.diagonal().tolist() == [4, 5, 6]


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ('note="was sample_id=5 once" sample_id=a', "a"),
        ("sample_id=007", "007"),
        ("sid=007 fid='03'", "007_03"),
        ('Sample_ID="a b"', "a b"),
        (r'sample_id="a \"b\" c"', 'a "b" c'),
        (r"sample_id=a\b", r"a\b"),
        ("sample_id=T", "T"),
        ('sample_id=""', "0"),
        ("note=x", "0"),
    ],
)
def test_ids_are_those_of_the_parsed_header(
    header: str, expected: str, tmp_path: Path
) -> None:
    """A15: an id inside another value is none; 007 is not 7."""
    assert _read(tmp_path, f"{header} {SPECIES_POS}").sample_id == expected


@pytest.mark.parametrize("letter", ["L", "I", "S"])
@pytest.mark.parametrize(
    ("yes", "no"), [("1", "0"), ("T", "F"), ("True", "False"), ("1.0", "0.0")]
)
def test_masks_have_the_values_that_are_written(
    yes: str, no: str, letter: str, tmp_path: Path
) -> None:
    """A16: with 1 and 0 in a column of flags, all atoms were fixed."""
    for name, expected in (("move_mask", [False, True]), ("fixed", [True, False])):
        header = f"{SPECIES_POS}:{name}:{letter}:1"
        sample = _read(tmp_path, header, f"H 0 0 0 {yes}", f"O 0 0 1 {no}")
        assert sample.structure.fixed.tolist() == expected
    header = f"{SPECIES_POS}:move_mask:{letter}:1"
    assert "'yes' is neither" in _refused(tmp_path, header, "H 0 0 0 yes")
    both = f"{SPECIES_POS}:fixed:{letter}:1:move_mask:{letter}:1"
    assert "disagree" in _refused(tmp_path, both, f"H 0 0 0 {yes} {yes}")


@pytest.mark.parametrize(
    ("energy", "words"),
    [
        ("inf", "an energy that is not finite"),
        ("-1e999", "an energy that is not finite"),
        ('"-1.0 eV"', r"no numbers ('-1.0 eV')"),
        ("-1_000", "no numbers"),
        ("1+2j", "no numbers"),
        ("T", "no numbers"),
        ("", "no numbers"),
        ('"1 2"', "an energy of shape (2,)"),
    ],
)
def test_energies_that_are_none_are_refused(
    energy: str, words: str, tmp_path: Path
) -> None:
    """B3: found when the file is read, not when its block is written."""
    assert words in _refused(tmp_path, f"{SPECIES_POS} energy={energy}")
    assert np.isnan(_read(tmp_path, f"{SPECIES_POS} energy=nan").energy)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("nan 0 0", "forces with numbers that are not finite"),
        ("inf 0 0", "forces with numbers that are not finite"),
        ("1e39 0 0", "forces with numbers that are not finite"),
        ("a b c", "no numbers"),
        ("**** 0 0", "no numbers"),
    ],
)
def test_forces_that_are_none_are_refused(row: str, words: str, tmp_path: Path) -> None:
    """B3: forces are there as a whole, or not at all."""
    header = f"{SPECIES_POS}:forces:R:3"
    assert words in _refused(tmp_path, header, f"H 0 0 0 {row}", "O 0 0 1 0 0 0")
    absent = _read(tmp_path, header, "H 0 0 0 nan nan nan", "O 0 0 1 nan nan nan")
    assert np.isnan(absent.forces).all()


def test_stress_of_six_numbers_damages_nothing(tmp_path: Path) -> None:
    """B4: ASE's reader refuses the whole file."""
    path = tmp_path / "s.xyz"
    path.write_text(_text(f'{SPECIES_POS} energy=-1 stress="1 2 3 4 5 6" virial=7'))
    options = ReadOptions(virial_key="none")
    dataset = open_dataset("extxyz", str(path), options=options)
    assert dataset[0].energy == -1
    assert dataset.label_names(0) == ["stress", "virial"]
    with pytest.raises(DataError, match="no periodic cell with a volume"):
        open_dataset("extxyz", str(path))


@pytest.mark.parametrize(
    ("species", "number"),
    [("D", 1), ("T", 1), ("d", 1), ("O1", 8), ("O2-", 8), ("Fe3+", 26), ("8", 8)]
    + [("cl", 17), ("CL", 17), ("Na+", 11)],
)
def test_elements_as_people_write_them(
    species: str, number: int, tmp_path: Path
) -> None:
    """B9: isotopes of hydrogen, numbered atoms, ions, atomic numbers."""
    found = _read(tmp_path, SPECIES_POS, f"{species} 0 0 0").structure.atomic_numbers
    assert found.tolist() == [number]


def test_packed_files_are_known_by_their_content(tmp_path: Path) -> None:
    """B9: .bz2 and .zst, in pieces and under other names, and a mark of byte order."""
    packed = {
        "a.xyz.bz2": bz2.compress(SMALL) * 2,
        "a.xyz.zst": bytes(zstd.compress(SMALL, 3)) * 2,
        "plain_name.xyz": gzip.compress(SMALL * 2),
        "bom.xyz": b"\xef\xbb\xbf" + SMALL * 2,
        "crlf.xyz": (SMALL * 2).replace(b"\n", b"\r\n"),
    }
    for name, content in packed.items():
        path = tmp_path / name
        path.write_bytes(content)
        dataset = open_dataset("extxyz", str(path))
        assert [dataset[i].energy for i in range(len(dataset))] == [-1, -1], name
    cut = tmp_path / "cut.xyz.zst"
    cut.write_bytes(bytes(zstd.compress(SMALL * 999, 3))[:-9])
    assert "damaged" in _refusal(cut)


def _tar() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        entry = tarfile.TarInfo("a.xyz")
        entry.size = len(SMALL)
        archive.addfile(entry, io.BytesIO(SMALL))
    return stream.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.xyz", b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
        ("a.xyz", b"<!DOCTYPE html>\n<html>", "a web page"),
        ("a.xyz.xz", b"\n<html>Not found</html>", "a web page"),
        ("a.xyz", b"PK\x03\x04" + bytes(30), "a zip archive"),
        ("a.xyz", _tar(), "a tar archive"),
        ("a.xyz.gz", gzip.compress(_tar()), "a tar archive"),
        ("a.xyz", SMALL.decode().encode("utf-16"), "UTF-16"),
        ("a.xyz", SMALL.decode().encode("utf-16-le"), "UTF-16"),
        ("a.xyz", b"\x89HDF\r\n\x1a\n" + bytes(30), "an HDF5 file"),
        ("a.xyz", b"SQLite format 3\0", "format: ase_db"),
        ("a.xyz", b"1\nnote=\xe5 b=1\nH 0 0 0\n", "not UTF-8"),
    ],
)
def test_other_files_are_called_what_they_look_like(
    name: str, content: bytes, words: str, tmp_path: Path
) -> None:
    """B9: a failed download, an archive or a binary file."""
    (tmp_path / name).write_bytes(content)
    assert words in _refusal(tmp_path / name)


def test_bad_frames_are_skipped_by_name(tmp_path: Path) -> None:
    """C: on_bad_sample: skip held for no frame that could not be parsed."""
    texts = [
        frame("good", ["H", "H"], [[0, 0, 0], [0, 0, 1]], energy=-1.0),
        _text(f"{SPECIES_POS} sample_id=wide", "H 0 0 0 7"),
        _text(f"{SPECIES_POS} sample_id=infinite energy=inf"),
        _text(f'{SPECIES_POS} note="open'),
        frame("last", ["O", "H"], [[0, 0, 0], [0, 0, 1]], energy=-2.0),
    ]
    path = write_frames(tmp_path / "f.xyz", texts)
    assert "atom 0 has 5 columns" in _refusal(path)
    dataset = open_dataset("extxyz", str(path), options=ReadOptions(keep_bad=True))
    assert list(dataset.sample_ids) == ["good", "wide", "infinite", "3", "last"]
    found = find_bad_samples(dataset, Demands("train"))
    assert [name for name, _ in found] == ["wide", "infinite", "3"]
    assert dataset[4].energy == -2
