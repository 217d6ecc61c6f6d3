"""Text of extended XYZ: unpacked, cut into frames, and kept within a budget."""

import re
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.datasets.packing import is_packed, unpack_file
from pipeline.errors import DataError

SUFFIXES = (".extxyz", ".xyz")
UNPACKED_BYTES = 1 << 29
_COUNT = re.compile(rb"\s*\+?[0-9]{1,15}\s*")
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Span:
    """Where a frame lies in the unpacked text of its file."""

    start: int
    stop: int
    n_atoms: int


def read_unpacked(path: Path) -> bytes:
    """The text of a plain or packed file.

    Raises
    ------
    DataError
        It is missing, damaged or no text; if it is cut off, names the frame where it
        ends.
    """
    text, complete = unpack_file(path)
    if not complete:
        last = len(frame_spans(path, text, complete=False))
        raise DataError(
            f"{path} is damaged: it breaks off in sample {last}, counted from 0; fetch "
            "it again."
        )
    return text


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
    if line == 0:
        words = words.removeprefix(_BOM)
    reason = "there is a gap between frames"
    if words.strip():
        reason = "a frame should begin"
        if _COUNT.fullmatch(words):
            return int(words)
    raise DataError(
        f"{path} cannot be read as extended XYZ ({reason} at line {line + 1}); it is "
        "damaged or of another format."
    )


class TextCache:
    """Pieces of files, packed ones kept unpacked up to ``budget`` bytes together."""

    def __init__(self, budget: int = UNPACKED_BYTES) -> None:
        self._budget = budget
        self._texts: OrderedDict[tuple[Path, int, int], bytes] = OrderedDict()
        self._lock = threading.Lock()

    def piece(self, path: Path, start: int, stop: int) -> bytes:
        """Bytes ``start`` to ``stop`` of the unpacked text."""
        if is_packed(path):
            return self._text(path)[start:stop]
        with path.open("rb") as stream:
            stream.seek(start)
            return stream.read(stop - start)

    def _text(self, path: Path) -> bytes:
        status = path.stat()
        key = (path, status.st_mtime_ns, status.st_size)
        with self._lock:
            if key not in self._texts:
                self._texts[key] = read_unpacked(path)
            self._texts.move_to_end(key)
            text = self._texts[key]
            while len(self._texts) > 1 and self._held() > self._budget:
                self._texts.popitem(last=False)
        return text

    def _held(self) -> int:
        return sum(len(text) for text in self._texts.values())
