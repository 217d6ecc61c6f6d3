"""Graphs of models that have several, against the written rules."""

import dataclasses
import itertools

import numpy as np
import pytest

from pipeline.graphs.neighbors import ExtraGraph, NeighborSpec, neighbor_edges
from tests.graphs.search import as_tuples, exhaustive

BASE = (5.0, 40)
MARGIN = 0.01


def tagged(structure, seed):
    tags = np.random.default_rng(seed).integers(0, 3, len(structure))
    return dataclasses.replace(structure, tags=tags.astype(np.int8))


def nearest(found, limit, strict=True, value=lambda distance: distance):
    """The edges of ``found`` (by key: distance) that a limit leaves, per target."""
    kept = {}
    by_target = {}
    for key, distance in found.items():
        by_target.setdefault(key[0], []).append((round(distance, 6), *key[1:]))
    for target, candidates in by_target.items():
        ranked = sorted(candidates)
        chosen = ranked[:limit]
        if not strict and len(ranked) > limit:
            first_beyond = found[target, *ranked[limit][1:]]
            last = value(first_beyond) + MARGIN
            chosen = [c for c in ranked if value(found[target, *c[1:]]) <= last]
        for _, source, shift in chosen:
            kept[target, source, shift] = found[target, source, shift]
    return kept


def within(found, cutoff):
    return {key: distance for key, distance in found.items() if distance <= cutoff}


def symmetrised(found):
    """Upward edges and their mirrors."""
    zero = (0, 0, 0)
    upward = {(i, j, n) for i, j, n in found if j < i or (j == i and n < zero)}
    return upward | {(j, i, tuple(-x for x in n)) for i, j, n in upward}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("seed", range(12))
def test_all_graphs_are_cut_out_of_the_base(random_structure, seed, strict):
    structure = tagged(random_structure(seed), seed)
    rule = NeighborSpec(
        4.0,
        6,
        symmetric=True,
        strict=strict,
        base=BASE,
        extra_graphs=(
            ExtraGraph("short", 3.2, 5),
            ExtraGraph("chosen", 4.5, 7, tags=(1, 2)),
            ExtraGraph("whole", *BASE),
            ExtraGraph("near", 3.5, BASE[1]),
        ),
    )
    edges = neighbor_edges(structure, rule)
    cutoff, limit = BASE
    base = nearest(
        exhaustive(structure, cutoff), limit, strict, lambda distance: distance**2
    )
    main = nearest(within(base, 4.0), 6, strict)
    assert as_tuples(edges) == sorted(symmetrised(main))
    short = nearest(within(base, 3.2), 5, strict)
    assert as_tuples(edges.extra_graphs["short"]) == sorted(short)
    chosen = nearest(within(base, 4.5), 7, strict)
    marked = np.isin(structure.tags, (1, 2))
    chosen = [key for key in chosen if marked[key[0]] or marked[key[1]]]
    assert as_tuples(edges.extra_graphs["chosen"]) == sorted(chosen)
    assert as_tuples(edges.extra_graphs["whole"]) == sorted(base)
    # An equal limit is not applied again, so a margin of the base stays.
    assert as_tuples(edges.extra_graphs["near"]) == sorted(within(base, 3.5))


@pytest.mark.parametrize("seed", range(12, 18))
def test_sides_without_a_base_are_cut_out_of_the_directed_main_graph(
    random_structure, seed
):
    structure = random_structure(seed)
    extra_graphs = (ExtraGraph("side", 3.0, 4), ExtraGraph("same", 4.0, 8))
    edges = neighbor_edges(
        structure, NeighborSpec(4.0, 8, symmetric=True, extra_graphs=extra_graphs)
    )
    main = nearest(exhaustive(structure, 4.0), 8)
    assert as_tuples(edges) == sorted(symmetrised(main))
    assert as_tuples(edges.extra_graphs["same"]) == sorted(main)
    expected = nearest(within(main, 3.0), 4)
    assert as_tuples(edges.extra_graphs["side"]) == sorted(expected)


def test_tags_are_looked_at_after_the_limit(make_structure):
    """A neighbour that is filtered out has used its place."""
    line = make_structure([[x, 0, 0] for x in (0.0, 1.0, 2.1, 3.3)])
    line = dataclasses.replace(line, tags=np.array([0, 0, 0, 2], np.int8))
    side = ExtraGraph("side", 10.0, 2, tags=(2,))
    rule = NeighborSpec(10.0, 50, symmetric=False, extra_graphs=(side,))
    found = as_tuples(neighbor_edges(line, rule).extra_graphs["side"])
    pairs = [(target, source) for target, source, _ in found]
    # Atoms 0 and 1 have two nearer neighbours, and atom 2 prefers 1 and 3.
    assert pairs == [(2, 3), (3, 1), (3, 2)]


@pytest.mark.parametrize("in_base", [True, False])
def test_a_margin_counts_squares_in_the_base_and_lengths_elsewhere(
    make_structure, in_base
):
    """Behind the limit come one at 3 Å and others 0.001, 0.005 and 0.1 Å farther."""
    radii = (2.0, 3.0, 3.001, 3.005, 3.1)
    angles = np.linspace(0, 5, len(radii))
    rays = np.column_stack((np.cos(angles), np.sin(angles), 0 * angles))
    star = make_structure(np.vstack(([[0, 0, 0]], np.array(radii)[:, None] * rays)))
    side = ExtraGraph("side", 4.0, 1)
    base = (4.0, 1) if in_base else (4.0, 100)
    rule = NeighborSpec(
        4.0, 1, symmetric=False, strict=False, base=base, extra_graphs=(side,)
    )
    found = as_tuples(neighbor_edges(star, rule).extra_graphs["side"])
    centre = [source for target, source, _ in found if target == 0]
    # 3.001² - 3² is 0.006, 3.005² - 3² is 0.03.
    assert centre == ([1, 2, 3] if in_base else [1, 2, 3, 4])


def test_limits_that_are_not_strict_keep_whole_shells(make_structure):
    grid = np.array(list(itertools.product(range(2), repeat=3)), float)
    crystal = make_structure(2.5 * grid, 5.0 * np.eye(3), [True] * 3)
    loose = neighbor_edges(crystal, NeighborSpec(5.0, 3, symmetric=False, strict=False))
    assert np.bincount(loose.edge_index[1]).tolist() == [6] * 8
    tight = neighbor_edges(crystal, NeighborSpec(5.0, 3, symmetric=False))
    assert np.bincount(tight.edge_index[1]).tolist() == [3] * 8
    # A limit that nothing exceeds takes nothing away.
    full = neighbor_edges(crystal, NeighborSpec(2.6, 6, symmetric=False, strict=False))
    assert as_tuples(full) == as_tuples(loose)


def test_bytes_count_all_graphs(random_structure):
    rule = NeighborSpec(
        4.0, 8, symmetric=True, extra_graphs=(ExtraGraph("side", 3.0, 4),)
    )
    edges = neighbor_edges(random_structure(3), rule)
    count = len(edges) + len(edges.extra_graphs["side"])
    assert len(edges.extra_graphs["side"]) > 0
    # Two atom numbers and three shifts, eight bytes each.
    assert edges.nbytes == 40 * count
    assert edges.extra_graphs["side"].nbytes == 40 * len(edges.extra_graphs["side"])


def test_graphs_without_edges(make_structure):
    atom = make_structure([[0, 0, 0]])
    extra_graphs = (ExtraGraph("side", 3.0, 4, tags=(1,)),)
    edges = neighbor_edges(
        atom, NeighborSpec(4.0, 8, symmetric=True, extra_graphs=extra_graphs)
    )
    assert edges.extra_graphs["side"].edge_index.shape == (2, 0)
    assert edges.extra_graphs["side"].cell_offsets.shape == (0, 3)
    assert edges.nbytes == 0
