"""Datasets in small: frames of the embedded collisions, and frames made by hand."""

import gzip
import lzma
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

DEMO = Path(__file__).parents[1] / "cache_specs" / "demo"


def collision_frames(count: int, first: int = 0, split: str = "train") -> list[str]:
    """Text of ``count`` frames of the embedded set; ids and sizes vary."""
    # Neighbouring frames belong to one collision; a stride mixes compositions.
    frames = _demo_frames(split)
    return [frames[(first + i) * 11 % len(frames)] for i in range(count)]


@lru_cache(maxsize=2)
def _demo_frames(split: str) -> tuple[str, ...]:
    packed = (DEMO / f"collisions_{split}.extxyz.xz").read_bytes()
    lines = lzma.decompress(packed).decode().splitlines(keepends=True)
    frames = []
    begin = 0
    while begin < len(lines):
        end = begin + 2 + int(lines[begin])
        frames.append("".join(lines[begin:end]))
        begin = end
    return tuple(frames)


def frame(
    sample_id: str | None,
    symbols: Sequence[str],
    positions: Sequence[Sequence[float]],
    *,
    energy: float | None = None,
    forces: Sequence[Sequence[float]] | None = None,
    columns: dict[str, tuple[str, Sequence[object]]] | None = None,
    header: str = 'pbc="F F F"',
) -> str:
    """One extended-XYZ frame; ``columns`` maps a name to its type letter and values."""
    properties = "species:S:1:pos:R:3"
    rows = [
        f"{s} " + " ".join(f"{x:.8f}" for x in p)
        for s, p in zip(symbols, positions, strict=True)
    ]
    if forces is not None:
        properties += ":forces:R:3"
        rows = [
            f"{row} " + " ".join(f"{x:.8f}" for x in f)
            for row, f in zip(rows, forces, strict=True)
        ]
    for name, (letter, values) in (columns or {}).items():
        properties += f":{name}:{letter}:1"
        rows = [f"{row} {value}" for row, value in zip(rows, values, strict=True)]
    words = [f"Properties={properties}", header]
    if energy is not None:
        words.append(f"energy={energy}")
    if sample_id is not None:
        words.append(f"sample_id={sample_id}")
    return "\n".join([str(len(rows)), " ".join(words), *rows]) + "\n"


def write_frames(path: Path, frames: Iterable[str]) -> Path:
    """``path`` with ``frames`` in it, packed as its suffix says."""
    raw = "".join(frames).encode()
    if path.suffix == ".xz":
        raw = lzma.compress(raw, preset=0)
    elif path.suffix == ".gz":
        raw = gzip.compress(raw)
    path.write_bytes(raw)
    return path
