"""Which samples come when: all once, equal steps, budgets, resumes, shuffling."""

import functools
import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kd_train.loader.sampler import (
    BatchIndex,
    SamplerConfig,
    check_budget,
    epoch_batches,
    epoch_parts,
    even_bounds,
    fewest_batches,
    ordered_batches,
    ordered_within,
    rank_order,
    training_batches,
)
from pipeline.errors import SpecError
from pipeline.store.layout import storage_order

SIZES = st.lists(st.integers(1, 30), min_size=1, max_size=40)
WORLDS = st.integers(1, 7)


def _blocks(sizes: Sequence[int]) -> list[range]:
    ends = np.cumsum(sizes).tolist()
    return [range(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def _atoms(count: int, seed: int = 0, most: int = 40) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, most + 1, count)


def _all_ranks(
    sizes: Sequence[int], atoms: np.ndarray, rule: SamplerConfig, epoch: int
) -> list[list[np.ndarray]]:
    ranks = range(rule.world_size)
    return [epoch_batches(_blocks(sizes), atoms, rule, epoch, rank) for rank in ranks]


def _assert_every_sample_once(ranks: list[list[np.ndarray]], count: int) -> None:
    visited = np.concatenate([batch for batches in ranks for batch in batches])
    assert sorted(visited.tolist()) == list(range(count))


@given(SIZES, WORLDS, st.integers(1, 50), st.integers(1, 20), st.integers(0, 9))
@settings(max_examples=150, deadline=None)
def test_an_epoch_by_samples(
    sizes: list[int], world: int, batch_size: int, buffer: int, epoch: int
) -> None:
    count = sum(sizes)
    world = min(world, count)
    rule = SamplerConfig(3, batch_size, None, buffer, world)
    ranks = _all_ranks(sizes, _atoms(count), rule, epoch)
    _assert_every_sample_once(ranks, count)
    per_rank = [sum(map(len, batches)) for batches in ranks]
    assert max(per_rank) - min(per_rank) <= 1
    assert len({len(batches) for batches in ranks}) == 1
    for batches in ranks:
        lengths = [len(batch) for batch in batches]
        assert min(lengths) >= 1
        assert max(lengths) - min(lengths) <= 1
        assert max(lengths) <= max(batch_size, 2)
    if batch_size > 1 or count % world == 0:
        assert max(len(b) for batches in ranks for b in batches) <= batch_size
        assert len(ranks[0]) == -(-max(per_rank) // batch_size)


@given(SIZES, WORLDS, st.integers(0, 120), st.integers(1, 20), st.integers(0, 9))
@settings(max_examples=150, deadline=None)
def test_an_epoch_by_atoms(
    sizes: list[int], world: int, spare: int, buffer: int, epoch: int
) -> None:
    count = sum(sizes)
    world = min(world, count)
    atoms = _atoms(count, seed=count)
    # Two samples always fit, so no part can need a batch for each of its samples.
    budget = 80 + spare
    rule = SamplerConfig(3, 1, budget, buffer, world)
    try:
        ranks = _all_ranks(sizes, atoms, rule, epoch)
    except SpecError:
        pytest.fail("80 atoms hold any two samples")
    _assert_every_sample_once(ranks, count)
    assert len({len(batches) for batches in ranks}) == 1
    held = [[int(atoms[batch].sum()) for batch in batches] for batches in ranks]
    assert all(0 < found <= budget for batches in held for found in batches)
    # As few as possible: some rank cannot do with one batch less.
    parts = epoch_parts(_blocks(sizes), rule, epoch)
    fewest = [
        _fewest_by_search(atoms[rank_order(part, rule, epoch, rank)].tolist(), budget)
        for rank, part in enumerate(parts)
    ]
    assert len(ranks[0]) == max(fewest)


def _fewest_by_search(atoms: list[int], budget: int) -> int:
    """Dynamic programming over all cuts."""
    best = [0]
    for end in range(1, len(atoms) + 1):
        options, held = [], 0
        for begin in range(end - 1, -1, -1):
            held += atoms[begin]
            if held > budget:
                break
            options.append(best[begin] + 1)
        best.append(min(options))
    return best[-1]


def _most_even_by_search(atoms: list[int], number: int) -> int:
    """Smallest possible atoms of the fullest batch over all cuts into ``number``."""
    total = [0, *itertools.accumulate(atoms)]

    @functools.cache
    def fullest(end: int, batches: int) -> float:
        if batches == 0:
            return 0 if end == 0 else float("inf")
        return min(
            (
                max(fullest(begin, batches - 1), total[end] - total[begin])
                for begin in range(end)
            ),
            default=float("inf"),
        )

    return int(fullest(len(atoms), number))


@given(st.lists(st.integers(1, 60), min_size=1, max_size=25), st.data())
@settings(max_examples=200, deadline=None)
def test_a_cut_by_atoms_exists_for_every_number_it_may_be_asked_for(
    atoms: list[int], data: st.DataObject
) -> None:
    budget = data.draw(st.integers(max(atoms), 200))
    fewest = fewest_batches(np.array(atoms), budget)
    assert fewest == _fewest_by_search(atoms, budget)
    number = data.draw(st.integers(fewest, len(atoms)))
    bounds = even_bounds(np.array(atoms), number, budget)
    assert (bounds[0], bounds[-1], len(bounds)) == (0, len(atoms), number + 1)
    held = [sum(atoms[a:b]) for a, b in itertools.pairwise(bounds)]
    assert all(a < b for a, b in itertools.pairwise(bounds))
    assert max(held) <= budget
    # Each bound is at most half a sample from its equal share, where all fits.
    if budget >= 2 * max(atoms) + sum(atoms) / number:
        assert max(held) <= sum(atoms) / number + 2 * max(atoms)
        assert max(held) <= _most_even_by_search(atoms, number) + 2 * max(atoms)


def test_cuts_that_equal_shares_would_miss() -> None:
    """Equal shares alone would leave batches empty or overfull here."""
    atoms = np.array([1, 1, 1, 100, 1, 1])
    assert fewest_batches(atoms, 100) == 3
    assert even_bounds(atoms, 3, 100) == [0, 3, 4, 6]
    assert even_bounds(atoms, 6, 100) == [0, 1, 2, 3, 4, 5, 6]
    assert fewest_batches(atoms, 102) == 2


def test_more_processes_than_samples_are_refused() -> None:
    rule = SamplerConfig(0, 4, world_size=4)
    with pytest.raises(SpecError, match="3 samples, too few for 4 processes"):
        epoch_batches([range(3)], np.ones(3, np.int64), rule, 0, 0)


def test_steps_that_cannot_be_equal_are_refused() -> None:
    """Three samples, one a step, on two processes."""
    rule = SamplerConfig(0, 4, batch_atoms=7, world_size=2)
    with pytest.raises(SpecError, match=r"batch_atoms = 7.*2 batches.*1 samples"):
        epoch_batches([range(3)], np.full(3, 7), rule, 0, 0)


def test_a_sample_above_the_budget_is_named() -> None:
    ids = np.array(["a", "big", "c"], np.dtypes.StringDType())
    check_budget(np.array([3, 9, 5]), ids, 9)
    with pytest.raises(SpecError, match=r"'big' has 9 atoms.*batch_atoms.*at least 9"):
        check_budget(np.array([3, 9, 5]), ids, 8)


@pytest.mark.parametrize("atoms", [None, 200])
@pytest.mark.parametrize("world", [1, 3])
def test_order_follows_from_seed_epoch_and_world(world: int, atoms: int | None) -> None:
    def order(seed: int, epoch: int, world: int = world) -> list[list[int]]:
        rule = SamplerConfig(seed, 16, atoms, 8, world)
        ranks = _all_ranks([20] * 40, _atoms(800), rule, epoch)
        return [np.concatenate(batches).tolist() for batches in ranks]

    first = order(3, 5)
    assert first == order(3, 5)
    seen = [first, order(3, 6), order(4, 5), order(0, 1), order(1, 0)]
    for left, right in itertools.combinations(seen, 2):
        assert left != right
    assert order(3, 5, world + 1)[0] != first[0]
    assert all(sorted(ranks) != ranks for ranks in first)


def test_ranks_own_whole_blocks_except_at_the_cuts() -> None:
    sizes = [7, 30, 12, 25, 9, 18, 22, 14, 5, 16, 11, 28]
    blocks, rule = _blocks(sizes), SamplerConfig(1, 4, world_size=4)
    owner = np.repeat(np.arange(len(sizes)), sizes)
    parts = epoch_parts(blocks, rule, epoch=2)
    owned = [set(owner[np.concatenate(part)].tolist()) for part in parts]
    shared = [len(a & b) for a, b in itertools.pairwise(owned)]
    assert all(common <= 1 for common in shared)
    assert sum(map(len, owned)) <= len(sizes) + 3
    for part in parts:
        for piece in part[1:-1]:
            (block,) = set(owner[piece].tolist())
            assert len(piece) == sizes[block]


def test_a_block_that_is_cut_is_permuted_first() -> None:
    rule = SamplerConfig(1, 4, world_size=2)
    halves = [np.concatenate(p) for p in epoch_parts([range(1000)], rule, 0)]
    assert [len(half) for half in halves] == [500, 500]
    # Of a fair half of 0..999 the mean is 499.5 with a deviation of 9.1.
    assert all(abs(half.mean() - 499.5) < 50 for half in halves)


def test_samples_of_a_block_are_spread_over_the_window() -> None:
    """Neither blocks nor samples keep their neighbours of the store."""
    rule = SamplerConfig(1, 16, shuffle_blocks=10)
    (batches,) = _all_ranks([20] * 40, _atoms(800), rule, 0)
    order = np.concatenate(batches)
    windows = [set((order[i : i + 200] // 20).tolist()) for i in range(0, 800, 200)]
    assert all(len(window) == 10 for window in windows)
    assert windows[0] != set(range(10))
    assert float((np.diff(order) == 1).mean()) < 0.05


MODES = [
    pytest.param(SamplerConfig(4, 9, world_size=2), id="samples"),
    pytest.param(SamplerConfig(4, 9, 130, 2, 2), id="atoms"),
    pytest.param(SamplerConfig(4, 9, 130, 3, 1), id="atoms, one process"),
]


def _draws(
    rule: SamplerConfig, rank: int, start: tuple[int, int], count: int
) -> list[BatchIndex]:
    sizes = [11, 23, 7, 18, 4, 30, 16]
    stream = training_batches(
        _blocks(sizes), _atoms(sum(sizes)), rule, rank=rank, start=start
    )
    return list(itertools.islice(stream, count))


@pytest.mark.parametrize("rule", MODES)
def test_resuming_after_any_step_goes_on_as_if_uninterrupted(
    rule: SamplerConfig,
) -> None:
    for rank in range(rule.world_size):
        whole = _draws(rule, rank, (0, 0), 60)
        last = next(n for n, draw in enumerate(whole) if draw.epoch == 2)
        assert last > 10
        for step in range(1, last + 1):
            # What a checkpoint holds after this many steps.
            place = (whole[step - 1].epoch, whole[step - 1].offset + 1)
            tail = _draws(rule, rank, place, last - step + 5)
            for left, right in zip(whole[step:], tail, strict=False):
                assert (left.epoch, left.offset) == (right.epoch, right.offset)
                assert np.array_equal(left.positions, right.positions)


def test_epochs_may_have_different_numbers_of_batches() -> None:
    """Else the test above would not show that places are right."""
    draws = _draws(SamplerConfig(4, 9, 130, 3, 1), 0, (0, 0), 300)
    lengths = {
        sum(draw.epoch == epoch for draw in draws) for epoch in range(draws[-1].epoch)
    }
    assert len(lengths) > 1


def test_epochs_follow_each_other_without_repeats() -> None:
    draws = _draws(SamplerConfig(2, 10), 0, (0, 0), 33)
    for epoch in range(3):
        batches = [draw.positions for draw in draws if draw.epoch == epoch]
        _assert_every_sample_once([batches], 109)
        assert len(batches) == 11


def test_ordered_batches_keep_the_order() -> None:
    batches = ordered_batches(7, 3)
    assert [batch.tolist() for batch in batches] == [[0, 1, 2], [3, 4, 5], [6]]
    assert ordered_batches(0, 3) == []
    within = ordered_within(np.array([4, 5, 1, 20, 2, 2]), 10)
    assert [batch.tolist() for batch in within] == [[0, 1, 2], [3], [4, 5]]


def _variance_ratio(labels: np.ndarray, rule: SamplerConfig, block: int) -> float:
    """Variance of the means of batches ÷ that with one window over all blocks."""
    blocks = _blocks([block] * (len(labels) // block))
    everything = SamplerConfig(rule.seed, rule.batch_size, shuffle_blocks=len(blocks))

    def variance(rule: SamplerConfig) -> float:
        batches = [
            batch
            for epoch in range(8)
            for batch in epoch_batches(blocks, labels, rule, epoch, 0)
        ]
        return float(np.var([labels[batch].mean() for batch in batches]))

    return variance(rule) / variance(everything)


@pytest.fixture(scope="module")
def trajectories() -> np.ndarray:
    """(20 000,) labels of 400 systems, 50 frames of each in a row."""
    generator = np.random.default_rng(6)
    systems = np.repeat(generator.normal(0, np.sqrt(0.9), 400), 50)
    return systems + generator.normal(0, np.sqrt(0.1), len(systems))


@pytest.mark.parametrize("buffer", [1, 4, 16])
def test_block_shuffle_of_the_stores_order_is_a_full_shuffle(
    buffer: int, trajectories: np.ndarray
) -> None:
    stored = trajectories[storage_order(len(trajectories), 0)]
    rule = SamplerConfig(0, 25, shuffle_blocks=buffer)
    # 6 400 batches: their variance is known to 1.8 %.
    assert _variance_ratio(stored, rule, 100) == pytest.approx(1, abs=0.1)


def test_block_shuffle_of_the_natural_order_is_not(trajectories: np.ndarray) -> None:
    """Batches from two systems: what the test above would see if order were natural."""
    rule = SamplerConfig(0, 25, shuffle_blocks=1)
    assert _variance_ratio(trajectories, rule, 100) > 5
