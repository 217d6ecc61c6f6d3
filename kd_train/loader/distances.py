"""Warning of atoms that are too close, for datasets without a planned store."""

import logging

from pipeline.datasets import Dataset
from pipeline.datasets.base import DerivedDataset
from pipeline.errors import DataError
from pipeline.graphs.closeness import check_distances
from pipeline.spec.sections import MIN_PAIR_DISTANCE
from pipeline.structure import Sample

log = logging.getLogger("kd_train")


class WarnsOfClosePairs(DerivedDataset):
    """A dataset that warns of its first sample with atoms too close to each other."""

    def __init__(self, inner: Dataset) -> None:
        super().__init__(inner)
        self._warned = False

    def __getitem__(self, index: int) -> Sample:
        sample = self._inner[index]
        if not self._warned:
            try:
                remedy = "or exclude such samples; they count in all metrics"
                check_distances(sample, MIN_PAIR_DISTANCE, remedy)
            except DataError as error:
                self._warned = True
                log.warning("%s: %s", self.path, str(error).rstrip("."))
        return sample
