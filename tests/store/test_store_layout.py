import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import DataError, SpecError
from pipeline.store.layout import plan_blocks, storage_order

cases = st.tuples(
    st.lists(st.integers(1, 60), min_size=1, max_size=300),
    st.sampled_from([60, 61, 100, 1000, 1024, 2048]),
    st.integers(-(2**70), 2**70),
)


@given(cases)
@settings(max_examples=150, deadline=None)
def test_every_atom_has_its_own_row_and_no_sample_crosses_a_block(case):
    counts, rows, seed = case
    plan = plan_blocks(counts, rows, seed)
    assert sorted(plan.order) == list(range(len(counts)))
    assert plan.n_atoms.tolist() == [counts[i] for i in plan.order]
    atom_rows = [
        row
        for start, n in zip(plan.start.tolist(), plan.n_atoms.tolist(), strict=True)
        for row in range(start, start + n)
    ]
    assert len(set(atom_rows)) == sum(counts)
    assert max(atom_rows) < plan.n_blocks * rows
    last = plan.start + plan.n_atoms - 1
    assert (plan.start // rows == last // rows).all()


@given(cases)
@settings(max_examples=150, deadline=None)
def test_blocks_are_packed_greedily_in_storage_order(case):
    counts, rows, seed = case
    plan = plan_blocks(counts, rows, seed)
    block, used, expected = 0, 0, []
    for n in plan.n_atoms.tolist():
        if used + n > rows:
            block, used = block + 1, 0
        expected.append((block, block * rows + used))
        used += n
    assert plan.start.tolist() == [start for _, start in expected]
    assert plan.n_blocks == block + 1
    members = [b for b, _ in expected]
    assert plan.block_bounds.tolist() == [
        *(members.index(b) for b in range(block + 1)),
        len(counts),
    ]


@given(cases)
@settings(max_examples=150, deadline=None)
def test_sample_rows_are_dense_inside_blocks_of_equal_size(case):
    counts, rows, seed = case
    plan = plan_blocks(counts, rows, seed)
    sizes = np.diff(plan.block_bounds)
    assert plan.samples_per_block == sizes.max()
    for block, (first, end) in enumerate(
        np.lib.stride_tricks.sliding_window_view(plan.block_bounds, 2)
    ):
        base = block * plan.samples_per_block
        expected = np.arange(base, base + end - first)
        assert (plan.sample_row[first:end] == expected).all()


def test_sample_axis_is_a_whole_number_of_inner_chunks():
    plan = plan_blocks(np.ones(5000, np.int64), 3072)
    assert plan.samples_per_block == 3072
    plan = plan_blocks(np.ones(1500, np.int64), 2048)
    assert plan.samples_per_block == 2048
    assert plan_blocks([1, 1, 1], 7).samples_per_block == 3


def test_order_is_fixed_for_all_time():
    # First values of the documented hash, computed once with plain Python integers.
    assert storage_order(8, 0).tolist() == _order_in_plain_python(8, 0)
    assert storage_order(50, 12345).tolist() == _order_in_plain_python(50, 12345)


def _order_in_plain_python(n: int, seed: int) -> list[int]:
    top = 2**64

    def mix(value: int) -> int:
        value = (value + 0x9E3779B97F4A7C15) % top
        value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % top
        value = (value ^ (value >> 27)) * 0x94D049BB133111EB % top
        return value ^ (value >> 31)

    return sorted(range(n), key=lambda i: mix((mix(seed) + i) % top))


def test_order_depends_on_the_seed_and_breaks_up_neighbours():
    orders = [storage_order(4000, seed) for seed in range(4)]
    assert len({order.tobytes() for order in orders}) == 4
    for order in orders:
        # A random permutation keeps one pair of neighbours in expectation.
        assert (np.diff(order) == 1).sum() < 10
        assert abs(np.corrcoef(order, np.arange(4000))[0, 1]) < 0.06


@pytest.mark.parametrize(
    ("counts", "rows", "error", "words"),
    [
        ([], 10, DataError, "no samples"),
        ([3, 0], 10, DataError, "Sample 1 of the dataset has no atoms"),
        ([3, 11], 10, SpecError, "Sample 1 .* 11 atoms.*rows_per_block = 10.*to 11"),
        ([3, 1100], 1024, SpecError, "set it to 2048"),
        ([3], 0, SpecError, "rows_per_block is 0.*try 1"),
        ([3], -5, SpecError, "rows_per_block is -5"),
        ([3], 1500, SpecError, "rows_per_block is 1500.*try 2048"),
    ],
)
def test_unusable_input_is_refused(counts, rows, error, words):
    with pytest.raises(error, match=words):
        plan_blocks(counts, rows)
