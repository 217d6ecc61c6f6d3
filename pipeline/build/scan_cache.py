"""What passes over the datasets of a store found: ``STORE.scan-cache`` beside it.

So that no other process makes them again: the workers of a build, the jobs of an array,
the next command. It holds while all files of a dataset have the sizes and times that
they had; without it, or with a damaged one, passes are made anew.
"""

import hashlib
import io
import json
import logging
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from filelock import FileLock

from pipeline.build.contents import Contents
from pipeline.build.scan import Hashes, Scan
from pipeline.datasets import IndexedDataset, Lister, Listing
from pipeline.files.atomic import write_atomically
from pipeline.parallel.ordered_map import OrderedMap
from pipeline.spec.id_list import digest_ids, read_ids
from pipeline.spec.sections import SplitSpec

log = logging.getLogger("pipeline.build.scan_cache")
Columns = dict[str, npt.NDArray[Any]]

_VERSION = 2
_PLACE = "place_"
# Keys of a split that say nothing of its samples, or of which the content counts.
_NO_MATTER = {"path", "source", "features", "check_energy_kind", "ids"}


class CachedScan(NamedTuple):
    """Checksums and hashes (n,) of the samples of a split, and counts of them."""

    structure_hashes: Hashes
    sample_hashes: Hashes
    contents: Contents


class ScanCache:
    """The folder beside the store at ``store``, made with the first thing to keep."""

    def __init__(self, store: Path) -> None:
        self.folder = store.with_name(store.name + ".scan-cache")
        self._keys: dict[str, str] = {}

    def lister(self, name: str, split: SplitSpec, run: OrderedMap) -> Lister:
        """Gives the listing of split ``name``: the one kept, else made by ``run``.

        Of several processes that ask at once, one makes it.
        """

        def listing(dataset: IndexedDataset) -> Listing:
            self._keys[name] = key = _key(split, dataset)
            if dataset.keeps_samples:
                return dataset.list_samples(run)
            found = self._read_listing(name, key, dataset.columns)
            if found is not None:
                return found
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / f".{name}.lock"):
                found = self._read_listing(name, key, dataset.columns)
                if found is None:
                    found = dataset.list_samples(run)
                    self._write(f"{name}.listing", key, _listing_columns(found))
            return found

        return listing

    def key(self, name: str) -> str:
        """Return what identifies the samples of an opened split."""
        return self._keys[name]

    def scan(
        self, name: str, content_sha256: str, virials_sha256: str | None, n_samples: int
    ) -> CachedScan | None:
        """What is kept of a pass over the content of an opened split.

        None where those kept are not of its files as they are now, or not of this
        ``content_sha256`` and ``virials_sha256``.
        """
        found = self._read(f"{name}.scan", self._keys[name])
        if found is None or str(found.get("content")) != content_sha256:
            return None
        if str(found.get("virials", "")) != (virials_sha256 or ""):
            return None
        none = np.zeros(0)
        checksums, hashes = found.get("checksums", none), found.get("hashes", none)
        if not (
            _fits(checksums, "uint64", n_samples) and _fits(hashes, "uint64", n_samples)
        ):
            return None
        contents = _read_contents(found, n_samples)
        return None if contents is None else CachedScan(checksums, hashes, contents)

    def save_scan(self, name: str, scan: Scan) -> None:
        """Keep what a pass over the content of an opened split found."""
        columns = {
            "content": np.array(scan.content_sha256),
            "virials": np.array(scan.virials_sha256 or ""),
            "checksums": scan.structure_hashes,
            "hashes": scan.sample_hashes,
            "contents": np.array(json.dumps(scan.contents.to_dict())),
        }
        self._write(f"{name}.scan", self._keys[name], columns)

    def _read_listing(
        self, name: str, key: str, places: dict[str, str]
    ) -> Listing | None:
        columns = self._read(f"{name}.listing", key)
        if columns is None:
            return None
        wanted = {_PLACE + place: dtype for place, dtype in places.items()}
        wanted |= {"n_atoms": "int32", "id_lengths": "int32"}
        count = columns.get("n_atoms", np.zeros(0)).size
        sound = all(
            name in columns and _fits(columns[name], dtype, count)
            for name, dtype in wanted.items()
        )
        ids = _split_text(columns) if sound else None
        if ids is None:
            return None
        found = {place: columns[_PLACE + place] for place in places}
        return Listing(ids, columns["n_atoms"], found)

    def _read(self, name: str, key: str) -> Columns | None:
        try:
            with np.load(self._file(name), allow_pickle=False) as archive:
                columns = {column: archive[column] for column in archive.files}
        except (OSError, EOFError, ValueError, zipfile.BadZipFile):
            return None
        return columns if str(columns.pop("made_from", "")) == key else None

    def _write(self, name: str, key: str, columns: Columns) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, made_from=np.array(key), **columns)
        with FileLock(self.folder / ".lock"):
            for orphan in self.folder.glob("*.partial"):
                orphan.unlink()
            write_atomically(self._file(name), buffer.getbuffer())
        log.info("%s: %.1f MB cached", self._file(name), buffer.tell() / 1e6)

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.npz"


def _key(split: SplitSpec, dataset: IndexedDataset) -> str:
    """Hash of what decides which samples a split has, files by name, size and time."""
    root = Path(dataset.path)
    files = []
    for file in dataset.files():
        status = file.stat()
        inside = file.relative_to(root) if file.is_relative_to(root) else file
        files.append((str(inside), status.st_size, status.st_mtime_ns))
    document = [_VERSION, split.model_dump(exclude=_NO_MATTER), files]
    if split.ids is not None:
        document.append(digest_ids(read_ids(Path(split.ids), "ids")))
    return hashlib.sha256(json.dumps(document).encode()).hexdigest()


def _listing_columns(listing: Listing) -> Columns:
    text = "".join(listing.ids).encode()
    return {
        "ids": np.frombuffer(text, np.uint8),
        "id_lengths": np.array([len(name) for name in listing.ids], np.int32),
        "n_atoms": listing.n_atoms,
        **{_PLACE + name: column for name, column in listing.places.items()},
    }


def _read_contents(columns: Columns, n_samples: int) -> Contents | None:
    """The counts, None where they are no such or of other samples."""
    try:
        contents = Contents.from_dict(json.loads(str(columns["contents"])))
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
    return contents if contents.frames == n_samples else None


def _split_text(columns: Columns) -> list[str] | None:
    """The ids, whose characters lie one after the other; None where they do not fit."""
    lengths = columns["id_lengths"].astype(np.int64)
    try:
        text = columns["ids"].tobytes().decode()
    except (KeyError, UnicodeDecodeError):
        return None
    if lengths.min(initial=0) < 0 or lengths.sum() != len(text):
        return None
    ends = np.cumsum(lengths).tolist()
    return [text[a:b] for a, b in zip([0, *ends], ends, strict=False)]


def _fits(column: npt.NDArray[Any], dtype: str, count: int) -> bool:
    return column.dtype == dtype and column.shape == (count,)
