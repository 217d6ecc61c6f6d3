"""Samples without their reference labels, so that only the teacher labels them."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pipeline.datasets.base import Dataset
from pipeline.structure import Sample


class Unlabelled(Dataset):
    """The samples of ``dataset``, under their ids, with NaN for every label."""

    def __init__(self, dataset: Dataset) -> None:
        self.path = dataset.path
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Sample:
        sample = self._dataset[index]
        return Sample.without_labels(sample.sample_id, sample.structure)

    @property
    def sample_ids(self) -> Sequence[str]:
        """Ids in the order of the source."""
        return self._dataset.sample_ids

    @property
    def n_atoms(self) -> npt.NDArray[np.int32]:
        """Atoms of every sample, (n,) int32."""
        return self._dataset.n_atoms

    @property
    def keeps_samples(self) -> bool:
        """Whether the samples lie in memory from when the dataset is opened."""
        return self._dataset.keeps_samples
