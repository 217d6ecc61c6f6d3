"""Text of extended XYZ: unpacked, cut into frames, and one frame as ASE atoms."""

import io
import lzma
import re
import threading
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import ase.io
import numpy as np
import numpy.typing as npt
from ase import Atoms

from pipeline.datasets.labels import Record
from pipeline.datasets.paths import PACKED
from pipeline.datasets.samples import fixed_atoms, pair_id
from pipeline.errors import DataError

SUFFIXES = (".extxyz", ".xyz")
UNPACKED_BYTES = 1 << 29
_HEADER_VALUE = r"""(?:^|\s){}=(?:"([^"]+)"|([^\s"]+))"""
_IDS = {k: re.compile(_HEADER_VALUE.format(k)) for k in ("sample_id", "sid", "fid")}


@dataclass(frozen=True)
class Span:
    """Where a frame lies in the unpacked text of its file."""

    start: int
    stop: int
    n_atoms: int


def unpacked_text(path: Path) -> bytes:
    """The text of a plain, .gz or .xz file.

    Raises
    ------
    DataError
        It is missing or damaged; if it is cut off, names the frame where it ends.
    """
    try:
        raw = path.read_bytes()
        text, complete = _unpack(raw, path.suffix)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist.") from None
    except (OSError, lzma.LZMAError, zlib.error) as error:
        raise DataError(f"{path} is damaged or cannot be read ({error}).") from None
    if not complete:
        last = len(frame_spans(path, text, complete=False))
        raise DataError(
            f"{path} is damaged: it breaks off in sample {last}, counted from 0; fetch "
            "it again."
        )
    return text


def _unpack(raw: bytes, suffix: str) -> tuple[bytes, bool]:
    """Whatever can be unpacked, and whether that is everything."""
    if suffix not in PACKED:
        return raw, True
    pieces = []
    while raw:
        packer = (
            lzma.LZMADecompressor() if suffix == ".xz" else zlib.decompressobj(wbits=31)
        )
        pieces.append(packer.decompress(raw))
        if not packer.eof:
            return b"".join(pieces), False
        raw = packer.unused_data.lstrip(b"\0")
    return b"".join(pieces), bool(pieces)


def frame_spans(path: Path, text: bytes, *, complete: bool = True) -> list[Span]:
    """All frames of a text; of one that is not ``complete``, the whole ones.

    Raises
    ------
    DataError
        There is a gap, something that is no frame, or the last one is cut off.
    """
    text = text.rstrip()
    breaks = np.flatnonzero(np.frombuffer(text, np.uint8) == ord("\n"))
    starts = [0, *(breaks + 1).tolist(), len(text) + 1] if text else [0]
    spans: list[Span] = []
    line = 0
    while line < len(starts) - 1:
        n_atoms = _n_atoms(path, text[starts[line] : starts[line + 1]], line)
        line += 2 + n_atoms
        if line >= len(starts):
            if not complete:
                break
            raise DataError(
                f"{path} is damaged: it breaks off in sample {len(spans)}, counted "
                "from 0; fetch it again."
            )
        start = spans[-1].stop if spans else 0
        spans.append(Span(start, starts[line], n_atoms))
    return spans


def _n_atoms(path: Path, words: bytes, line: int) -> int:
    reason = "there is a gap between frames"
    if words.strip():
        reason = "a frame should begin"
        try:
            if (count := int(words)) >= 0:
                return count
        except ValueError:
            pass
    raise DataError(
        f"{path} cannot be read as extended XYZ ({reason} at line {line + 1}); it is "
        "damaged or of another format."
    )


def parse_frame(path: Path, text: bytes, number: int) -> tuple[Atoms, str]:
    """One frame and its header line.

    Raises
    ------
    DataError
        ASE cannot read it; names the file and the running number of the frame.
    """
    try:
        words = text.decode()
        (atoms,) = ase.io.iread(io.StringIO(words), ":", format="extxyz")
        return atoms, words.splitlines()[1]
    except Exception as error:
        # ASE's parser raises a different class for every way a frame can be torn.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{path}: sample {number} cannot be read as extended XYZ ({reason}); the "
            "file is damaged or of another format."
        ) from None


def header_id(header: str) -> str | None:
    """Id in a header line: ``sample_id``, else ``sid`` with ``fid``, else None."""
    # From the text: ASE would turn the id 007 into the number 7.
    found = {name: pattern.search(header) for name, pattern in _IDS.items()}
    words = {name: m.group(1) or m.group(2) for name, m in found.items() if m}
    if "sample_id" in words:
        return words["sample_id"]
    if "sid" in words and "fid" in words:
        return pair_id(words["sid"], words["fid"])
    return None


def frame_record(path: Path, text: bytes, number: int) -> tuple[str | None, Record]:
    """Id, if the header has one, and content of a frame; errors of `parse_frame`."""
    atoms, header = parse_frame(path, text, number)
    return header_id(header), atoms_record(atoms)


def atoms_record(atoms: Atoms) -> Record:
    """All that ASE atoms have; constraints do not change the forces."""
    results = atoms.calc.results if atoms.calc is not None else {}
    if "fixed" in atoms.arrays:
        fixed: npt.NDArray[np.bool_] = atoms.arrays["fixed"]
    else:
        # ASE turns a move_mask column into constraints.
        fixed = fixed_atoms([c.todict() for c in atoms.constraints], len(atoms))
    return Record(
        atomic_numbers=atoms.numbers,
        positions=atoms.positions,
        cell=atoms.cell.array,
        pbc=atoms.pbc,
        tags=atoms.arrays.get("tags"),
        fixed=fixed,
        properties=atoms.info | atoms.arrays | results,
    )


class TextCache:
    """Pieces of files, packed ones kept unpacked up to ``budget`` bytes together."""

    def __init__(self, budget: int = UNPACKED_BYTES) -> None:
        self._budget = budget
        self._texts: OrderedDict[tuple[Path, int, int], bytes] = OrderedDict()
        self._lock = threading.Lock()

    def piece(self, path: Path, start: int, stop: int) -> bytes:
        """Bytes ``start`` to ``stop`` of the unpacked text."""
        if path.suffix in PACKED:
            return self._text(path)[start:stop]
        with path.open("rb") as stream:
            stream.seek(start)
            return stream.read(stop - start)

    def _text(self, path: Path) -> bytes:
        status = path.stat()
        key = (path, status.st_mtime_ns, status.st_size)
        with self._lock:
            if key not in self._texts:
                self._texts[key] = unpacked_text(path)
            self._texts.move_to_end(key)
            text = self._texts[key]
            while len(self._texts) > 1 and self._held() > self._budget:
                self._texts.popitem(last=False)
        return text

    def _held(self) -> int:
        return sum(len(text) for text in self._texts.values())
