"""The header line of an extended-XYZ frame: keys, values and flags, read strictly.

ASE's reader lets an empty value or a stray quote swallow the keys that follow. Here
such a line is read as it was meant, or refused.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.datasets.numerals import FLAGS, parse_number

_CLOSING = {'"': '"', "'": "'", "{": "}", "[": "]"}
# What ends a bare key.
_KEY = re.compile(r"[^\s=]+")
_SPACE = re.compile(r"\s*")
_BARE = re.compile(r"\S+")
_QUOTED = {
    # As ASE writes it: a backslash stands for itself unless a quote follows.
    '"': re.compile(r'"((?:\\"|[^"])*)"'),
    "'": re.compile(r"'((?:\\'|[^'])*)'"),
    "{": re.compile(r"\{([^{}]*)\}"),
}
_SEPARATORS = re.compile(r"[\s,]+")
# No value has one of these in it: such a value has swallowed a key.
_SWALLOWED = re.compile(
    r"(?:energy|energies|lattice|properties|pbc|forces?|virials?|stress)\s*=", re.I
)
_BARE_CELL = re.compile(r"\b(lattice|cell|properties)\b[^\w=]*\d", re.I)
_ID_INSIDE = re.compile(r"\b(sample_id|sid|fid)\s*=", re.I)
_IDS = ("sample_id", "sid", "fid")
# Keys after which a bare word, separated by a blank, may be a flag of its own.
_OWN_VALUE = {*_IDS, "energy", "lattice", "cell", "pbc"}


class Malformed(ValueError):
    """A frame that does not follow the format; the message says where."""


@dataclass(frozen=True, slots=True)
class Word:
    """Text of a value as it is in the line; None is a flag without one."""

    text: str | None
    nested: bool = False


def header_words(line: str) -> dict[str, Word]:
    """Keys of a header line and their values; empty for a comment without ``=``.

    Raises
    ------
    Malformed
        Quotes do not match, a key is there twice, or a value swallows a key.
    """
    if "=" not in line:
        _refuse_bare_cell(line)
        return {}
    found: dict[str, Word] = {}
    for key, word in _pairs(line):
        if word.text is None:
            _refuse_bare_cell(f"{key} 0")
        if word.text is not None and (swallowed := _SWALLOWED.search(word.text)):
            raise Malformed(
                f"the value of {key!r} contains {swallowed.group()!r}, as if it had "
                "swallowed a key; give it quotes that match, or remove it"
            )
        if found.setdefault(key, word) != word:
            raise Malformed(f"the key {key!r} is there twice")
    _refuse_swallowed_ids(found)
    return found


def _refuse_bare_cell(text: str) -> None:
    """A cell is no comment; with ``Lattice: 5 0 0 …`` it would be one."""
    if (found := _BARE_CELL.search(text)) is not None:
        raise Malformed(f"{found.group(1)!r} is not followed by '='")


def _refuse_swallowed_ids(words: dict[str, Word]) -> None:
    """A note may have an old id in it, but not the only one that the frame has."""
    known = {key.lower() for key in words}
    for key, word in words.items():
        for name in _ID_INSIDE.findall(word.text or ""):
            if name.lower() not in known:
                raise Malformed(
                    f"the value of {key!r} contains '{name}=', as if it had swallowed "
                    "the key; give it quotes that match, or remove it"
                )


def parse_word(word: Word) -> Any:
    """A value as numbers, flags, text, or what its JSON says; a flag is True."""
    text = word.text
    if text is None:
        return True
    if text.startswith("_JSON "):
        return _json(text.removeprefix("_JSON "))
    parts = [part for part in _SEPARATORS.split(text) if part]
    if not parts:
        return text
    numbers = [parse_number(part) for part in parts]
    if None not in numbers:
        return numbers[0] if len(numbers) == 1 else np.array(numbers)
    if all(part in FLAGS for part in parts):
        flags = [FLAGS[part] for part in parts]
        return flags[0] if len(flags) == 1 else np.array(flags)
    return text


def _pairs(line: str) -> Iterator[tuple[str, Word]]:
    at = _skip(line, 0)
    while at < len(line):
        key, at = _key(line, at)
        following = _skip(line, at)
        if line[following : following + 1] != "=":
            yield key, Word(None)
        else:
            word, following = _value(line, following + 1, key)
            yield key, word
        at = following


def _key(line: str, at: int) -> tuple[str, int]:
    """The key, flag or word of a comment that begins at ``at``, and where it ends."""
    if line[at] == '"':
        return _read_enclosed(line, at)
    match = _KEY.match(line, at)
    if match is None:
        raise Malformed(f"there is no key before {line[at : at + 20]!r}")
    if '"' in match.group():
        raise Malformed(f"a quote stands in the middle of {match.group()!r}")
    return match.group(), match.end()


def _value(line: str, at: int, key: str) -> tuple[Word, int]:
    """The value after the ``=`` of ``key``, and where the next key begins."""
    begin = _skip(line, at)
    if begin == len(line):
        return Word(""), begin
    if begin > at and _is_key(line, begin, key):
        return Word(""), begin
    mark = line[begin]
    if mark == "[":
        text, end = _brackets(line, begin)
        # Commas part the numbers of arrays; brackets in them only the rows.
        inner = text[1:-1]
        return Word(re.sub(r"[\[\]]", " ", inner), "[" in inner), _skip(line, end)
    if mark in _CLOSING:
        text, end = _read_enclosed(line, begin)
        return Word(text), _skip(line, end)
    match = _BARE.match(line, begin)
    assert match is not None
    if '"' in match.group():
        raise Malformed(f"a quote stands in the middle of {match.group()!r}")
    return Word(match.group()), _skip(line, match.end())


def _is_key(line: str, at: int, before: str) -> bool:
    """Whether what begins at ``at``, after ``before= ``, is a key and no value."""
    if line[at] in _CLOSING:
        return False
    match = _BARE.match(line, at)
    assert match is not None
    word = match.group()
    following = _skip(line, match.end())
    if "=" in word or line[following : following + 1] == "=":
        return True
    if (
        before.lower() in _OWN_VALUE
        and parse_number(word) is None
        and word not in FLAGS
    ):
        raise Malformed(f"it is not clear whether {word!r} is the value of {before!r}")
    return False


def _read_enclosed(line: str, at: int) -> tuple[str, int]:
    """Text in the quotes or braces that begin at ``at``, and where they end."""
    mark = line[at]
    match = _QUOTED[mark].match(line, at)
    if match is None:
        raise Malformed(f"the {mark} before {line[at + 1 : at + 21]!r} is not closed")
    rest = line[match.end() : match.end() + 1]
    if rest and rest != "=" and not rest.isspace():
        raise Malformed(f"there is no blank after {match.group()[-20:]!r}")
    return match.group(1).replace(f"\\{mark}", mark), match.end()


def _brackets(line: str, at: int) -> tuple[str, int]:
    depth = 0
    for end in range(at, len(line)):
        depth += {"[": 1, "]": -1}.get(line[end], 0)
        if depth == 0:
            if line[end + 1 : end + 2].strip():
                raise Malformed(f"there is no blank after {line[at : end + 1][-20:]!r}")
            return line[at : end + 1], end + 1
    raise Malformed(f"the [ before {line[at + 1 : at + 21]!r} is not closed")


def _skip(line: str, at: int) -> int:
    match = _SPACE.match(line, at)
    assert match is not None
    return match.end()


def _json(text: str) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    if isinstance(value, list):
        try:
            array = np.array(value)
        except ValueError:
            return value
        return array if array.dtype.kind in "bif" else value
    return value
