"""Numbers and flags as people and programs write them into text files."""

import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

FLAGS = {
    **dict.fromkeys(("T", "True", "true", "TRUE"), True),
    **dict.fromkeys(("F", "False", "false", "FALSE"), False),
}
_ZERO_ONE = {**FLAGS, "1": True, "0": False}
_INTEGER = re.compile(r"[+-]?[0-9]+")
# Fortran's double precision, and numpy's way to print a scalar.
_FORTRAN = re.compile(r"([+-]?[0-9]*\.?[0-9]*)[dD]([+-]?[0-9]+)")
_NUMPY = re.compile(r"(?:np|numpy)\.(?:float|int|uint)[0-9]+\(([^()]*)\)")


def parse_number(text: str) -> int | float | None:
    """``text`` as a number; None where it is none."""
    if _INTEGER.fullmatch(text) and len(text) < 19:
        return int(text)
    try:
        return _real(text)
    except ValueError:
        return None


def reals(texts: Sequence[str]) -> npt.NDArray[np.float64]:
    """Numbers of one or more columns, (n,); ValueError where one is none."""
    try:
        numbers = np.array(list(map(float, texts)), np.float64)
    except ValueError:
        return np.array([_real(text) for text in texts], np.float64)
    joined = "".join(texts)
    if "_" in joined or not joined.isascii():
        return np.array([_real(text) for text in texts], np.float64)
    return numbers


def flags(texts: Sequence[str]) -> npt.NDArray[np.bool_]:
    """True and false as T and F, words, or 1 and 0, (n,).

    Raises
    ------
    ValueError
        A text is none of these; names it.
    """
    return np.array([_flag(text) for text in texts], np.bool_)


def _flag(text: str) -> bool:
    known = _ZERO_ONE.get(text)
    if known is not None:
        return known
    number = parse_number(text)
    if number in (0, 1):
        return bool(number)
    raise ValueError(f"{text!r} is neither true nor false")


def _real(text: str) -> float:
    if (match := _NUMPY.fullmatch(text)) is not None:
        text = match.group(1)
    if (match := _FORTRAN.fullmatch(text)) is not None:
        text = f"{match.group(1)}e{match.group(2)}"
    # Python takes 1_000 and digits of other scripts for numbers.
    if "_" in text or not text.isascii():
        raise ValueError(f"{text!r} is no number")
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{text!r} is no number") from None
