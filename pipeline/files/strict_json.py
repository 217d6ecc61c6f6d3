"""JSON that refuses a key which occurs twice."""

import json
from typing import Any


def parse_json(text: str) -> Any:
    """The JSON value of ``text``; ValueError where it is none or has a key twice."""
    return json.loads(text, object_pairs_hook=_once_each)


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} is there twice; keep one of them")
        found[key] = value
    return found
