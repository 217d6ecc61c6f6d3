"""What the simulated workers of ``scheduling.py`` do; found by name on every worker."""

import errno
import random
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pipeline.store.layout import plan_blocks
from pipeline.store.writer import ArrayPlan, SplitPlan, StoreWriter, create_store

SPLIT = "train"
_ATOMS = 8
_FIELD = "features/node_features"


@dataclass
class Scene:
    """One simulated build: its store, its luck, and what happened.

    ``seconds`` (blocks,) each block takes; shares of tries that fail, and at which the
    worker dies, half of the dying finishing what they are at although nobody listens.
    """

    writer: StoreWriter
    seconds: list[float]
    failing: float
    dying: float
    seed: int
    tries: Counter[int] = field(default_factory=Counter)
    writes: Counter[int] = field(default_factory=Counter)
    found_done: int = 0
    failures: int = 0
    deaths: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


# Of the build that is simulated now, for tasks, which have nothing but their block.
current: list[Scene] = []


def make_store(path: Path, blocks: int) -> StoreWriter:
    """A planned store of so many blocks with one small array."""
    split = SplitPlan(
        name=SPLIT,
        sample_ids=[f"s{number}" for number in range(blocks)],
        checksums=np.arange(blocks, dtype=np.uint64),
        blocks=plan_blocks(np.full(blocks, _ATOMS), _ATOMS),
        arrays=(ArrayPlan(_FIELD, "node", (4,), "float32", {}),),
    )
    create_store(path, [split], {"fingerprint": "simulated", "teacher": None})
    return StoreWriter(path)


def fill(block: int) -> int:
    """Claim the block, take its time, write and commit it, if luck will have it."""
    scene = current[-1]
    with scene.lock:
        scene.tries[block] += 1
        luck = random.Random(f"{scene.seed} {block} {scene.tries[block]}")
    draw, at, goes_on = luck.random(), luck.random(), luck.random() < 0.5
    with scene.writer.claim_block(SPLIT, block) as missing:
        if not missing:
            with scene.lock:
                scene.found_done += 1
            return block
        seconds = scene.seconds[block]
        if draw < scene.dying:
            time.sleep(at * seconds)
            _die(scene)
            if not goes_on:
                return block
            time.sleep((1 - at) * seconds)
        elif draw < scene.dying + scene.failing:
            time.sleep(at * seconds)
            with scene.lock:
                scene.failures += 1
            raise OSError(errno.EIO, "a simulated failure")
        else:
            time.sleep(seconds)
        rows = np.full((_ATOMS, 4), block, np.float32)
        scene.writer.write_block(SPLIT, block, {_FIELD: rows})
        with scene.lock:
            scene.writes[block] += 1
    return block


def _die(scene: Scene) -> None:
    """Let the worker of this thread leave its cluster while the thread runs on."""
    from distributed import get_worker

    with scene.lock:
        scene.deaths += 1
    worker = get_worker()
    worker.loop.add_callback(worker.close, timeout=2, executor_wait=False, nanny=False)
    time.sleep(0.1)  # until the scheduler has noticed
