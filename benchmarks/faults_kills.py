"""Kills real operations on real stores, lets them go on, and compares every byte.

Every operation runs in a child that is forked when all imports are done, so that a
try costs what the operation costs. This process itself starts no thread that a child
could miss.
"""

import ctypes
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from faults_stores import (
    COMPACT,
    FLOAT32,
    Q8,
    contents,
    differing,
    make_materials,
    spec_of,
)

from pipeline.build.build import build_store
from pipeline.build.convert import convert_store, make_conversion
from pipeline.build.extend import extend_store
from pipeline.errors import StoreError
from pipeline.store.reader import FeatureStore
from pipeline.store.verify import verify_store

ALL = ("train", "val", "extra")
FEW = {"node_features": COMPACT}
MANY = {"node_features": COMPACT, "vector_features": Q8, "per_atom_energy": {}}
FAITHFUL = {"node_features": FLOAT32, "vector_features": FLOAT32}
_STORE = "s.zarr"
_ANSWER_S = 1800
_FAILED = 3
# Every way in which these operations change a directory, or make a change durable.
_CHANGES = ("fsync", "replace", "rename", "link", "unlink", "rmdir", "mkdir")


@dataclass(frozen=True)
class Operation:
    """What is done to the folder ``work``, and what must hold whenever it is killed.

    ``start`` makes the state it begins with, ``run`` is the operation. ``fresh`` makes
    the result in another way, where there is one. ``always`` says that a whole store
    lies in the folder at every moment.
    """

    name: str
    start: Callable[[Path, Path], object]
    run: Callable[[Path, Path], object]
    fresh: Callable[[Path, Path], object] | None = None
    always: bool = False


def _nothing(materials: Path, work: Path) -> None:
    work.mkdir()


def _build(features: dict, splits: tuple[str, ...]) -> Callable[[Path, Path], object]:
    return lambda materials, work: build_store(
        spec_of(materials, work / _STORE, features, splits)
    )


OPERATIONS = {
    operation.name: operation
    for operation in (
        Operation("build", _nothing, _build(MANY, ("train", "val"))),
        Operation(
            "add-field",
            _build(FEW, ("train", "val")),
            lambda materials, work: extend_store(
                spec_of(materials, work / _STORE, MANY, ALL)
            ),
            _build(MANY, ALL),
            always=True,
        ),
        Operation(
            "compact",
            lambda materials, work: build_store(
                spec_of(materials, work / "faithful.zarr", FAITHFUL)
            ),
            lambda materials, work: convert_store(
                work / "faithful.zarr", work / _STORE, make_conversion("compact")
            ),
        ),
        Operation(
            "hydrate",
            lambda materials, work: build_store(
                spec_of(materials, work / "compact.zarr", MANY)
            ),
            lambda materials, work: convert_store(
                work / "compact.zarr", work / _STORE, make_conversion("faithful")
            ),
        ),
    )
}


@dataclass
class Tally:
    """What happened to one operation under one way of killing.

    ``seconds`` and ``changes`` to its folder are those of a run that nobody kills.
    """

    seconds: float
    changes: int
    rounds: int = 0
    kills: int = 0
    restarts: int = 0
    failures: list[str] = field(default_factory=list)


class Ordeal:
    """One operation in a folder of its own, with its bytes when nothing disturbs it."""

    def __init__(self, operation: Operation, materials: Path, folder: Path) -> None:
        self.operation = operation
        self.materials = materials
        self.work = folder / "work"
        self.start = folder / "start"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self._do(operation.start)
        self.before = contents(self.work)
        shutil.copytree(self.work, self.start)
        passed = folder / "changes"
        begin = time.monotonic()
        self._do(operation.run)
        self.duration = time.monotonic() - begin
        self.after = contents(self.work)
        self._restore()
        self._do(lambda m, w: _count_changes(lambda: operation.run(m, w), passed))
        self.points = int(passed.read_text())
        self._require_same("twice in a row")
        if operation.fresh is not None:
            shutil.rmtree(self.work)
            self._do(operation.fresh)
            self._require_same("made from nothing")

    def kill_at_random(self, rng: random.Random, tally: Tally, at_most: int) -> None:
        """Kill up to ``at_most`` times at any moment, then let it finish; compare."""

        def kill(child: int) -> None:
            time.sleep(rng.uniform(0, self.duration))
            os.kill(child, signal.SIGKILL)

        self._round(tally, at_most, lambda: forked(self._run), kill)

    def kill_at_points(self, rng: random.Random, tally: Tally, at_most: int) -> None:
        """The same, where the child kills itself in front of a change to the folder."""

        def fork() -> int:
            number = rng.randint(1, self.points)
            return forked(lambda: _die_before_change(self._run, number))

        self._round(tally, at_most, fork, lambda child: None)

    def _round(
        self,
        tally: Tally,
        at_most: int,
        fork: Callable[[], int],
        kill: Callable[[int], None],
    ) -> None:
        self._restore()
        tally.rounds += 1
        for attempt in range(at_most + 1):
            last = attempt == at_most
            child = forked(self._run) if last else fork()
            if not last:
                kill(child)
            code = wait(child)
            tally.restarts += attempt > 0
            if code == 0:
                break
            if code != -signal.SIGKILL or last:
                tally.failures.append(f"ended with {code} at try {attempt + 1}")
                return
            tally.kills += 1
            tally.failures += self._between()
        wrong = differing(contents(self.work), self.after)
        if wrong:
            tally.failures.append(f"differs in {wrong[:5]} after {attempt + 1} tries")

    def _between(self) -> list[str]:
        """What is wrong with the folder now that the operation was killed."""
        found = contents(self.work)
        store = self.work / _STORE
        if self.operation.always:
            whole = any(
                _of_store(found) == _of_store(state)
                for state in (self.before, self.after)
            )
            sound = wait(forked(lambda: _require_sound(store))) == 0
            return [] if whole and sound else ["is neither the old nor the new store"]
        # Whatever bears its final name has its final bytes, but for the seal.
        wrong = [
            name
            for name, content in found.items()
            if not any(part.startswith(".") for part in Path(name).parts)
            and self.after.get(name, 0) != content
            and name != f"{_STORE}/zarr.json"
        ]
        if store.exists() and wait(forked(lambda: _require_refused(store))):
            wrong.append("opens as if it were finished")
        return [f"{name} between two tries" for name in wrong]

    def _run(self) -> None:
        self.operation.run(self.materials, self.work)

    def _do(self, step: Callable[[Path, Path], object]) -> None:
        code = wait(forked(lambda: step(self.materials, self.work)))
        if code:
            sys.exit(f"{self.operation.name}: ended with {code} although undisturbed")

    def _restore(self) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self.start, self.work)

    def _require_same(self, how: str) -> None:
        wrong = differing(contents(self.work), self.after)
        if wrong:
            sys.exit(f"{self.operation.name}: {how} differs in {wrong}")


def _of_store(state: Mapping[str, bytes | None]) -> dict[str, bytes | None]:
    """The files of the store itself, without what lies beside it."""
    return {n: b for n, b in state.items() if n.startswith(f"{_STORE}/")}


def _require_sound(store: Path) -> None:
    FeatureStore.open(store)
    problems = verify_store(store)
    if problems:
        raise AssertionError(problems)


def _require_refused(store: Path) -> None:
    """Raise unless the store is whole, or refused with a sentence on how to go on."""
    try:
        FeatureStore.open(store)
    except StoreError as error:
        if "continue it with" not in str(error):
            raise
    else:
        _require_sound(store)


def forked(action: Callable[[], object]) -> int:
    child = os.fork()
    if child:
        return child
    code = _FAILED
    try:
        action()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def wait(child: int) -> int:
    """Exit code of ``child``, the negative number of the signal that ended it."""
    deadline = time.monotonic() + _ANSWER_S
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGABRT)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _count_changes(action: Callable[[], object], told: Path) -> None:
    passed = _before_changes(lambda number: None)
    action()
    told.write_text(str(passed()))


def _die_before_change(action: Callable[[], object], number: int) -> None:
    def die(now: int) -> None:
        if now == number:
            os.kill(os.getpid(), signal.SIGKILL)

    _before_changes(die)
    action()


def _before_changes(call: Callable[[int], None]) -> Callable[[], int]:
    """Let ``call`` be called with a running number before every change; the count."""
    passed = 0

    def counted(change: Callable) -> Callable:
        def counting(*args: object, **kwargs: object) -> object:
            nonlocal passed
            passed += 1
            call(passed)
            return change(*args, **kwargs)

        return counting

    for name in _CHANGES:
        setattr(os, name, counted(getattr(os, name)))
    # Of the C library, the way in which two stores change places.
    library = ctypes.CDLL(None, use_errno=True)
    library.renameat2 = counted(library.renameat2)
    loader = ctypes.CDLL
    ctypes.CDLL = lambda name, **options: (  # type: ignore[assignment, misc]
        library if name is None else loader(name, **options)
    )
    return lambda: passed


def run_ordeals(
    names: list[str], count: int, points: int, seed: int, folder: Path
) -> dict[str, Tally]:
    """Kill every operation ``count`` times at random and ``points`` times at points."""
    make_materials(folder / "materials")
    tallies = {}
    for name in names:
        ordeal = Ordeal(OPERATIONS[name], folder / "materials", folder / name)
        rng = random.Random(f"{seed} {name}")
        ways = {
            "at moments": (ordeal.kill_at_random, count),
            "at changes": (ordeal.kill_at_points, points),
        }
        for way, (kill, wanted) in ways.items():
            tally = Tally(ordeal.duration, ordeal.points)
            tallies[f"{name} {way}"] = tally
            while tally.kills < wanted and len(tally.failures) < 10:
                kill(rng, tally, min(rng.randint(1, 3), wanted - tally.kills))
    return tallies
