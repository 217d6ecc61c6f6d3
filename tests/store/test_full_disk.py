"""Full disks: one sentence, and the same command goes on when there is room."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pipeline.cli.main import main
from pipeline.store.verify import verify_store
from tests.commands import refusal, run_command
from tests.stores import build, spec_document, write_spec

FEW = {"node_features": {"profile": "compact"}}
MANY = {**FEW, "vector_features": {"profile": "q8"}, "per_atom_energy": None}
FAITHFUL = {"node_features": None, "vector_features": None}
PLENTY = "64m"


@dataclass(frozen=True)
class SmallDisk:
    """A tmpfs of any size at ``path``."""

    path: Path

    def mount(self, options: str) -> None:
        """An empty one."""
        self.unmount()
        _run("mount", "-t", "tmpfs", "-o", options, "kd-cache-test", str(self.path))

    def resize(self, options: str) -> None:
        """The same with more or less room."""
        _run("mount", "-o", f"remount,{options}", str(self.path))

    def unmount(self) -> None:
        # Lazily, since the log of a command may still be open.
        while self.path.is_mount():
            _run("umount", "--lazy", str(self.path))

    @property
    def ballast(self) -> Path:
        """What fills it up."""
        return self.path / "ballast"

    def fill(self) -> None:
        """Leave no room at all."""
        with suppress(OSError), self.ballast.open("wb", buffering=0) as stream:
            while True:
                stream.write(bytes(4096))

    def used(self) -> tuple[int, int]:
        """Bytes and files."""
        now = os.statvfs(self.path)
        used = (now.f_blocks - now.f_bfree) * now.f_frsize
        return used, now.f_files - now.f_ffree


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallDisk]:
    small = SmallDisk(tmp_path_factory.mktemp("disk"))
    try:
        small.mount(f"size={PLENTY}")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("a small disk needs the right to mount a tmpfs")
    yield small
    small.unmount()


@dataclass(frozen=True)
class Command:
    """A command, the folder that the disk starts with, and how much it takes there."""

    arguments: list[object]
    start: Path
    files: dict[str, bytes]
    used: dict[str, int]
    added: dict[str, int]


@pytest.fixture(scope="module")
def command(
    disk: SmallDisk,
    tmp_path_factory: pytest.TempPathFactory,
    datasets: dict[str, Path],
    teacher_file: Path,
) -> Callable[[str], Command]:
    """Commands by name, with the files that they make when there is room."""
    folder = tmp_path_factory.mktemp("commands")
    store = disk.path / "s.zarr"
    known: dict[str, Command] = {}

    def spec(name: str, place: Path, features: dict[str, Any]) -> Path:
        document = spec_document(datasets, place, teacher_file, features)
        return write_spec(folder / f"{name}.yaml", document)

    def make(name: str) -> Command:
        if name not in known:
            disk.mount(f"size={PLENTY}")
            start = folder / name
            start.mkdir()
            if name == "build":
                arguments = ["build", spec("build", store, MANY), "--device", "cpu"]
            elif name == "add-field":
                build(spec("few", store, FEW))
                shutil.copytree(store, start / store.name)
                arguments = ["add-field", spec("many", store, MANY), "--device", "cpu"]
            else:
                faithful = folder / "faithful.zarr"
                build(spec("faithful", faithful, FAITHFUL))
                arguments = ["compact", faithful, store]
            known[name] = _measured(disk, start, arguments)
        return known[name]

    return make


def _measured(disk: SmallDisk, start: Path, arguments: list[object]) -> Command:
    before = disk.used()
    run_command(main, arguments)
    after = disk.used()
    kinds = ("size", "nr_inodes")
    return Command(
        arguments,
        start,
        _files(disk.path),
        dict(zip(kinds, before, strict=True)),
        {k: a - b for k, a, b in zip(kinds, after, before, strict=True)},
    )


def _files(folder: Path) -> dict[str, bytes]:
    """All files but the log and the status, which tell times."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file() and not file.name.endswith((".log", ".status.json"))
    }


@pytest.mark.parametrize(
    ("name", "kind", "share"),
    [
        ("build", "size", 0.0),
        ("build", "size", 0.3),
        ("build", "size", 0.95),
        ("build", "nr_inodes", 0.5),
        ("add-field", "size", 0.1),
        ("add-field", "size", 0.9),
        ("add-field", "nr_inodes", 0.9),
        ("compact", "size", 0.6),
        ("compact", "size", 0.9),
    ],
)
def test_a_full_disk_is_told_and_the_command_goes_on_later(
    disk: SmallDisk,
    command: Callable[[str], Command],
    name: str,
    kind: str,
    share: float,
) -> None:
    chosen = command(name)
    disk.mount(f"size={PLENTY}")
    shutil.copytree(chosen.start, disk.path, dirs_exist_ok=True)
    least = {"size": 4096, "nr_inodes": 2}[kind]
    room = max(least, int(chosen.used[kind] + share * chosen.added[kind]))
    disk.resize(f"{kind}={room}")
    if not share:
        # To the last byte, so that not even the log can be written.
        disk.fill()
    sentence = refusal(main, chosen.arguments)
    assert str(disk.path) in sentence
    assert "space" in sentence
    if name == "add-field":
        assert verify_store(disk.path / "s.zarr") == []
    disk.resize(f"size={PLENTY},nr_inodes=100000")
    disk.ballast.unlink(missing_ok=True)
    assert run_command(main, chosen.arguments).exit_code == 0
    assert _files(disk.path) == chosen.files
