"""A small store with every kind of array, and its content computed independently.

Run as a program it builds the store in a process that can be killed:
``python toy_store.py kill FOLDER SEED`` and ``python toy_store.py points FOLDER``.
"""

import os
import random
import shutil
import signal
import sys
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np

from pipeline.store.calibration import Calibration, calibrate
from pipeline.store.layout import BlockPlan, plan_blocks
from pipeline.store.quantization import Profile
from pipeline.store.writer import ArrayPlan, SplitPlan, StoreWriter, create_store

STRUCTURES = (
    ArrayPlan("structures/atomic_numbers", "node", (), "uint8", {"unit": "1"}),
    ArrayPlan("structures/positions", "node", (3,), "float64", {"unit": "Å"}),
    ArrayPlan("structures/tags", "node", (), "int8"),
    ArrayPlan("structures/cell", "sample", (3, 3), "float64"),
    ArrayPlan("labels/energy", "sample", (), "float64", {"unit": "eV"}),
    ArrayPlan("labels/forces", "node", (3,), "float32"),
)
FEATURES = (
    ArrayPlan("teacher/per_atom_energy", "node", (), "float32"),
    ArrayPlan("features/node_features", "node", (5,), "float16"),
    ArrayPlan("features/vector_features", "node", (3, 4), "float16"),
)
EDGES = (
    ArrayPlan("edges/edge_index", "edge", (2,), "uint16"),
    ArrayPlan("edges/cell_offsets", "edge", (3,), "int8"),
    ArrayPlan("edges/edge_features", "edge", (6,), "float16", {"unit": "1"}),
)
# Name: atoms per sample, rows per block, arrays. "train" has two inner chunks a shard,
# "tiny" so many samples per block that the sample axis has two as well, "bonds" as many
# on the edge axis, and samples without edges. Features of "coded" are stored as
# integers, with two inner chunks a packed shard.
SHAPES = {
    "train": (np.random.default_rng(0).integers(1, 90, 150), 2048),
    "val": (np.random.default_rng(1).integers(5, 60, 25), 300),
    "tiny": (np.ones(2600, np.int64), 2048),
    "bonds": (np.random.default_rng(2).integers(1, 40, 50), 300),
    "coded": (np.random.default_rng(4).integers(1, 70, 240), 2048),
    "columns": (np.random.default_rng(5).integers(1, 30, 20), 300),
}
# Those whose arrays are read back exactly.
SPLITS = ("train", "val", "tiny", "bonds")
ARRAYS = {
    "train": STRUCTURES + FEATURES,
    "val": STRUCTURES,
    "tiny": (FEATURES[0], STRUCTURES[4]),
    "bonds": (STRUCTURES[0], FEATURES[1], *EDGES, STRUCTURES[4]),
    "coded": (
        STRUCTURES[0],
        ArrayPlan("features/node_features", "node", (12,), "int8"),
        ArrayPlan("features/vector_features", "node", (3, 8), "int8"),
        ArrayPlan("features/edge_to_node_features", "node", (12,), "int16"),
        ArrayPlan("features/turned_features", "node", (3, 8), "int16"),
        STRUCTURES[4],
    ),
    "columns": (
        STRUCTURES[0],
        ArrayPlan("teacher/force_jacobian", "node", (4, 3), "float32"),
        ArrayPlan("teacher/force_jacobian_column", "sample", (4,), "int32"),
    ),
}
PROFILES: dict[str, Profile] = {"int8": "q8", "int16": "compact"}
STATED_ERROR = 1e-3
Edge = tuple[int, int, tuple[int, int, int]]


def n_edges(split: str) -> np.ndarray | None:
    """Edges of every sample in dataset order, where the split has any."""
    if split != "bonds":
        return None
    atoms = SHAPES[split][0]
    counts = np.random.default_rng(3).integers(0, 300, len(atoms))
    counts[::9] = 0
    return np.minimum(counts, 20 * atoms**2)


@cache
def edges_of(split: str, sample: int) -> dict[Edge, np.ndarray]:
    """Features (6,) of every edge of a sample under (source, target, shift)."""
    counts = n_edges(split)
    assert counts is not None
    atoms = int(SHAPES[split][0][sample])
    rng = np.random.default_rng([7, sample])
    edges: dict[Edge, np.ndarray] = {}
    while len(edges) < counts[sample]:
        source, target = rng.integers(0, atoms, 2).tolist()
        # Few values, so that shifts decide the order often; both ends of int8 occur.
        x, y, z = rng.choice([-128, -1, 0, 1, 127], 3).tolist()
        edges[source, target, (x, y, z)] = rng.standard_normal(6).astype(np.float16)
    return edges


def _edge_rows(split: str, sample: int, array: ArrayPlan) -> np.ndarray:
    edges = edges_of(split, sample)
    ordered = sorted(edges, key=lambda edge: (edge[1], edge[0], edge[2]))
    columns = {
        "edges/edge_index": [(source, target) for source, target, _ in ordered],
        "edges/cell_offsets": [shift for _, _, shift in ordered],
        "edges/edge_features": [edges[edge] for edge in ordered],
    }
    return np.array(columns[array.path], array.dtype).reshape(-1, *array.shape)


def value_of(split: str, sample: int, array: ArrayPlan) -> np.ndarray:
    """Content of one array for the sample with this dataset index."""
    if array.level == "edge":
        return _edge_rows(split, sample, array)
    rng = np.random.default_rng([len(split), sample, len(array.path)])
    rows = (int(SHAPES[split][0][sample]),) if array.level == "node" else ()
    if split == "coded" and array.path.startswith("features/"):
        return _correlated(rng, (*rows, *array.shape))
    if array.dtype == "uint8":
        return rng.integers(1, 100, (*rows, *array.shape)).astype(np.uint8)
    if array.dtype == "int8":
        return rng.integers(-128, 128, (*rows, *array.shape)).astype(np.int8)
    if array.dtype == "int32":
        return rng.integers(-1, 90, (*rows, *array.shape)).astype(np.int32)
    values = rng.standard_normal((*rows, *array.shape)).astype(array.dtype)
    if array.path == "labels/energy" and sample % 7 == 0:
        values = np.array(np.nan)
    return values


def _correlated(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Few directions with most of the variance, and a mean where there is no xyz."""
    channels = shape[-1]
    mixing = np.random.default_rng(8).standard_normal((3, channels))
    wide = rng.standard_normal((*shape[:-1], 3)) @ mixing
    narrow = 0.05 * rng.standard_normal(shape)
    return (wide + narrow + (len(shape) == 2) * 4.0).astype(np.float32)


@cache
def calibration(path: str) -> Calibration:
    """Calibration of a feature of "coded" on its first samples."""
    (array,) = (a for a in ARRAYS["coded"] if a.path == path)
    rows = np.concatenate([value_of("coded", sample, array) for sample in range(30)])
    return calibrate(rows, PROFILES[array.dtype], STATED_ERROR)


def _calibrated(split: str) -> tuple[ArrayPlan, ...]:
    if split != "coded":
        return ARRAYS[split]
    return tuple(
        replace(array, calibration=calibration(array.path))
        if array.path.startswith("features/")
        else array
        for array in ARRAYS[split]
    )


def identifier(split: str, sample: int) -> str:
    return f"{split}_{sample}" if sample % 3 else f"{split}_é{sample}"


def plan(split: str) -> SplitPlan:
    counts, rows_per_block = SHAPES[split]
    blocks = plan_blocks(counts, rows_per_block, seed=3, n_edges=n_edges(split))
    ids = [identifier(split, sample) for sample in blocks.order]
    checksums = (blocks.order.astype(np.uint64) + 1) * np.uint64(0x9E3779B97F4A7C15)
    return SplitPlan(split, ids, checksums, blocks, _calibrated(split))


def block_rows(
    split: str, blocks: BlockPlan, block: int, arrays: tuple[ArrayPlan, ...]
) -> dict[str, np.ndarray]:
    """What a builder hands to ``write_block``."""
    members = blocks.order[blocks.block_bounds[block] : blocks.block_bounds[block + 1]]
    return {
        array.path: joined([value_of(split, int(s), array) for s in members], array)
        for array in arrays
    }


def joined(values: list[np.ndarray], array: ArrayPlan) -> np.ndarray:
    """Content of several samples as one array."""
    if not values:
        return np.empty((0, *array.shape), array.dtype)
    return np.stack(values) if array.level == "sample" else np.concatenate(values)


def build(path: Path, splits: tuple[str, ...] = SPLITS) -> None:
    """Create the store or continue it, as any builder would."""
    plans = [plan(split) for split in splits]
    if not path.exists():
        create_store(path, plans, {"fingerprint": "f" * 64, "provenance": {"a": 1}})
    writer = StoreWriter(path)
    for item in plans:
        for block in writer.pending_blocks(item.name):
            with writer.claim_block(item.name, block) as pending:
                if pending:
                    rows = block_rows(item.name, item.blocks, block, item.arrays)
                    writer.write_block(item.name, block, rows)
    writer.seal()


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder``, hidden ones too."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def _forked_build(path: Path, points: bool, kill_at: int | None = None) -> int:
    child = os.fork()
    if child:
        return child
    if kill_at is not None:
        _die_at_sync(kill_at)
    build(path, ("bonds",) if points else ("train", "bonds", "coded"))
    os._exit(0)


def _die_at_sync(number: int) -> None:
    """SIGKILL this process instead of its ``number``-th fsync."""
    passed = 0
    fsync = os.fsync

    def counting(descriptor: int) -> None:
        nonlocal passed
        passed += 1
        if passed == number:
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(descriptor)

    os.fsync = counting


def _wait(child: int) -> bool:
    """Whether the child finished; False when it was killed."""
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code not in (0, -signal.SIGKILL):
        sys.exit(f"the builder failed with {code}")
    return code == 0


def _compare(folder: Path, truth: dict[str, bytes]) -> None:
    left = contents(folder)
    if left != truth:
        different = {name for name in left | truth if left.get(name) != truth.get(name)}
        sys.exit(f"differs from an uninterrupted build: {sorted(different)}")


def kill_at_random(folder: Path, seed: int) -> None:
    """Kill builders at random moments until 12 were; every end result is compared."""
    begin = time.monotonic()
    _wait(_forked_build(folder / "reference" / "toy.zarr", points=False))
    duration = time.monotonic() - begin
    truth = contents(folder / "reference")
    rng = random.Random(seed)
    killed = 0
    while killed < 12:
        shutil.rmtree(folder / "victim", ignore_errors=True)
        finished = False
        while not finished:
            child = _forked_build(folder / "victim" / "toy.zarr", points=False)
            if killed < 12:
                time.sleep(rng.uniform(0, 0.5 * duration))
                os.kill(child, signal.SIGKILL)
            finished = _wait(child)
            killed += not finished
        _compare(folder / "victim", truth)
    print(f"{killed} kills")


def kill_at_points(folder: Path) -> None:
    """Kill a builder at chosen points of its work, resume, compare; many points."""
    _wait(_forked_build(folder / "reference" / "toy.zarr", points=True))
    truth = contents(folder / "reference")
    killed = 0
    number = 1
    while True:
        path = folder / f"victim{number}" / "toy.zarr"
        if _wait(_forked_build(path, True, number)):
            break
        killed += 1
        _wait(_forked_build(path, points=True))
        _compare(path.parent, truth)
        number += 1 + number // 3
    print(f"{killed} kills")


if __name__ == "__main__":
    if sys.argv[1] == "kill":
        kill_at_random(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        kill_at_points(Path(sys.argv[2]))
