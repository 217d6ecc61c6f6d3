"""Damages every file of a sealed store and asks whether anything takes it for sound.

The store has every kind of array: raw, q8, compact and edges.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from faults_stores import COMPACT, Q8, make_materials, spec_of

from kd_train.loader.data import CachedSamples
from pipeline.build.build import build_store
from pipeline.errors import PipelineError
from pipeline.models.checkpoint import load_checkpoint
from pipeline.store.reader import FeatureStore, SplitReader
from pipeline.store.verify import verify_store

FEATURES = {
    "node_features": COMPACT,
    "edge_to_node_features": Q8,
    "vector_features": {},
    "per_atom_energy": {},
    "edge_features": {},
}
# Reads through batches of training go along with every so manieth damage.
_BATCH_EVERY = 5
_BATCH = 16
Numbers = dict[str, np.ndarray]
Read = Callable[[], Numbers]


@dataclass
class Tally:
    """What became of the damages to one kind of file."""

    files: set[str] = field(default_factory=set)
    ways: Counter[str] = field(default_factory=Counter)
    found: int = 0
    refused: int = 0
    right: int = 0
    failures: list[str] = field(default_factory=list)


class Readings:
    """All ways to read a store, and what they gave while it was intact."""

    def __init__(self, path: Path, checkpoint: Path) -> None:
        self.path = path
        model = load_checkpoint(checkpoint).model
        self._graph = model.graph_rule, model.elements
        store = FeatureStore.open(path)
        rng = np.random.default_rng(0)
        self._batches = {
            name: np.array_split(rng.permutation(len(split)), len(split) // _BATCH)
            for name, split in store.splits.items()
        }
        self._truth = {name: read() for name, read in self._reads(store, True)}

    def outcome(self, batches: bool) -> tuple[bool, list[str]]:
        """Whether anything was refused, and what gave numbers that are wrong."""
        try:
            store = FeatureStore.open(self.path)
        except PipelineError:
            return True, []
        refused, wrong = False, []
        for name, read in self._reads(store, batches):
            try:
                got = read()
            except PipelineError:
                refused = True
                continue
            truth = self._truth[name]
            if got.keys() != truth.keys() or not all(
                np.array_equal(got[k], truth[k], equal_nan=got[k].dtype.kind == "f")
                for k in truth
            ):
                wrong.append(name)
        return refused, wrong

    def _reads(self, store: FeatureStore, batches: bool) -> Iterator[tuple[str, Read]]:
        """Every array of every split, decoded, in shuffled batches; and of training."""
        for name, split in store.splits.items():
            chosen = self._batches[name]
            for array in split.arrays:
                yield f"{name}/{array}", _reading(split, array, chosen)
                if split.encoding(array) is not None:
                    yield f"error of {name}/{array}", _stated(split, array)
            if batches:
                rule, elements = self._graph
                samples = CachedSamples(split, rule, elements, tuple(FEATURES))
                for number, positions in enumerate(chosen):
                    yield f"batch {number} of {name}", _training(samples, positions)


def _reading(split: SplitReader, array: str, batches: list[np.ndarray]) -> Read:
    def read() -> Numbers:
        parts = [split.read(positions, [array])[array] for positions in batches]
        return {"rows": np.concatenate(parts), "ids": np.array(split.sample_ids)}

    return read


def _stated(split: SplitReader, array: str) -> Read:
    return lambda: {"error": np.array(split.error(array))}


def _training(samples: CachedSamples, positions: np.ndarray) -> Read:
    def read() -> Numbers:
        data = samples.batch(positions).to_dict()
        return {k: v.numpy() for k, v in data.items() if isinstance(v, torch.Tensor)}

    return read


def kind_of(name: str, path: Path) -> str:
    """Kind of a file of a store, in words."""
    if name.endswith("zarr.json"):
        return "metadata"
    if name.startswith("digests/"):
        return "digests"
    if "/index/commit/" in name:
        return "commit records"
    if "/index/" in name or "/edges/start/" in name or "/edges/n_edges/" in name:
        return "index"
    if "/encodings/" in name:
        return "parameters of encodings"
    if "/edges/" in name:
        return "shards of edges"
    array = name.partition("/c/")[0].removesuffix("_scale").removesuffix("_error")
    split, _, array = array.partition("/")
    encoding = FeatureStore.open(path).splits[split].encoding(array)
    return f"shards, {'raw' if encoding is None else encoding.profile}"


def damages(
    content: bytes, rng: np.random.Generator, first: int, count: int
) -> Iterator[tuple[str, bytes | None]]:
    """``count`` of six ways to damage a file, from ``first``; None takes it away."""
    for number in range(first, first + count):
        way = ("bit", "bit", "bit", "truncation", "bit", "deletion")[number % 6]
        if way == "deletion":
            yield way, None
        elif way == "truncation":
            yield way, content[: int(rng.integers(len(content)))]
        else:
            flipped = bytearray(content)
            flipped[int(rng.integers(len(content)))] ^= 1 << int(rng.integers(8))
            yield way, bytes(flipped)


def _is_found(path: Path) -> bool:
    try:
        return bool(verify_store(path))
    except PipelineError:
        return True


def run_flips(count: int, seed: int, folder: Path) -> dict[str, Tally]:
    """Damage all files of a store, ``count`` times or more, each equally often."""
    materials, path = folder / "materials", folder / "s.zarr"
    make_materials(materials)
    spec = spec_of(materials, path, FEATURES, ("val", "extra"), "gemnet_oc")
    build_store(spec)
    readings = Readings(path, materials / "gemnet_oc.safetensors")
    files = sorted(file for file in path.rglob("*") if file.is_file())
    kinds = {file: kind_of(str(file.relative_to(path)), path) for file in files}
    rng = np.random.default_rng(seed)
    tallies: dict[str, Tally] = {}
    done, each = 0, -(-count // len(files))
    for file in files:
        intact = file.read_bytes()
        tally = tallies.setdefault(kinds[file], Tally())
        tally.files.add(str(file))
        for way, content in damages(intact, rng, done, each):
            file.unlink()
            if content is not None:
                file.write_bytes(content)
            done += 1
            what = f"{way} in {file.relative_to(path)}"
            _judge(what, path, readings, done % _BATCH_EVERY == 0, tally)
            tally.ways[way] += 1
            file.write_bytes(intact)
    if verify_store(path) or readings.outcome(True) != (False, []):
        tallies["metadata"].failures.append("the store is not what it was at the end")
    return tallies


def _judge(
    what: str, path: Path, readings: Readings, batches: bool, tally: Tally
) -> None:
    try:
        found = _is_found(path)
        refused, wrong = readings.outcome(batches)
    except Exception as error:
        tally.failures.append(f"{what}: {type(error).__name__}: {error}")
        return
    tally.found += found
    tally.refused += refused
    tally.right += not refused and not wrong
    if not found:
        tally.failures.append(f"{what}: not found by verify")
    tally.failures += [f"{what}: wrong numbers in {name}" for name in wrong]
