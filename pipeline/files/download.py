"""Files and folders behind URLs, brought to a local folder once and opened there."""

import hashlib
import json
import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock
from tqdm import tqdm

from pipeline.errors import DataError
from pipeline.files.atomic import disk_full_as_error, sync_folder
from pipeline.files.remote import RemoteFiles

log = logging.getLogger("pipeline.files.download")

FOLDER_VARIABLE = "KD_STAGE"
# Bytes that are asked for at a time, and lost at most when a transfer is cut off.
PIECE = 16 << 20
_FILES_AT_ONCE = 8
# What protocols call the mark that changes when the content does.
_MARKS = ("ETag", "etag", "md5Hash", "LastModified", "last_modified", "mtime")


@dataclass(frozen=True)
class RemoteFile:
    """A file below a URL, by its name there; "" where the URL is the file itself.

    ``mark`` is the server's word for its version, empty where it says none.
    """

    name: str
    size: int
    mark: str


def staging_folder() -> Path:
    """Where staged files lie: the folder of KD_STAGE, else one in the user's cache."""
    chosen = os.environ.get(FOLDER_VARIABLE)
    if chosen:
        return Path(chosen).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "kd-train" / "stage"


def download(url: str, folder: Path | None = None) -> Path:
    """Local copy of the file, or of all files of the folder, at ``url``.

    It is named by address, sizes and versions, so that what has changed is fetched anew
    and the copy there is complete. A transfer that was cut off goes on where it
    stopped; of several processes that ask at once, one fetches.

    Raises
    ------
    DataError
        There is nothing, the server does not answer or serves no byte ranges, or a file
        changed on the way.
    StoreError
        The disk is full.
    """
    folder = staging_folder() if folder is None else folder
    remote = RemoteFiles(url, DataError)
    files = _list_files(remote)
    name = remote.url.rpartition("/")[2] or "data"
    key = _key(remote.url, files)
    place = folder / key / name
    if place.parent.exists():
        return place
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f"{key}.lock"), disk_full_as_error(folder):
        if not place.parent.exists():
            partial = folder / f"{key}.partial"
            total = sum(file.size for file in files)
            log.info("%s: %d files, %.1f MB", url, len(files), total / 1e6)
            _fetch_all(remote, files, partial / name)
            if _key(remote.url, _list_files(remote)) != key:
                raise DataError(f"{url} changed while it was fetched; try again.")
            partial.rename(place.parent)
            sync_folder(folder)
    return place


def _list_files(remote: RemoteFiles) -> list[RemoteFile]:
    """The file at the URL or all files below it, sorted by name."""
    try:
        found = remote.ask(remote.system.info, remote.root)
        if found.get("type") != "directory":
            return [_entry("", found)]
        below = remote.ask(remote.system.find, remote.root, detail=True)
    except FileNotFoundError:
        below = {}
    if not below:
        raise DataError(f"{remote.url} does not exist.")
    prefix = len(remote.root) + 1
    return [_entry(path[prefix:], info) for path, info in sorted(below.items())]


def _entry(name: str, info: dict[str, Any]) -> RemoteFile:
    parts = Path(name).parts
    if info.get("size") is None or ".." in parts or name.startswith("/"):
        raise DataError(
            f"{info['name']} has no size or no usable name; copy it to a local disk "
            "and give the path."
        )
    mark = next((str(info[mark]) for mark in _MARKS if info.get(mark)), "")
    return RemoteFile(name, int(info["size"]), mark)


def _key(url: str, files: list[RemoteFile]) -> str:
    text = json.dumps([url, *(astuple(file) for file in files)])
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _fetch_all(remote: RemoteFiles, files: list[RemoteFile], place: Path) -> None:
    total = sum(file.size for file in files)
    # disable=None: a bar on a terminal only.
    bar = tqdm(
        total=total,
        unit="B",
        unit_scale=True,
        desc=f"fetching {place.name}",
        disable=None,
    )
    with bar, ThreadPoolExecutor(_FILES_AT_ONCE) as threads:

        def fetch(file: RemoteFile) -> None:
            target = place / file.name if file.name else place
            _fetch(remote, file, target, bar.update)

        list(threads.map(fetch, files))


def _fetch(
    remote: RemoteFiles, file: RemoteFile, target: Path, on_bytes: Callable[[int], Any]
) -> None:
    """Fetch what ``target`` lacks of ``file``."""
    target.parent.mkdir(parents=True, exist_ok=True)
    path = remote.path(file.name)
    with target.open("ab") as stream:
        begin = stream.tell()
        on_bytes(begin)
        while begin < file.size:
            end = min(begin + PIECE, file.size)
            try:
                content = remote.ask(remote.system.cat_file, path, start=begin, end=end)
            except FileNotFoundError:
                raise DataError(f"{remote.url}/{file.name} is gone.") from None
            if len(content) != end - begin:
                raise DataError(
                    f"{remote.url}: the server sends {len(content)} bytes where "
                    f"{end - begin} were asked for; use one that serves byte ranges."
                )
            stream.write(content)
            begin = end
            on_bytes(len(content))
        stream.flush()
        os.fsync(stream.fileno())
