"""Tries a spec's teacher on some of its samples, before anything is built on it."""

from collections.abc import Iterator

import numpy as np
import torch

from pipeline.datasets import open_split
from pipeline.errors import SpecError
from pipeline.spec.cache_spec import CacheSpec
from pipeline.structure import Sample
from pipeline.teachers.checks import Subject, check_potential
from pipeline.teachers.potential import check_sample
from pipeline.teachers.registry import load_potential


def try_teacher(
    spec: CacheSpec, count: int, tolerance: float, device: torch.device
) -> Iterator[tuple[str, float]]:
    """Names of the checks that the teacher passes, each with its largest deviation.

    Raises
    ------
    ContractError
        The first check that fails.
    SpecError
        The spec has no teacher.
    DataError
        A sample holds an element or periodicity that the teacher does not know.
    """
    if spec.teacher is None:
        raise SpecError("The spec has no teacher: section; add one to check a teacher.")
    potential = load_potential(spec.teacher)
    potential.to(device)
    samples = _spread(spec, count)
    for sample in samples:
        check_sample(sample, potential.elements, potential.graph_rule)
    yield from check_potential(Subject(potential, samples, tolerance))


def _spread(spec: CacheSpec, count: int) -> list[Sample]:
    """``count`` samples, evenly over the first split."""
    dataset = open_split(next(iter(spec.splits.values())))
    chosen = np.linspace(0, len(dataset) - 1, min(count, len(dataset)), dtype=int)
    return [dataset[int(number)] for number in chosen]
