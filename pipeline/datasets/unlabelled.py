"""Samples without their reference labels, so that only the teacher labels them."""

from pipeline.datasets.base import DerivedDataset
from pipeline.structure import Sample


class Unlabelled(DerivedDataset):
    """The samples of a dataset, under their ids, with NaN for every label."""

    def __getitem__(self, index: int) -> Sample:
        sample = self._inner[index]
        return Sample.without_labels(sample.sample_id, sample.structure)

    def label_names(self, index: int) -> list[str]:
        """None, since no label is missed."""
        return []
