"""Patterns that stand for files, and names of files in counting order."""

import re
from collections.abc import Iterable
from pathlib import Path

_DIGITS = re.compile(r"(\d+)")


def is_glob(name: str) -> bool:
    """Whether ``name`` is a pattern and not a file or folder of that very name."""
    return any(mark in name for mark in "*?[") and not Path(name).exists()


def glob_matches(pattern: str) -> list[Path]:
    """Files and folders that ``pattern`` stands for, in counting order."""
    path = Path(pattern)
    root = Path(path.anchor) if path.is_absolute() else Path()
    parts = path.relative_to(root) if path.is_absolute() else path
    return sort_by_number(root.glob(str(parts)))


def sort_by_number(paths: Iterable[Path]) -> list[Path]:
    """``paths`` sorted by name, numbers in it by their values: 2 comes before 10."""
    return sorted(paths, key=lambda path: _counting_order(str(path)))


def _counting_order(name: str) -> list[tuple[int, str]]:
    parts = _DIGITS.split(name)
    return [(int(part), "") if part.isdigit() else (0, part) for part in parts]
