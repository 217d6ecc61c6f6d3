"""What every dataset offers to planning and building."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pipeline.errors import DataError
from pipeline.structure import Sample


class Dataset(ABC):
    """Samples by position; indexable and picklable."""

    path: str

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Sample: ...

    @property
    @abstractmethod
    def sample_ids(self) -> Sequence[str]:
        """Ids in the order of the source."""

    @property
    @abstractmethod
    def n_atoms(self) -> npt.NDArray[np.int32]:
        """Atoms of every sample, (n,) int32."""

    def check_ids(self) -> None:
        """Raise DataError when the dataset is empty or repeats a sample id."""
        if len(self) == 0:
            raise DataError(f"{self.path} holds no samples.")
        seen: dict[str, int] = {}
        for index, sample_id in enumerate(self.sample_ids):
            if sample_id in seen:
                raise DataError(
                    f"{self.path}: samples {seen[sample_id]} and {index} share the id "
                    f"{sample_id!r}; ids must be unique within a split."
                )
            seen[sample_id] = index
