"""Shuffled batch reads: this store's reader, a flat memory map, zarr-python; one run.

All three return the same bytes (checked). Ratios are paired within a round, so that
other load on the machine cancels.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import zarr

from pipeline.store.layout import BlockPlan, plan_blocks
from pipeline.store.reader import FeatureStore
from pipeline.store.writer import ArrayPlan, SplitPlan, StoreWriter, create_store

WIDTHS = {"features/node_features": 256, "features/edge_to_node_features": 512}
BATCH = 32
Read = Callable[[np.ndarray], list[np.ndarray]]


def build_store(path: Path, n_samples: int, rng: np.random.Generator) -> BlockPlan:
    blocks = plan_blocks(rng.integers(40, 81, n_samples), 16384)
    arrays = tuple(ArrayPlan(p, "node", (c,), "float16") for p, c in WIDTHS.items())
    ids = [str(index) for index in blocks.order]
    plan = SplitPlan("train", ids, np.zeros(n_samples, np.uint64), blocks, arrays)
    create_store(path, [plan], {"fingerprint": "benchmark"})
    writer = StoreWriter(path)
    for block in writer.pending_blocks("train"):
        rows = writer.splits["train"].valid_rows("node", block)
        values = {
            path: rng.standard_normal((rows, width), np.float32)
            for path, width in WIDTHS.items()
        }
        writer.write_block("train", block, values)
    writer.seal()
    return blocks


def flat_copies(path: Path, folder: Path, blocks: BlockPlan) -> dict[str, Path]:
    store = FeatureStore.open(path).splits["train"]
    files = {}
    for name, width in WIDTHS.items():
        files[name] = folder / f"{width}.bin"
        with files[name].open("wb") as stream:
            for block in range(blocks.n_blocks):
                positions = np.array(store.block_positions(block))
                store.read(positions, [name])[name].tofile(stream)
    return files


def readers(path: Path, flat: dict[str, Path], blocks: BlockPlan) -> dict[str, Read]:
    split = FeatureStore.open(path).splits["train"]
    names = list(WIDTHS)
    counts = blocks.n_atoms.astype(np.int64)
    flat_start = np.cumsum(counts) - counts
    maps = [
        np.memmap(flat[name], np.float16, "r").reshape(-1, WIDTHS[name])
        for name in names
    ]
    arrays = [zarr.open_array(path / "train" / name, mode="r") for name in names]

    def gather(sources: list, start: np.ndarray, positions: np.ndarray) -> list:
        ranges = [(start[p], start[p] + counts[p]) for p in positions.tolist()]
        return [np.concatenate([s[i:j] for i, j in ranges]) for s in sources]

    return {
        "flat np.memmap": lambda p: gather(maps, flat_start, p),
        "this reader": lambda p: list(split.read(p, names).values()),
        "zarr-python": lambda p: gather(arrays, blocks.start, p),
    }


def evict(paths: list[Path]) -> None:
    for path in paths:
        for file in [path] if path.is_file() else path.rglob("*"):
            if file.is_file():
                descriptor = os.open(file, os.O_RDONLY)
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(descriptor)


def time_batches(read: Read, batches: np.ndarray) -> float:
    begin = time.perf_counter()
    for batch in batches:
        read(batch)
    return (time.perf_counter() - begin) / len(batches)


def print_table(title: str, times: dict[str, list[float]]) -> None:
    base = times["flat np.memmap"]
    print(f"\n{title}")
    print(f"{'reader':<16}{'ms/batch':>10}{'samples/s':>12}{'x memmap':>10}")
    for name, values in times.items():
        middle = statistics.median(values)
        pairs = zip(base, values, strict=True)
        ratio = statistics.median(b / v for b, v in pairs)
        print(f"{name:<16}{middle * 1e3:>10.3f}{BATCH / middle:>12,.0f}{ratio:>10.3f}")


def shuffled(n_samples: int, rng: np.random.Generator) -> np.ndarray:
    order = rng.permutation(n_samples)
    return order[: n_samples // BATCH * BATCH].reshape(-1, BATCH)


def check_equal(cases: dict[str, Read], batches: np.ndarray) -> None:
    for number, batch in enumerate(batches):
        expected = cases["flat np.memmap"](batch)
        np.testing.assert_equal(cases["this reader"](batch), expected)
        if number < 3:
            np.testing.assert_equal(cases["zarr-python"](batch), expected)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        path = Path(name) / "store.zarr"
        blocks = build_store(path, options.samples, rng)
        flat = flat_copies(path, Path(name), blocks)
        cases = readers(path, flat, blocks)
        batches = shuffled(options.samples, rng)
        check_equal(cases, batches)
        warm: dict[str, list[float]] = {case: [] for case in cases}
        for _ in range(options.rounds):
            for case, read in cases.items():
                some = batches[:3] if case == "zarr-python" else batches
                warm[case].append(time_batches(read, some))
        n_bytes = sum(array.nbytes for array in cases["this reader"](batches[0]))
        size = f"{n_bytes / 2**20:.1f} MiB per batch of {BATCH} samples"
        print_table(f"warm page cache, {size}", warm)
        # Mapped pages cannot be evicted, so all maps have to go first.
        del cases, read
        cold: dict[str, list[float]] = {"flat np.memmap": [], "this reader": []}
        for _ in range(3):
            for case in cold:
                evict([path, *flat.values()])
                read = readers(path, flat, blocks)[case]
                cold[case].append(time_batches(read, shuffled(options.samples, rng)))
                del read
        print_table("evicted page cache, first epoch with all checksums", cold)


if __name__ == "__main__":
    main()
