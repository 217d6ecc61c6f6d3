"""Neighbours by trying everything."""

import itertools

import numpy as np


def as_tuples(edges):
    """Edges as (target, source, shift) tuples, in their order."""
    source, target = edges.edge_index.tolist()
    shifts = map(tuple, edges.cell_offsets.tolist())
    return list(zip(target, source, shifts, strict=True))


def exhaustive(structure, cutoff):
    """Distances by (target, source, shift), trying every shift that could matter."""
    positions, cell = structure.positions, structure.cell
    ranges = [range(1)] * 3
    if structure.pbc.any():
        heights = 1 / np.linalg.norm(np.linalg.inv(cell), axis=0)
        fractions = positions @ np.linalg.inv(cell)
        reach = np.ceil(np.ptp(fractions, axis=0) + cutoff / heights).astype(int)
        ranges = [
            range(-r, r + 1) if periodic else range(1)
            for r, periodic in zip(reach, structure.pbc, strict=True)
        ]
    found = {}
    for shift in itertools.product(*ranges):
        for i, j in itertools.product(range(len(positions)), repeat=2):
            vector = positions[j] + np.array(shift) @ cell - positions[i]
            distance = float(np.sqrt(vector @ vector))
            if 0.01 < distance <= cutoff:
                found[i, j, shift] = distance
    return found
