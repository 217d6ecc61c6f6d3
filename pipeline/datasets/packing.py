"""Bytes of packed files, and what files look like that are none of ours."""

import bz2
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.datasets.paths import PACKED
from pipeline.errors import DataError

_MAGIC = {
    ".xz": b"\xfd7zXZ\0",
    ".gz": b"\x1f\x8b",
    ".bz2": b"BZh",
    ".zst": b"\x28\xb5\x2f\xfd",
}
_HEAD = 512
_UNPACK = "unpack it first"
# What files begin with, what they are then, and the remedy.
_STRANGERS = (
    (
        b"version https://git-lfs",
        "a pointer of Git LFS",
        "fetch the file: git lfs pull",
    ),
    (b"\xfd7zXZ\0", "a file that is packed twice", _UNPACK),
    (b"\x1f\x8b", "a file that is packed twice", _UNPACK),
    (b"BZh", "a file that is packed twice", _UNPACK),
    (b"\x28\xb5\x2f\xfd", "a file that is packed twice", _UNPACK),
    (b"\x5d\0\0", "a file packed by lzma", _UNPACK),
    (b"\x1f\x9d", "a file packed by compress", _UNPACK),
    (b"PK\x03\x04", "a zip archive", _UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (b"\x89HDF\r\n", "an HDF5 file", "choose another format"),
    (b"SQLite format 3", "a database of SQLite", "try format: ase_db"),
    (b"\x93NUMPY", "an array of numpy", "choose another format"),
    (b"- of Ulm", "a trajectory of ASE", "choose another format"),
    (b"\xff\xfe", "text in UTF-16", "convert it to UTF-8"),
    (b"\xfe\xff", "text in UTF-16", "convert it to UTF-8"),
    (b"%PDF", "a PDF document", "fetch the file again"),
    (b"ITEM: TIMESTEP", "a dump of LAMMPS", "convert it to extended XYZ"),
)
_TAR = 257, b"ustar"
_BOM = b"\xef\xbb\xbf"


def is_packed(path: Path) -> bool:
    """Whether the file has to be unpacked, by its name or its first bytes."""
    if path.suffix in PACKED:
        return True
    with path.open("rb") as stream:
        return packer_of(stream.read(8)) is not None


def unpack_file(path: Path) -> tuple[bytes, bool]:
    """The text of a file, as far as it can be unpacked, and whether that is all.

    Raises
    ------
    DataError
        It is missing, damaged, or of another kind; says what it looks like.
    """
    try:
        raw = path.read_bytes()
        suffix = packer_of(raw)
        if suffix is None:
            # A browser may have unpacked it and kept the name.
            refuse_stranger(path, raw)
        text, complete = (raw, True) if suffix is None else _UNPACKERS[suffix](raw)
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{path} does not exist.") from None
    except (OSError, EOFError, ValueError, RuntimeError) as error:
        raise _damaged_error(path, error) from None
    except (lzma.LZMAError, zlib.error) as error:
        raise _damaged_error(path, error) from None
    if suffix is not None:
        refuse_stranger(path, text)
    return text, complete


def refuse_stranger(path: Path, raw: bytes) -> None:
    """Raise DataError where bytes are the beginning of something else than text."""
    head = raw[:_HEAD]
    start = head.removeprefix(_BOM).lstrip().lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise _stranger(path, "a web page", "the download failed, fetch it again")
    if head[_TAR[0] :].startswith(_TAR[1]):
        raise _stranger(path, "a tar archive", _UNPACK)
    for beginning, kind, remedy in _STRANGERS:
        if head.startswith(beginning):
            raise _stranger(path, kind, remedy)
    if b"\0" in head[:64]:
        kind = "a binary file, or text in UTF-16"
        raise _stranger(path, kind, "choose another format, or convert it to UTF-8")


def packer_of(raw: bytes) -> str | None:
    """Return the suffix of the packer whose mark the bytes begin with, or None."""
    return next((s for s, magic in _MAGIC.items() if raw.startswith(magic)), None)


def _stranger(path: Path, kind: str, remedy: str) -> DataError:
    return DataError(f"{path} looks like {kind}, which kd-cache cannot read; {remedy}.")


def _damaged_error(path: Path, error: Exception) -> DataError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return DataError(f"{path} is damaged or cannot be read ({reason}).")


def _in_parts(new: Callable[[], Any]) -> Callable[[bytes], tuple[bytes, bool]]:
    """Unpacks what a decompressor takes, streams that follow each other as one."""

    def unpack(raw: bytes) -> tuple[bytes, bool]:
        pieces = []
        while raw:
            packer = new()
            pieces.append(packer.decompress(raw))
            if not packer.eof:
                return b"".join(pieces), False
            raw = packer.unused_data.lstrip(b"\0")
        return b"".join(pieces), bool(pieces)

    return unpack


def _zstd(raw: bytes) -> tuple[bytes, bool]:
    from numcodecs import zstd

    return bytes(zstd.decompress(raw)), True


_UNPACKERS: dict[str, Callable[[bytes], tuple[bytes, bool]]] = {
    ".xz": _in_parts(lzma.LZMADecompressor),
    ".gz": _in_parts(lambda: zlib.decompressobj(wbits=31)),
    ".bz2": _in_parts(bz2.BZ2Decompressor),
    ".zst": _zstd,
}
