"""Tries a spec's teacher on some of its samples, before anything is built on it."""

from collections.abc import Iterator

import numpy as np
import torch

from pipeline.build.filter_samples import Demands, SubsetDataset, sound_samples
from pipeline.datasets import open_split
from pipeline.errors import SpecError
from pipeline.spec.cache_spec import CacheSpec
from pipeline.structure import Sample
from pipeline.teachers.checks import Subject, check_potential
from pipeline.teachers.potential import Potential
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
        A sample is bad: it holds an element or periodicity that the teacher does not
        know, or atoms that are too close.
    """
    if spec.teacher is None:
        raise SpecError("The spec has no teacher: section; add one to check a teacher.")
    potential = load_potential(spec.teacher)
    potential.to(device)
    samples = _spread(spec, count, potential)
    yield from check_potential(Subject(potential, samples, tolerance))


def _spread(spec: CacheSpec, count: int, potential: Potential) -> list[Sample]:
    """``count`` samples, evenly over the first split; bad ones are left out of these.

    Raises
    ------
    DataError
        A sample is bad and not to be skipped, or all are.
    """
    name, split = next(iter(spec.splits.items()))
    dataset = open_split(split)
    chosen = np.linspace(0, len(dataset) - 1, min(count, len(dataset)), dtype=int)
    demands = Demands(
        name,
        potential.elements,
        potential.graph_rule,
        split.min_pair_distance or None,
    )
    few = SubsetDataset(dataset, chosen.tolist())
    sound = sound_samples(name, few, demands, split.on_bad_sample == "skip")
    return [sound[number] for number in range(len(sound))]
