"""Headers of extended XYZ by the thousand: read as they were meant, or refused.

``EXTXYZ_EXAMPLES=10000 pytest --timeout=0`` tries so many of each kind.
"""

import io
import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ase
import ase.io
import numpy as np
import pytest
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from pipeline.datasets import open_dataset
from pipeline.errors import DataError
from pipeline.structure import Sample

EXAMPLES = int(os.environ.get("EXTXYZ_EXAMPLES", "200"))
FUZZ = settings(
    max_examples=EXAMPLES,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
# Keys of the format, which the frames have themselves.
_OWN = {"lattice", "properties", "pbc", "energy", "cell", "forces", "force"}
_OWN |= {"sample_id", "sid", "fid", "tags", "fixed", "move_mask", "uid"}

_numbers = st.integers(-(10**6), 10**6).map(lambda n: n / 1000)
_symbols = st.sampled_from(["H", "C", "O", "Si", "Cu", "Pt", "Og"])
_keys = st.from_regex(r"[A-Za-z_][A-Za-z0-9_-]{0,6}", fullmatch=True).filter(
    lambda key: key.lower() not in _OWN | {"stress", "virial"}
)
_plain_text = st.text("abcXYZ019+-._:/()#%,", min_size=1, max_size=8)
# Quotes, blanks, backslashes and names of keys: all that swallows what follows.
_nasty_text = st.lists(
    st.sampled_from(
        ["", " ", '"', "'", "\\", "=", "{", "}", "[", "]", ",", "a", "é", "\u2028", "T"]
        + ["energy=", "energy=-9", "Lattice=", "sample_id=b", "pbc=", "forces", "-1"]
    ),
    max_size=6,
).map("".join)
_values = st.one_of(
    _plain_text, _nasty_text, st.integers(-99, 99), _numbers, st.booleans(), st.none()
)


@dataclass(frozen=True)
class Meant:
    """What a frame is meant to be."""

    symbols: list[str]
    positions: Any
    cell: Any
    pbc: list[bool]
    energy: float | None
    forces: Any
    fixed: list[bool]
    sample_id: str | None


@st.composite
def _meant(draw: Any) -> Meant:
    symbols = draw(st.lists(_symbols, min_size=1, max_size=4))
    vectors = st.lists(_numbers, min_size=3, max_size=3)
    rows = st.lists(vectors, min_size=len(symbols), max_size=len(symbols))
    periodic = draw(st.booleans())
    cell = np.eye(3) * 5 + np.array(draw(st.lists(vectors, min_size=3, max_size=3)))
    pbc = draw(st.lists(st.booleans(), min_size=3, max_size=3))
    flags = st.lists(st.booleans(), min_size=len(symbols), max_size=len(symbols))
    return Meant(
        symbols,
        np.array(draw(rows)),
        cell if periodic and cell.any() else None,
        pbc if periodic and cell.any() else [False] * 3,
        draw(st.none() | _numbers),
        np.array(draw(rows)) if draw(st.booleans()) else None,
        draw(flags),
        draw(st.none() | st.text("ab01-_.", min_size=1, max_size=4)),
    )


@FUZZ
@given(_meant(), st.dictionaries(_keys, _values, max_size=4))
def test_frames_that_ase_writes_are_read_or_refused(
    meant: Meant, info: dict[str, Any]
) -> None:
    """A7: no text in ``info`` changes a sample without a word."""
    atoms = ase.Atoms(meant.symbols, meant.positions, cell=meant.cell, pbc=meant.pbc)
    atoms.info = dict(info)
    if meant.sample_id is not None:
        atoms.info["sample_id"] = meant.sample_id
    if any(meant.fixed):
        atoms.set_constraint(FixAtoms(mask=meant.fixed))
    results = {"energy": meant.energy, "forces": meant.forces}
    known = {name: value for name, value in results.items() if value is not None}
    if known:
        atoms.calc = SinglePointCalculator(atoms, **known)
    stream = io.StringIO()
    ase.io.write(stream, atoms, format="extxyz")
    texts = [value for value in info.values() if isinstance(value, str)]
    harmless = not any(mark in text for text in texts for mark in "\\=\n'\"")
    _check(stream.getvalue(), meant, may_refuse=not harmless)


@st.composite
def _headers(draw: Any) -> tuple[Meant, str]:
    """A frame whose header is written by hand, in any order, case and quotes."""
    meant = draw(_meant())
    names, rows = "species:S:1:pos:R:3", _rows(meant.symbols, meant.positions)
    if meant.forces is not None:
        names += f":{_recased(draw, draw(st.sampled_from(['forces', 'force'])))}:R:3"
        rows = _rows(rows, meant.forces)
    names += f":fixed:{draw(st.sampled_from('LIS'))}:1"
    spelled = draw(st.sampled_from(["TF", "10", ("True", "False"), ("true", "false")]))
    rows = [
        f"{row} {spelled[not held]}"
        for row, held in zip(rows, meant.fixed, strict=True)
    ]
    words = [_word(draw, _recased(draw, "Properties"), names, spaced=False)]
    if meant.cell is not None:
        key = _recased(draw, draw(st.sampled_from(["Lattice", "cell"])))
        words.append(_word(draw, key, " ".join(map(repr, meant.cell.ravel().tolist()))))
    if meant.cell is None or not all(meant.pbc) or draw(st.booleans()):
        flags = " ".join("FT"[flag] for flag in meant.pbc)
        words.append(_word(draw, _recased(draw, "pbc"), flags))
    if meant.energy is not None:
        key = _recased(draw, "energy")
        words.append(_word(draw, key, repr(meant.energy), spaced=False))
    if meant.sample_id is not None:
        words.append(_word(draw, "sample_id", meant.sample_id, spaced=False))
    for key, value in draw(st.dictionaries(_keys, _plain_text, max_size=3)).items():
        words.append(_word(draw, key, value, spaced=False))
    words += draw(st.lists(_keys, max_size=2, unique=True))
    words += [f"{key}2=" for key in draw(st.lists(_keys, max_size=1))]
    words = draw(st.permutations(words))
    gap = draw(st.sampled_from([" ", "  ", "\t"]))
    return meant, "\n".join([str(len(rows)), gap.join(words), *rows]) + "\n"


@FUZZ
@given(_headers())
def test_headers_in_any_spelling_are_read_or_refused(pair: tuple[Meant, str]) -> None:
    """A3, A4, A16: order, case, quotes and blanks of keys change no sample."""
    meant, text = pair
    _check(text, meant, may_refuse=True)


@FUZZ
@given(_meant(), st.lists(_nasty_text, min_size=1, max_size=3), st.data())
def test_stray_text_between_keys_is_no_silent_difference(
    meant: Meant, stray: list[str], data: Any
) -> None:
    """A7, A15: whatever stands between keys, no label, cell or id is lost."""
    # With all keys of its own, no stray one can be meant.
    meant = replace(
        meant,
        cell=np.eye(3) * 5 if meant.cell is None else meant.cell,
        energy=-1.5 if meant.energy is None else meant.energy,
        sample_id=meant.sample_id or "x",
        fixed=[False] * len(meant.symbols),
    )
    rows = _rows(meant.symbols, meant.positions)
    properties = "species:S:1:pos:R:3"
    if meant.forces is not None:
        properties, rows = f"{properties}:forces:R:3", _rows(rows, meant.forces)
    cell = " ".join(map(repr, meant.cell.ravel().tolist()))
    flags = " ".join("FT"[flag] for flag in meant.pbc)
    words = [f"Properties={properties}", f'Lattice="{cell}"', f'pbc="{flags}"']
    words += [f"energy={meant.energy!r}", f"sample_id={meant.sample_id}"]
    keyed = [f"k{i}={text}" for i, text in enumerate(stray)]
    words = data.draw(st.permutations(words + keyed))
    text = "\n".join([str(len(rows)), " ".join(words), *rows]) + "\n"
    _check(text, meant, may_refuse=True)


def _recased(draw: Any, word: str) -> str:
    return draw(st.sampled_from([word, word.lower(), word.upper(), word.capitalize()]))


def _word(draw: Any, key: str, value: str, *, spaced: bool = True) -> str:
    """``key=value`` in one of the quotes that hold it, perhaps with blanks."""
    quotes = ['""', "''", "{}", "[]"] if spaced else ['""', "''", ""]
    quote = draw(st.sampled_from(quotes))
    text = f"{quote[:1]}{value}{quote[1:]}"
    return key + draw(st.sampled_from(["=", "=", " = ", "= ", " ="])) + text


def _rows(starts: list[str], vectors: Any) -> list[str]:
    return [
        f"{start} " + " ".join(map(repr, vector))
        for start, vector in zip(starts, vectors.tolist(), strict=True)
    ]


def _check(text: str, meant: Meant, *, may_refuse: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "f.xyz"
        path.write_text(text, newline="\n")
        found = _read(path)
    if isinstance(found, str):
        event("refused")
        assert may_refuse, f"{found}\n{text}"
        assert "\n" not in found
        return
    event("read")
    assert _differences(found, meant) == [], text


def _read(path: Path) -> Sample | str:
    """The only sample of a file, or why it is refused."""
    try:
        dataset = open_dataset("extxyz", str(path))
    except DataError as error:
        return str(error)
    assert len(dataset) == 1
    return dataset[0]


def _differences(sample: Sample, meant: Meant) -> list[str]:
    structure = sample.structure
    atoms = ase.Atoms(meant.symbols)
    energy = np.nan if meant.energy is None else meant.energy
    forces = np.full((len(atoms), 3), np.nan) if meant.forces is None else meant.forces
    cell = np.zeros((3, 3)) if meant.cell is None else meant.cell
    close: dict[str, tuple[Any, Any]] = {
        "numbers": (structure.atomic_numbers, atoms.numbers),
        "positions": (structure.positions, meant.positions),
        "cell": (structure.cell, cell),
        "pbc": (structure.pbc, meant.pbc),
        "energy": (sample.energy, energy),
        "forces": (sample.forces, np.asarray(forces, np.float32)),
        "fixed": (structure.fixed, meant.fixed),
    }
    found = [
        name
        for name, (ours, theirs) in close.items()
        if ours != pytest.approx(theirs, nan_ok=True, abs=1e-7)
    ]
    expected = meant.sample_id or "0"
    return found if sample.sample_id == expected else [*found, "id"]
