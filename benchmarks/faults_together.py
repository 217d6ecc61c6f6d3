"""Several processes at one store: two writers, or a writer and a reader.

All start at one moment. Whoever is refused must be so in one sentence, the store must
have the bytes that a single process gives it, and no reader may see a wrong number.
"""

import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from faults_kills import ALL, FAITHFUL, FEW, MANY, forked, wait
from faults_stores import contents, differing, make_materials, spec_of

from pipeline.build.build import build_store
from pipeline.build.convert import convert_store, make_conversion
from pipeline.build.extend import extend_store
from pipeline.build.worker import FillOptions
from pipeline.errors import StoreError
from pipeline.store.reader import FeatureStore

Act = Callable[[], object]
Rows = dict[tuple[str, str], np.ndarray]


@dataclass
class Tally:
    """How often what happened in a scene that was played ``rounds`` times."""

    rounds: int = 0
    seen: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


class Stage:
    """A folder, what it holds when a scene begins, and when one process played it."""

    def __init__(self, folder: Path, materials: Path, begin: Act, play: Act) -> None:
        self.work = folder / "work"
        self.reference = folder / "reference"
        self._start = folder / "start"
        self._told = folder / "told"
        self._told.mkdir(parents=True)
        for action, kept in ((begin, self._start), (play, self.reference)):
            self.work.mkdir(exist_ok=True)
            if wait(forked(action)):
                raise SystemExit(f"{folder.name}: failed although undisturbed")
            shutil.copytree(self.work, kept)
        self.after = contents(self.reference)

    def play(self, tally: Tally, *acts: Act) -> list[Any]:
        """Let all ``acts`` begin at one moment; what each of them gave or was told."""
        shutil.rmtree(self.work)
        shutil.copytree(self._start, self.work)
        tally.rounds += 1
        closed, opened = os.pipe()
        children = [
            forked(lambda n=n, act=act: self._act(n, act, closed, opened))
            for n, act in enumerate(acts)
        ]
        os.close(opened)
        os.close(closed)
        for child in children:
            code = wait(child)
            if code:
                tally.failures.append(f"a process ended with {code}")
        wrong = differing(contents(self.work), self.after)
        if wrong:
            tally.failures.append(f"differs in {wrong[:5]}")
        files = [self._told / str(number) for number in range(len(acts))]
        return [json.loads(file.read_text()) for file in files]

    def _act(self, number: int, act: Act, closed: int, opened: int) -> None:
        os.close(opened)
        told = self._told / str(number)
        told.write_text('"nothing"')
        os.read(closed, 1)
        try:
            given = act()
        except StoreError as error:
            given = {"refused": str(error)}
        told.write_text(json.dumps(given))


def _refusals(given: list[Any]) -> list[str]:
    return [g["refused"] for g in given if isinstance(g, dict) and "refused" in g]


def _count_outcomes(tally: Tally, given: list[Any]) -> list[str]:
    """Count who was refused; the sentences."""
    sentences = _refusals(given)
    tally.seen["done"] += len(given) - len(sentences)
    tally.seen["refused"] += len(sentences)
    tally.failures += [f"said {s!r}" for s in sentences if not s.endswith(".")]
    if len(sentences) == len(given):
        tally.failures.append(f"all were refused: {sentences}")
    return sentences


def two_builds(
    folder: Path, materials: Path, rounds: int, begin: Act = lambda: None
) -> Tally:
    """Two builds of one spec."""

    def build() -> object:
        return build_store(spec_of(materials, folder / "work/s.zarr", MANY))

    tally = Tally()
    stage = Stage(folder, materials, begin, build)
    for _ in range(rounds):
        _count_outcomes(tally, stage.play(tally, build, build))
    return tally


def two_restarts(folder: Path, materials: Path, rounds: int) -> Tally:
    """Two builds of one spec, which an earlier one began."""
    spec = spec_of(materials, folder / "work/s.zarr", MANY)
    begin = partial(build_store, spec, filling=FillOptions(blocks=(2, 3)))
    return two_builds(folder, materials, rounds, begin)


def two_ranges(folder: Path, materials: Path, rounds: int) -> Tally:
    """Two builds of one spec, each with blocks of its own."""

    def build(*blocks: int) -> Act:
        spec = spec_of(materials, folder / "work/s.zarr", MANY)
        return lambda: build_store(spec, filling=FillOptions(blocks=blocks or None))

    tally = Tally()
    stage = Stage(folder, materials, lambda: None, build())
    for _ in range(rounds):
        given = stage.play(tally, build(0, 1), build(1, 9))
        sentences = _count_outcomes(tally, given)
        tally.failures += [f"was refused: {sentence}" for sentence in sentences]
    return tally


def two_extensions(folder: Path, materials: Path, rounds: int) -> Tally:
    """Two times add-field."""
    path = folder / "work/s.zarr"

    def extend() -> object:
        return extend_store(spec_of(materials, path, MANY, ALL))

    tally = Tally()
    stage = Stage(
        folder,
        materials,
        lambda: build_store(spec_of(materials, path, FEW)),
        extend,
    )
    for _ in range(rounds):
        given = stage.play(tally, extend, extend)
        _count_outcomes(tally, given)
        if sum(bool(g) and isinstance(g, list) for g in given) != 1:
            tally.failures.append(f"not exactly one of them added fields: {given}")
    return tally


def two_conversions(folder: Path, materials: Path, rounds: int) -> Tally:
    """Two times compact, to one place."""
    source, out = folder / "work/faithful.zarr", folder / "work/s.zarr"

    def convert() -> object:
        return convert_store(source, out, make_conversion("compact"))

    tally = Tally()
    stage = Stage(
        folder,
        materials,
        lambda: build_store(spec_of(materials, source, FAITHFUL)),
        convert,
    )
    for _ in range(rounds):
        _count_outcomes(tally, stage.play(tally, convert, convert))
    return tally


def reader_of_a_build(folder: Path, materials: Path, rounds: int) -> Tally:
    """A build, and a process that reads every block all the time."""
    path = folder / "work/s.zarr"

    def build() -> object:
        return build_store(spec_of(materials, path, MANY))

    tally = Tally()
    stage = Stage(folder, materials, lambda: None, build)
    for _ in range(rounds):
        read = _Watcher(stage.reference / "s.zarr", path)
        given = stage.play(tally, build, lambda: read.until_sealed())  # noqa: B023
        _count_readings(tally, given[1])
    return tally


def reader_of_an_extension(folder: Path, materials: Path, rounds: int) -> Tally:
    """add-field, and a process that opened the store before and keeps reading it."""
    path = folder / "work/s.zarr"

    def extend() -> object:
        return extend_store(spec_of(materials, path, MANY, ALL))

    tally = Tally()
    stage = Stage(
        folder,
        materials,
        lambda: build_store(spec_of(materials, path, FEW)),
        extend,
    )
    for _ in range(rounds):
        read = _Watcher(stage.reference / "s.zarr", path)
        given = stage.play(tally, extend, lambda: read.until_extended())  # noqa: B023
        _count_readings(tally, given[1])
        if given[1]["refused"]:
            tally.failures.append(f"could not be read: {given[1]['errors']}")
    return tally


def _count_readings(tally: Tally, given: dict[str, Any]) -> None:
    tally.seen["read right"] += given["right"]
    tally.seen["read refused"] += given["refused"]
    tally.failures += given["wrong"]


class _Watcher:
    """Reads a store that changes and compares with one that does not."""

    def __init__(self, truth: Path, path: Path) -> None:
        self._truth_path, self.path = truth, path
        self._truth: Rows = {}
        self.told: dict[str, Any] = {
            "right": 0,
            "refused": 0,
            "wrong": [],
            "errors": [],
        }

    def until_sealed(self) -> dict[str, Any]:
        """Open and read all blocks again and again; what came of it."""
        self._learn()
        sealed = False
        while not sealed:
            store = self._try(lambda: FeatureStore.open(self.path, allow_unsealed=True))
            if store is None:
                time.sleep(0.001)
                continue
            sealed = bool(store.attributes["complete"])
            self._compare(store)
        return self.told

    def until_extended(self) -> dict[str, Any]:
        """The same of a store opened once, and of the one that is there by then."""
        self._learn()
        old = FeatureStore.open(self.path)
        extra = 0
        while extra < 5:
            self._compare(old)
            new = self._try(lambda: FeatureStore.open(self.path))
            if new is not None:
                self._compare(new)
                # Then the old folder is gone; a few more times.
                changed = new.fingerprint != old.fingerprint
                gone = not self.path.with_name(f".{self.path.name}.extended").exists()
                extra += changed and gone
        return self.told

    def _learn(self) -> None:
        store = FeatureStore.open(self._truth_path)
        for name, split in store.splits.items():
            for array in split.arrays:
                rows = split.read(np.arange(len(split)), [array])[array]
                self._truth[name, array] = rows

    def _compare(self, store: FeatureStore) -> None:
        for name, split in store.splits.items():
            for array in split.arrays:
                for block in range(split.n_blocks):
                    positions = split.block_positions(block)
                    got = self._try(
                        lambda s=split, a=array, p=positions: s.read(np.array(p), [a])[
                            a
                        ]
                    )
                    if got is not None:
                        self._judge(store, name, array, positions, got)

    def _judge(
        self,
        store: FeatureStore,
        split: str,
        array: str,
        positions: range,
        got: np.ndarray,
    ) -> None:
        index = store.splits[split].index
        level = index.arrays[array].level
        rows = (
            np.arange(len(index.start))
            if level == "sample"
            else np.cumsum(index.n_atoms) - index.n_atoms
        )
        counts = np.ones_like(rows) if level == "sample" else index.n_atoms
        begin, last = int(rows[positions.start]), positions.stop - 1
        end = int(rows[last] + counts[last])
        same = np.array_equal(
            self._truth[split, array][begin:end], got, equal_nan=got.dtype.kind == "f"
        )
        self.told["right"] += same
        if not same:
            self.told["wrong"].append(f"wrong numbers in {split}/{array}")

    def _try(self, read: Callable[[], Any]) -> Any:
        """What ``read`` gives; None where it is refused."""
        try:
            return read()
        except StoreError as error:
            self.told["refused"] += 1
            self.told["errors"] = [*self.told["errors"], str(error)][-3:]
            return None


SCENES = {
    "two builds": two_builds,
    "two restarts": two_restarts,
    "two builds, own blocks": two_ranges,
    "two add-fields": two_extensions,
    "two compacts": two_conversions,
    "reader, build": reader_of_a_build,
    "reader, add-field": reader_of_an_extension,
}


def run_scenes(rounds: int, folder: Path) -> dict[str, Tally]:
    """Play every scene ``rounds`` times."""
    make_materials(folder / "materials")
    return {
        name: scene(folder / name.replace(" ", "_"), folder / "materials", rounds)
        for name, scene in SCENES.items()
    }
