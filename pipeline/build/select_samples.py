"""Samples of a store to label: chosen by their cached features, written as ids."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from pipeline.build.choose_points import Candidates, Method, choose_points
from pipeline.build.descriptors import FEATURES, Descriptors, describe_structures
from pipeline.errors import StoreError
from pipeline.files.atomic import disk_full_as_error
from pipeline.parallel.ordered_map import Count, ignore_counts
from pipeline.spec.id_list import write_ids
from pipeline.store.reader import FeatureStore, SplitReader

_NODE_FEATURES = "features: {node_features: {}}"


@dataclass(frozen=True)
class Wish:
    """Choice of ``budget`` samples of ``split`` by ``method``.

    Samples whose structure is in a split of ``exclude`` are not chosen. They count as
    chosen before for farthest points.
    """

    split: str
    budget: int
    method: Method = "farthest"
    seed: int = 0
    exclude: tuple[str, ...] = ()


@dataclass(frozen=True)
class Coverage:
    """Distances of descriptors to the nearest chosen or excluded one.

    ``candidates`` is the number of samples that could be chosen.
    """

    candidates: int
    largest_distance: float
    mean_distance: float


def select_samples(
    place: str | Path, wish: Wish, out: Path, count: Count = ignore_counts
) -> dict[str, Any]:
    """Write the ids of chosen samples of the store at ``place`` to ``out``.

    Returns ``wish`` and the coverage as plain data. ``count`` is called for pieces of
    the store that are read, then for samples that are chosen. Descriptors take room on
    the disk of ``out`` meanwhile.

    Raises
    ------
    StoreError
        The store is not sealed, lacks a split or ``node_features``, or has fewer
        samples than the budget.
    SpecError
        An id cannot be a line of a file.
    """
    store = FeatureStore.open(place)
    pool, *others = (_split(store, name) for name in (wish.split, *wish.exclude))
    allowed = _allowed(pool, others)
    _check_budget(wish, int(allowed.sum()), len(pool))
    out.parent.mkdir(parents=True, exist_ok=True)
    with disk_full_as_error(out):
        described = describe_structures([pool, *others], out.parent, count)
        candidates = _candidates(pool, described, allowed, wish.seed)
        chosen = choose_points(candidates, wish.budget, wish.method, count)
        write_ids(out, map(str, pool.sample_ids[chosen.numbers]))
    coverage = Coverage(
        int(allowed.sum()),
        float(chosen.distances.max()),
        float(chosen.distances.mean()),
    )
    return {"store": str(place), "out": str(out), **asdict(wish), **asdict(coverage)}


def _candidates(
    pool: SplitReader,
    described: Descriptors,
    allowed: npt.NDArray[np.bool_],
    seed: int,
) -> Candidates:
    size = len(pool)
    return Candidates(
        points=described.rows[:size],
        variances=described.variances,
        allowed=allowed,
        ranks=rank_ids(pool.sample_ids, seed),
        references=described.rows[size:],
    )


def rank_ids(ids: npt.NDArray[Any], seed: int) -> npt.NDArray[np.uint64]:
    """Return (n,) random numbers that follow from seed and id alone."""
    hashes = (xxhash.xxh3_64_intdigest(f"{seed}:{name}".encode()) for name in ids)
    return np.fromiter(hashes, np.uint64, len(ids))


def _split(store: FeatureStore, name: str) -> SplitReader:
    """Return the split ``name``, which has ``node_features``."""
    if name not in store.splits:
        known = ", ".join(store.splits)
        raise StoreError(f"{store.path} has no split {name!r}; it has {known}.")
    split = store.splits[name]
    if FEATURES in split.arrays:
        return split
    if any(FEATURES in other.arrays for other in store.splits.values()):
        raise StoreError(
            f"Split {name!r} of {store.path} has no node_features; remove `features: "
            f"false` from splits.{name} of the spec and build the store again."
        )
    raise StoreError(
        f"{store.path} has no node_features; add the line `{_NODE_FEATURES}` to the "
        "spec and run `kd-cache add-field SPEC`."
    )


def _allowed(pool: SplitReader, others: Sequence[SplitReader]) -> npt.NDArray[np.bool_]:
    """Return (n,) whether the structure of a sample is in none of ``others``."""
    known = [split.checksums for split in others]
    taken = np.concatenate(known) if known else np.zeros(0, np.uint64)
    return ~np.isin(pool.checksums, taken)


def _check_budget(wish: Wish, allowed: int, total: int) -> None:
    if wish.budget <= allowed:
        return
    text = f"{total} samples of split {wish.split!r}"
    if wish.exclude:
        names = ", ".join(map(repr, wish.exclude))
        text = f"{allowed} samples of split {wish.split!r} that are not in {names}"
    raise StoreError(
        f"A budget of {wish.budget} is more than the {text}; lower --budget."
    )
