"""Statistics of a whole dataset's labels, as planning gathers them in passing."""

from pipeline.datasets import Dataset
from pipeline.datasets.label_statistics import LabelSums
from pipeline.models.normalizer import Normalizer


def label_statistics(dataset: Dataset, reference_energies: str) -> Normalizer:
    """Normaliser fitted to the labels of ``dataset``, see ``LabelSums.normalizer``."""
    sums = LabelSums()
    sums.add([dataset[index] for index in range(len(dataset))])
    return sums.normalizer(reference_energies)
