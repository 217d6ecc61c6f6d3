"""Structures without their periodicity, for molecules that come in a box."""

from dataclasses import replace

import numpy as np

from pipeline.datasets.base import DerivedDataset
from pipeline.structure import Sample


class NotPeriodic(DerivedDataset):
    """The samples of a dataset with no periodic direction; cells are kept."""

    def __getitem__(self, index: int) -> Sample:
        sample = self._inner[index]
        flags = np.zeros(3, np.bool_)
        return replace(sample, structure=replace(sample.structure, pbc=flags))
