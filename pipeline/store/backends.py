"""Where the files of a store lie: a folder, a zip archive, or behind a URL.

Names of files are relative to the store, with slashes.
"""

import zipfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import DamagedStoreError, StoreError
from pipeline.files.remote import RemoteFiles, is_url, split_groups
from pipeline.store.memory_map import map_file
from pipeline.store.shard import Bytes

Span = tuple[int, int]

_METADATA = "zarr.json"
_LOCAL_HEADER = 30


class StorageBackend(ABC):
    """Read access to the files of one store.

    ``mappable`` says whether files can be seen in memory without reading them first.
    """

    mappable = True

    def __init__(self, url: str) -> None:
        self.url = url

    def __str__(self) -> str:
        return self.url

    def __reduce__(self) -> tuple[Any, ...]:
        # Another process opens the place itself: maps and connections cannot be sent.
        return open_backend, (self.url,)

    def label(self, name: str) -> str:
        """File ``name`` as an error message calls it."""
        return f"{self.url}/{name}"

    @abstractmethod
    def read(self, name: str) -> bytes:
        """Content of a file; FileNotFoundError where there is none."""

    def fetch(self, names: Sequence[str]) -> dict[str, bytes]:
        """Contents of small files that have to be read anyway; none where mapped.

        Those that are not there are left out.
        """
        return {}

    @abstractmethod
    def size(self, name: str) -> int | None:
        """Bytes of a file; None where there is none."""

    @abstractmethod
    def ranges(self, name: str, spans: Sequence[Span]) -> list[Bytes]:
        """Bytes from begin to end for every span; FileNotFoundError without file."""

    def map(self, name: str) -> Bytes:
        """Content of a file, mapped; FileNotFoundError where there is none."""
        raise NotImplementedError(f"{self.url} cannot be mapped")


class MappedBackend(StorageBackend):
    """A place whose files are mapped."""

    @abstractmethod
    def map(self, name: str) -> Bytes:
        """Content of a file, mapped; FileNotFoundError where there is none."""

    def ranges(self, name: str, spans: Sequence[Span]) -> list[Bytes]:
        """Bytes from begin to end for every span."""
        content = self.map(name)
        return [content[begin:end] for begin, end in spans]


class LocalBackend(MappedBackend):
    """A folder on a file system."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        self.folder = folder

    def read(self, name: str) -> bytes:
        """Content of a file; FileNotFoundError where there is none."""
        return (self.folder / name).read_bytes()

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where there is none."""
        file = self.folder / name
        return file.stat().st_size if file.is_file() else None

    def map(self, name: str) -> Bytes:
        """Content of a file, mapped."""
        return map_file(self.folder / name)


class ZipBackend(MappedBackend):
    """A zip archive whose members are not compressed, mapped as a whole.

    The store is the archive itself or its only folder.
    """

    def __init__(self, file: Path) -> None:
        super().__init__(str(file))
        self._archive = map_file(file)
        try:
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
        except (zipfile.BadZipFile, NotImplementedError) as error:
            raise DamagedStoreError(
                f"{file} cannot be read as a zip archive ({error}); pack it again."
            ) from None
        self._members = {member.filename: member for member in members}
        roots = [n for n in self._members if n.partition("/")[2] == _METADATA]
        inside = _METADATA not in self._members and len(roots) == 1
        self._prefix = roots[0].removesuffix(_METADATA) if inside else ""

    def read(self, name: str) -> bytes:
        """Content of a member; FileNotFoundError where there is none."""
        return self.map(name).tobytes()

    def size(self, name: str) -> int | None:
        """Bytes of a member; None where there is none."""
        member = self._members.get(self._prefix + name)
        return None if member is None else member.file_size

    def map(self, name: str) -> Bytes:
        """Content of a member, mapped."""
        member = self._members.get(self._prefix + name)
        if member is None:
            raise FileNotFoundError(self.label(name))
        if member.compress_type != zipfile.ZIP_STORED:
            raise StoreError(
                f"{self.label(name)} is compressed inside the archive; pack the store "
                "without compression: `zip -0 -r STORE.zip STORE`."
            )
        header = self._archive[member.header_offset :][:_LOCAL_HEADER]
        if len(header) < _LOCAL_HEADER:
            raise DamagedStoreError(f"{self.label(name)} lies outside the archive.")
        name_bytes, extra_bytes = header[26:30].view("<u2").tolist()
        begin = member.header_offset + _LOCAL_HEADER + name_bytes + extra_bytes
        return self._archive[begin : begin + member.file_size]


class RemoteBackend(StorageBackend):
    """A folder behind a URL that fsspec knows: http, s3, gs, memory and others."""

    mappable = False

    def __init__(self, url: str) -> None:
        super().__init__(url.rstrip("/"))
        self._remote = RemoteFiles(url, StoreError)

    def read(self, name: str) -> bytes:
        """Content of a file; FileNotFoundError where there is none."""
        remote = self._remote
        return remote.ask(remote.system.cat_file, remote.path(name))

    def fetch(self, names: Sequence[str]) -> dict[str, bytes]:
        """Contents of small files by name, many requested at once."""
        remote = self._remote
        paths = {remote.path(name): name for name in names}
        found: dict[str, object] = {}
        for group in split_groups(list(paths)):
            found |= remote.ask(remote.system.cat, group, on_error="return")
        # What failed for another reason than being absent is asked for again.
        contents = {}
        for path, content in found.items():
            name = paths[path]
            if isinstance(content, bytes):
                contents[name] = content
            elif not isinstance(content, FileNotFoundError):
                contents[name] = self.read(name)
        return contents

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where there is none."""
        remote = self._remote
        try:
            found = remote.ask(remote.system.size, remote.path(name))
        except FileNotFoundError:
            return None
        return None if found is None else int(found)

    def ranges(self, name: str, spans: Sequence[Span]) -> list[Bytes]:
        """Bytes of every span, many requested at once."""
        remote, path = self._remote, self._remote.path(name)
        contents: list[bytes] = []
        for group in split_groups(spans):
            contents += remote.ask(
                remote.system.cat_ranges,
                [path] * len(group),
                [begin for begin, _ in group],
                [end for _, end in group],
                on_error="raise",
            )
        for (begin, end), content in zip(spans, contents, strict=True):
            if len(content) > end - begin:
                raise StoreError(
                    f"{self.label(name)}: the server sends {len(content)} bytes where "
                    f"{end - begin} were asked for; use one that serves byte ranges."
                )
        return [np.frombuffer(content, np.uint8) for content in contents]

    def write(self, name: str, content: bytes) -> None:
        """Put a whole file there.

        Raises
        ------
        StoreError
            The protocol is for reading only, or the server refuses.
        """
        remote = self._remote
        try:
            remote.ask(remote.system.pipe_file, remote.path(name), content)
        except NotImplementedError:
            raise StoreError(
                f"{self.url} cannot be written to over its protocol; use s3, gs or "
                "another that takes files."
            ) from None
        except PermissionError as error:
            raise StoreError(
                f"{self.url} refuses to be written to ({error})."
            ) from None


class CachedBackend(StorageBackend):
    """Another place, some of whose files have been read already."""

    mappable = False

    def __init__(self, place: StorageBackend, held: Mapping[str, bytes]) -> None:
        super().__init__(place.url)
        self._place = place
        self._held = held

    def read(self, name: str) -> bytes:
        """Content of a file; FileNotFoundError where there is none."""
        held = self._held.get(name)
        return self._place.read(name) if held is None else held

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where there is none."""
        held = self._held.get(name)
        return self._place.size(name) if held is None else len(held)

    def ranges(self, name: str, spans: Sequence[Span]) -> list[Bytes]:
        """Bytes from begin to end for every span."""
        return self._place.ranges(name, spans)


def open_backend(path: Path | str) -> StorageBackend:
    """The place that ``path`` names: a URL, a zip archive or a folder."""
    if is_url(path):
        return RemoteBackend(str(path))
    path = Path(path)
    return ZipBackend(path) if path.is_file() else LocalBackend(path)
