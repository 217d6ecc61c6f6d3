"""Order of samples, with numpy alone and with the same result on every rank.

An epoch permutes the blocks of a split and the samples in each, and cuts the sequence
into one part per rank, so that a rank reads whole blocks except at the cuts. A rank
shuffles its part in windows of some blocks and cuts it into batches; all ranks have
the same number of them.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from pipeline.errors import SpecError

Item = TypeVar("Item")
Positions = npt.NDArray[np.int64]
Counts = npt.NDArray[np.int32] | npt.NDArray[np.int64]


@dataclass(frozen=True)
class SamplerConfig:
    """Rules by which epochs are shuffled and divided into batches.

    ``batch_atoms`` replaces ``batch_size`` if set.
    """

    seed: int
    batch_size: int
    batch_atoms: int | None = None
    shuffle_blocks: int = 16
    world_size: int = 1


@dataclass(frozen=True, eq=False)
class BatchIndex:
    """The batch with number ``offset`` in its epoch, as storage positions."""

    epoch: int
    offset: int
    positions: Positions


def training_batches(
    blocks: Sequence[range],
    n_atoms: Counts,
    config: SamplerConfig,
    *,
    rank: int = 0,
    start: tuple[int, int] = (0, 0),
) -> Iterator[BatchIndex]:
    """Yield batches of ``rank`` from batch ``start[1]`` of epoch ``start[0]`` on.

    The sequence does not depend on the start: a run resumed at the place after its
    last batch sees what it would have seen. A place past the last batch of an epoch is
    the begin of the next.
    """
    first, offset = start
    for epoch in itertools.count(first):
        batches = epoch_batches(blocks, n_atoms, config, epoch, rank)
        for number in range(offset, len(batches)):
            yield BatchIndex(epoch, number, batches[number])
        offset = 0


def epoch_batches(
    blocks: Sequence[range],
    n_atoms: Counts,
    config: SamplerConfig,
    epoch: int,
    rank: int,
) -> list[Positions]:
    """Return the non-empty batches of ``rank``, the same number on every rank.

    By samples, there are as many as the largest part needs for at most ``batch_size``
    each, and sizes on a rank differ by one at most. (With ``batch_size`` 1, where the
    parts are unequal, the larger ones have one batch of two.) By atoms, there are as
    few as keep every batch of every rank within ``batch_atoms``.

    Raises
    ------
    SpecError
        There are more ranks than samples, or almost every batch would hold one sample
        and not all ranks have equally many.
    """
    parts = epoch_parts(blocks, config, epoch)
    sizes = [sum(len(piece) for piece in part) for part in parts]
    if config.batch_atoms is None:
        number = min(-(-max(sizes) // config.batch_size), min(sizes))
        return np.array_split(rank_order(parts[rank], config, epoch, rank), number)
    orders = [rank_order(part, config, epoch, r) for r, part in enumerate(parts)]
    number = max(fewest_batches(n_atoms[order], config.batch_atoms) for order in orders)
    if number > min(sizes):
        raise SpecError(
            f"With batch_atoms = {config.batch_atoms} one process needs {number} "
            f"batches, but another process has only {min(sizes)} samples; raise "
            "batch_atoms or change the number of processes."
        )
    mine = orders[rank]
    bounds = even_bounds(n_atoms[mine], number, config.batch_atoms)
    return [mine[begin:end] for begin, end in itertools.pairwise(bounds)]


def epoch_parts(
    blocks: Sequence[range], config: SamplerConfig, epoch: int
) -> list[list[Positions]]:
    """Return for every rank its pieces of blocks, in order of the epoch.

    Parts differ by one sample at most; their pieces are whole blocks but for the first
    and the last, and samples inside a block are permuted before it is cut.
    """
    total, world = sum(len(block) for block in blocks), config.world_size
    if total < world:
        raise SpecError(
            f"The training split has {total} samples, too few for {world} processes; "
            "start fewer processes."
        )
    generator = np.random.default_rng((config.seed, epoch))
    chosen = [blocks[number] for number in generator.permutation(len(blocks))]
    sequence = np.concatenate(
        [generator.permutation(np.arange(b.start, b.stop)) for b in chosen]
    )
    ends = np.cumsum([len(block) for block in chosen])
    cuts = [total * rank // world for rank in range(world + 1)]
    parts = []
    for begin, end in itertools.pairwise(cuts):
        inside = ends[(ends > begin) & (ends < end)]
        parts.append(np.split(sequence[begin:end], inside - begin))
    return parts


def rank_order(
    pieces: Sequence[Positions], config: SamplerConfig, epoch: int, rank: int
) -> Positions:
    """Samples of a rank's part, shuffled within ``shuffle_blocks`` pieces at a time.

    As good as a full shuffle where the store's own order is random, because then any
    block is a fair sample of the split (measured: docs/measurements/benchmarks.md).
    """
    # Seeds are padded with zeros, so (seed, epoch, 0) would repeat (seed, epoch).
    generator = np.random.default_rng((config.seed, epoch, 1 + rank))
    windows = [
        generator.permutation(
            np.concatenate(pieces[first : first + config.shuffle_blocks])
        )
        for first in range(0, len(pieces), config.shuffle_blocks)
    ]
    return np.concatenate(windows)


def fewest_batches(atoms: Counts, budget: int) -> int:
    """Return the least number of batches of at most ``budget`` atoms, in order."""
    return len(full_bounds(atoms, budget)) - 1


def full_bounds(atoms: Counts, budget: int) -> list[int]:
    """Return bounds of batches, each filled as far as ``budget`` atoms allow.

    No other cut of the sequence has fewer. A sample above the budget is alone.
    """
    reach = _reach(_cumulate(atoms), budget).tolist()
    bounds = [0]
    while bounds[-1] < len(atoms):
        bounds.append(reach[bounds[-1]])
    return bounds


def even_bounds(atoms: Counts, number: int, budget: int) -> list[int]:
    """Return bounds of ``number`` non-empty batches with nearly equal numbers of atoms.

    Bounds are where the cumulated atoms are nearest to equal shares, unless a batch
    would then exceed ``budget`` or the remaining samples would not fit. Needs
    ``fewest_batches(atoms, budget) <= number <= len(atoms)`` and no sample above the
    budget; then it always succeeds.
    """
    count, total = len(atoms), _cumulate(atoms)
    reach = _reach(total, budget).tolist()
    lowest = _latest_fit(total, number, budget)
    shares = total[-1] * np.arange(1, number) / number
    above = np.searchsorted(total, shares)
    below_is_nearer = shares - total[above - 1] < total[above] - shares
    bounds = [0]
    for batch, nearest in enumerate((above - below_is_nearer).tolist(), start=1):
        low = max(lowest[batch], bounds[-1] + 1)
        high = min(reach[bounds[-1]], count - (number - batch))
        bounds.append(min(max(nearest, low), high))
    return [*bounds, count]


def check_budget(
    n_atoms: Counts, sample_ids: npt.NDArray[np.str_], budget: int
) -> None:
    """Refuse a budget that the largest sample alone exceeds."""
    largest = int(np.argmax(n_atoms))
    if n_atoms[largest] > budget:
        raise SpecError(
            f"Sample {str(sample_ids[largest])!r} has {n_atoms[largest]} atoms, more "
            f"than batch_atoms = {budget}; raise batch_atoms to at least "
            f"{n_atoms[largest]}."
        )


def group_items(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Yield ``items`` in groups of ``size``; the last group may be smaller."""
    source = iter(items)
    while group := list(itertools.islice(source, size)):
        yield group


def ordered_batches(count: int, batch_size: int) -> list[Positions]:
    """Return positions 0..count-1 in order, in groups of ``batch_size``."""
    return [
        np.arange(first, min(first + batch_size, count))
        for first in range(0, count, batch_size)
    ]


def ordered_within(n_atoms: Counts, budget: int) -> list[Positions]:
    """Return all positions in order, in groups of at most ``budget`` atoms."""
    bounds = full_bounds(n_atoms, budget)
    return [np.arange(begin, end) for begin, end in itertools.pairwise(bounds)]


def _cumulate(atoms: Counts) -> Positions:
    """Return the number of atoms before every sample and in total, (n + 1,)."""
    return np.concatenate(([0], np.cumsum(atoms, dtype=np.int64)))


def _reach(total: Positions, budget: int) -> Positions:
    """Return the end of the longest batch within ``budget`` from each sample, (n,)."""
    # A budget beyond all atoms could leave the range of int64.
    within = min(budget, int(total[-1]))
    ends = np.searchsorted(total, total[:-1] + within, side="right") - 1
    return np.maximum(ends, np.arange(1, len(total)))


def _latest_fit(total: Positions, number: int, budget: int) -> list[int]:
    """Return the first samples from which the remaining batches hold the rest.

    Shape (number + 1,).

    Entry k is for ``number - k`` batches; a bound before it would leave too much.
    """
    back = np.searchsorted(total, total - budget).tolist()
    lowest = [len(total) - 1]
    for _ in range(number):
        lowest.append(back[lowest[-1]])
    return lowest[::-1]
