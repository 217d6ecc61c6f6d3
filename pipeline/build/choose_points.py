"""Some of many points: the farthest from each other, by leverage, or at random.

Points are read in pieces, since they may take more room than memory has. Ties and
random numbers come from a rank of every point, which the order of the points does not
change.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from pipeline.build.descriptors import PIECE_ROWS
from pipeline.parallel.ordered_map import Count, Tally
from pipeline.store.layout import IntArray

log = logging.getLogger("pipeline.build.choose_points")
Method = Literal["farthest", "leverage", "random"]
METHODS: tuple[Method, ...] = get_args(Method)
Points = npt.NDArray[np.float32]
# Points of two sets whose distances are in memory together.
_REFERENCES = 1 << 10
_TAKEN = -1.0


@dataclass(frozen=True, eq=False)
class Candidates:
    """Points to choose from.

    Attributes
    ----------
    points : (n, d) float32
    variances : (d,) float64
        Variances of the points along their axes, which are uncorrelated.
    allowed : (n,) bool
        Whether a point may be chosen.
    ranks : (n,) uint64
        Random numbers that order points with equal claims, least first.
    references : (m, d) float32
        Points that count as chosen before.
    """

    points: Points
    variances: npt.NDArray[np.float64]
    allowed: npt.NDArray[np.bool_]
    ranks: npt.NDArray[np.uint64]
    references: Points


@dataclass(frozen=True, eq=False)
class Chosen:
    """Numbers (b,) of the chosen points, in order, and how well they cover all.

    ``distances`` (k,) are those of every allowed point to the nearest chosen point or
    reference.
    """

    numbers: IntArray
    distances: npt.NDArray[np.float64]


def choose_points(
    candidates: Candidates, budget: int, method: Method, count: Count
) -> Chosen:
    """Return ``budget`` of the allowed points.

    Every prefix of the choice is the choice for a smaller budget. ``count`` is called
    with the points that are chosen.
    """
    if method == "farthest":
        return _choose_farthest(candidates, budget, count)
    keys = _RANDOM_KEYS[method](candidates)
    keys[~candidates.allowed] = np.inf
    numbers = np.lexsort((candidates.ranks, keys))[:budget]
    tally = Tally(count, budget)
    squares = squared_distances(candidates.points, candidates.references)
    chosen = candidates.points[numbers]
    squares = np.minimum(squares, squared_distances(candidates.points, chosen))
    tally.add(budget)
    return Chosen(numbers, np.sqrt(squares[candidates.allowed]))


def squared_distances(points: Points, references: Points) -> Points:
    """Return (n,) squared distances to the nearest of ``references``, infinite at m=0.

    Points are read in pieces.
    """
    found = np.full(len(points), np.inf, np.float32)
    for first in range(0, len(points), PIECE_ROWS):
        rows = slice(first, first + PIECE_ROWS)
        piece = points[rows].astype(np.float64)
        for begin in range(0, len(references), _REFERENCES):
            others = references[begin : begin + _REFERENCES].astype(np.float64)
            squares = -2 * piece @ others.T
            squares += np.square(piece).sum(axis=1)[:, None]
            squares += np.square(others).sum(axis=1)
            nearest = squares.min(axis=1).clip(min=0)
            found[rows] = np.minimum(found[rows], nearest)
    return found


def _choose_farthest(candidates: Candidates, budget: int, count: Count) -> Chosen:
    """Return points each of which is farthest from all before it.

    Without references, the point of the least rank is the first.
    """
    nearest = squared_distances(candidates.points, candidates.references)
    nearest[~candidates.allowed] = _TAKEN
    numbers = np.zeros(budget, np.int64)
    tally, repeated = Tally(count, budget), 0
    for step in range(budget):
        largest = nearest.max()
        repeated += bool(largest == 0)
        alike = np.flatnonzero(nearest == largest)
        number = alike[candidates.ranks[alike].argmin()]
        numbers[step] = number
        _move_nearer(nearest, candidates.points, candidates.points[number])
        nearest[number] = _TAKEN
        tally.add()
    if repeated:
        log.warning(
            "%d of the %d chosen samples have the descriptor of another one, since "
            "the split has no more samples that differ",
            *(repeated, budget),
        )
    squares = nearest[candidates.allowed].clip(min=0)
    return Chosen(numbers, np.sqrt(squares.astype(np.float64)))


def _move_nearer(nearest: Points, points: Points, new: Points) -> None:
    """Lower the squared distances ``nearest`` (n,) to those to the point ``new``."""
    for first in range(0, len(points), PIECE_ROWS):
        rows = slice(first, first + PIECE_ROWS)
        away = points[rows] - new
        squares = np.einsum("ij,ij->i", away, away)
        np.minimum(nearest[rows], squares, out=nearest[rows])


def _leverage_keys(candidates: Candidates) -> npt.NDArray[np.float64]:
    """Return keys whose least are a sample weighted by leverage, without repeats.

    An exponential variate over a weight is the first of all with a probability in
    proportion to the weight (Efraimidis and Spirakis 2006).
    """
    scores = np.ones(len(candidates.points))
    varies = candidates.variances > 0
    for first in range(0, len(scores), PIECE_ROWS):
        rows = slice(first, first + PIECE_ROWS)
        squares = np.square(candidates.points[rows][:, varies].astype(np.float64))
        scores[rows] += (squares / candidates.variances[varies]).sum(axis=1)
    uniform = (candidates.ranks.astype(np.float64) + 0.5) / 2.0**64
    return np.asarray(-np.log(uniform) / scores)


def _random_keys(candidates: Candidates) -> npt.NDArray[np.float64]:
    """Return equal keys, so that ranks alone decide."""
    return np.zeros(len(candidates.points))


_RANDOM_KEYS: dict[Method, Callable[[Candidates], npt.NDArray[np.float64]]] = {
    "leverage": _leverage_keys,
    "random": _random_keys,
}
