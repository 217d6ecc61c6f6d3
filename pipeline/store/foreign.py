"""What other programs do to metadata files of a sealed store, told from damage."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

_CONSOLIDATED = "consolidated_metadata"


@dataclass(frozen=True)
class Alteration:
    """A change to a metadata file that leaves all that this program reads.

    ``cleaned`` is the file's content without what should not be there; None where all
    may stay, as attributes of the user's may.
    """

    what: str
    cleaned: bytes | None


def find_alteration(
    content: bytes, sealed: Callable[[bytes], bool]
) -> Alteration | None:
    """How ``content`` came from the bytes that are ``sealed``; None where it is damage.

    Told apart are consolidated metadata, attributes added by a user, and other ends of
    lines or spaces, as an editor or a version control system makes them.
    """
    try:
        document = json.loads(content)
        attributes = dict(document.get("attributes", {}))
    except (ValueError, RecursionError, AttributeError, TypeError):
        return None
    consolidated = document.pop(_CONSOLIDATED, None) is not None
    for kept in _fewer(attributes):
        plain = _encode_document(document | {"attributes": kept})
        if "attributes" not in document:
            plain = _encode_document(document)
        if not sealed(plain):
            continue
        if consolidated:
            cleaned = (
                _encode_document(document) if len(kept) < len(attributes) else plain
            )
            return Alteration("holds consolidated metadata", cleaned)
        if len(kept) < len(attributes):
            return Alteration("has attributes of another program", None)
        if b"\r\n" in content:
            return Alteration("has Windows line ends", plain)
        return Alteration("was written anew with other spaces", plain)
    return None


def _fewer(attributes: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """``attributes``, then without the last, the last two and so on.

    Attributes that are added come last.
    """
    names = list(attributes)
    for count in range(len(names), -1, -1):
        yield {name: attributes[name] for name in names[:count]}


def _encode_document(document: dict[str, Any]) -> bytes:
    """``document`` as Zarr and the writer of stores write it."""
    return json.dumps(document, indent=2).encode()
