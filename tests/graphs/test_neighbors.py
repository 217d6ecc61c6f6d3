"""Neighbour lists against exhaustive search, matscipy and the written rules."""

import itertools

import numpy as np
import pytest

from pipeline.errors import DataError
from pipeline.graphs.neighbors import NeighborSpec, limit_warning, neighbor_edges
from tests.graphs.search import as_tuples, exhaustive

UNLIMITED = 10**6


@pytest.mark.parametrize("seed", range(30))
def test_same_edges_as_exhaustive_search(random_structure, seed):
    structure = random_structure(seed)
    cutoff = 2.0 + seed % 5
    edges = neighbor_edges(structure, NeighborSpec(cutoff, UNLIMITED, symmetric=False))
    assert as_tuples(edges) == sorted(exhaustive(structure, cutoff))


@pytest.mark.parametrize("symmetric", [False, True])
def test_no_limit_is_a_limit_that_no_atom_meets(random_structure, symmetric):
    structure = random_structure(4)
    wanted = neighbor_edges(structure, NeighborSpec(7.0, UNLIMITED, symmetric))
    found = neighbor_edges(structure, NeighborSpec(7.0, None, symmetric))
    assert len(found) > 100
    assert as_tuples(found) == as_tuples(wanted)
    assert found.crowded == 0


@pytest.mark.parametrize("seed", range(30, 50))
def test_same_edges_as_matscipy(random_structure, seed):
    neighbours = pytest.importorskip("matscipy.neighbours")
    structure = random_structure(seed)
    edges = neighbor_edges(structure, NeighborSpec(6.0, UNLIMITED, symmetric=False))
    i, j, shift = neighbours.neighbour_list(
        "ijS",
        positions=structure.positions,
        cell=structure.cell,
        pbc=structure.pbc,
        cutoff=6.0,
    )
    expected = zip(i.tolist(), j.tolist(), map(tuple, shift.tolist()), strict=True)
    assert as_tuples(edges) == sorted(expected)


def test_cell_smaller_than_cutoff_sees_its_own_images(make_structure):
    lonely = make_structure([[0.3, 0.2, 0.1]], 2.0 * np.eye(3), [True] * 3)
    edges = neighbor_edges(lonely, NeighborSpec(4.0, UNLIMITED, symmetric=False))
    # Integer points within radius 2 of the origin, the origin left out.
    assert len(edges) == 32


@pytest.mark.parametrize(
    ("distance", "seen"),
    [(2.0, True), (np.nextafter(2.0, 3.0), False), (0.02, True), (0.005, False)],
)
def test_cutoff_is_inclusive_and_coinciding_atoms_are_blind(
    make_structure, distance, seen
):
    pair = make_structure([[0, 0, 0], [distance, 0, 0]])
    edges = neighbor_edges(pair, NeighborSpec(2.0, UNLIMITED, symmetric=False))
    assert len(edges) == (2 if seen else 0)


@pytest.mark.parametrize("flags", [(1, 1, 1), (0, 1, 0)])
def test_periodicity_is_not_ignored(make_structure, flags):
    """A5: a rule for molecules refuses what has any periodic direction."""
    rule = NeighborSpec(1.5, UNLIMITED, symmetric=False, periodic=False)
    cell, positions = 2.0 * np.eye(3), [[0, 0, 0], [1, 0, 0]]
    crystal = make_structure(positions, cell, flags)
    told = "T T T" if all(flags) else "F T F"
    with pytest.raises(DataError, match=rf"pbc is {told}.*use_pbc.*pbc: none"):
        neighbor_edges(crystal, rule)
    molecule = make_structure(positions, cell)
    assert as_tuples(neighbor_edges(molecule, rule)) == [
        (0, 1, (0, 0, 0)),
        (1, 0, (0, 0, 0)),
    ]


@pytest.mark.parametrize("strict", [True, False])
def test_atoms_that_meet_the_limit_are_counted(make_structure, strict):
    """A11: those with more neighbours within the cutoff than the limit."""
    # Neighbours within 2.5 Å: two of the ends, three of those beside them, else four.
    row = make_structure([[float(k), 0, 0] for k in range(6)])
    counts = {
        limit: neighbor_edges(
            row, NeighborSpec(2.5, limit, False, strict=strict)
        ).crowded
        for limit in (4, 3, 2, 1)
    }
    assert counts == {4: 0, 3: 2, 2: 4, 1: 6}
    narrow = NeighborSpec(1.5, 1, False, strict=strict, base=(2.5, 2))
    assert neighbor_edges(row, narrow).crowded == 4


def test_the_limit_is_told_with_its_share():
    """A11: nothing where no atom met it."""
    rule = NeighborSpec(12.0, 50, symmetric=False)
    assert limit_warning(rule, 0, 8) is None
    told = limit_warning(rule, 3, 8)
    assert told is not None
    assert told.startswith("37.5 % of 8 atoms have more than 50 neighbours within 12 Å")


@pytest.mark.parametrize("symmetric", [False, True])
def test_single_atom_has_no_edges(make_structure, symmetric):
    edges = neighbor_edges(
        make_structure([[0, 0, 0]]), NeighborSpec(5.0, 10, symmetric)
    )
    assert edges.edge_index.shape == (2, 0)
    assert edges.cell_offsets.shape == (0, 3)
    assert edges.edge_index.dtype == edges.cell_offsets.dtype == np.int64


SLAB = [[4.0, 0, 0], [0, 4.0, 0], [0, 0, 0]]


@pytest.mark.parametrize(
    ("positions", "cell", "pbc", "words"),
    [
        ([[np.nan, 0, 0]], np.zeros((3, 3)), [False] * 3, "neighbours .* of 1 atoms"),
        ([[0, 0, 0]], np.zeros((3, 3)), [True] * 3, "singular or only 0 Å"),
        ([[0, 0, 0]], SLAB, [True] * 3, "singular or only 0 Å"),
        ([[0, 0, 0]], np.diag([4.0, np.nan, 4.0]), [True] * 3, "singular"),
        ([[0, 0, 0]], np.diag([4.0, 0.3, 4.0]), [True] * 3, "only 0.3 Å high"),
        # Long vectors, nearly in one plane.
        (
            [[0, 0, 0]],
            [[4.0, 0, 0], [0, 4.0, 0], [9.0, 9.0, 0.2]],
            [True] * 3,
            "only 0.089 Å high",
        ),
    ],
)
def test_impossible_structures_are_refused(make_structure, positions, cell, pbc, words):
    structure = make_structure(positions, cell, pbc)
    with pytest.raises(DataError, match=words):
        neighbor_edges(structure, NeighborSpec(5.0, 10, symmetric=False))


@pytest.mark.parametrize("far", [1e4, 1e6, 1e300])
def test_a_stray_atom_does_not_end_the_process(make_structure, far):
    """A12: vesin divided by zero, and the process was gone without a word."""
    positions = [[0.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, far / 2, far]]
    flags = [(False, False, False), (True, False, False), (True, True, False)]
    for pbc in flags:
        structure = make_structure(positions, 10 * np.eye(3), pbc)
        if sum(pbc) == 2 and far == 1e4:
            assert len(neighbor_edges(structure, NeighborSpec(5.0, 20, False)))
            continue
        with pytest.raises(DataError, match="too far for its few neighbours.*unit"):
            neighbor_edges(structure, NeighborSpec(5.0, 20, False))


def test_flat_vectors_do_no_harm_where_nothing_repeats(make_structure):
    structure = make_structure([[0, 0, 0]], SLAB, [True, True, False])
    edges = neighbor_edges(structure, NeighborSpec(4.5, 10, symmetric=False))
    assert len(edges) == 4


def ideal_crystal(make_structure, turn, offset=0.0):
    """Perfect simple cubic 2 x 2 x 2 cell, turned and moved as a whole."""
    grid = np.array(list(itertools.product(range(2), repeat=3)), float)
    return make_structure(2.55 * grid @ turn + offset, 5.1 * turn, [True] * 3)


@pytest.mark.parametrize("limit", [4, 6, 10, 15])
def test_ties_at_the_limit_go_by_source_then_shift(make_structure, limit):
    crystal = ideal_crystal(make_structure, np.eye(3))
    ranked = {}
    for (i, j, shift), distance in exhaustive(crystal, 5.0).items():
        ranked.setdefault(i, []).append((round(distance, 6), j, shift))
    expected = sorted(
        (i, j, shift)
        for i, candidates in ranked.items()
        for _, j, shift in sorted(candidates)[:limit]
    )
    edges = neighbor_edges(crystal, NeighborSpec(5.0, limit, symmetric=False))
    assert as_tuples(edges) == expected


@pytest.mark.parametrize("symmetric", [False, True])
def test_ties_do_not_depend_on_rounding(make_structure, symmetric):
    rule = NeighborSpec(6.0, 8, symmetric)
    expected = as_tuples(neighbor_edges(ideal_crystal(make_structure, np.eye(3)), rule))
    rng = np.random.default_rng(0)
    for offset in rng.uniform(-50, 50, (20, 3)):
        turn, _ = np.linalg.qr(rng.normal(size=(3, 3)))
        moved = ideal_crystal(make_structure, turn, offset)
        assert as_tuples(neighbor_edges(moved, rule)) == expected


@pytest.mark.parametrize("limit", [3, UNLIMITED])
@pytest.mark.parametrize("seed", range(10))
def test_symmetric_graph_mirrors_the_upward_edges(random_structure, seed, limit):
    structure = random_structure(seed)
    directed = neighbor_edges(structure, NeighborSpec(5.0, limit, symmetric=False))
    zero = (0, 0, 0)
    upward = {
        (i, j, n) for i, j, n in as_tuples(directed) if j < i or (j == i and n < zero)
    }
    mirrors = {(j, i, (-a, -b, -c)) for i, j, (a, b, c) in upward}
    edges = neighbor_edges(structure, NeighborSpec(5.0, limit, symmetric=True))
    assert as_tuples(edges) == sorted(upward | mirrors)


def test_limit_keeps_the_nearest(make_structure):
    line = make_structure([[x, 0, 0] for x in (0.0, 1.0, 2.1, 3.3, 4.6)])
    edges = neighbor_edges(line, NeighborSpec(10.0, 2, symmetric=False))
    sources = {i: [j for k, j, _ in as_tuples(edges) if k == i] for i in range(5)}
    assert sources == {0: [1, 2], 1: [0, 2], 2: [1, 3], 3: [2, 4], 4: [2, 3]}
