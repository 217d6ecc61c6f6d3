"""Readers of the formats people have; each yields samples under stable ids."""

from pipeline.datasets.base import Dataset
from pipeline.datasets.extxyz import ExtxyzDataset

__all__ = ["Dataset", "ExtxyzDataset", "open_dataset"]


def open_dataset(
    format: str,
    path: str,
    *,
    offset: int = 0,
    limit: int | None = None,
    every: int = 1,
) -> Dataset:
    """The dataset at ``path`` from ``offset`` on, each ``every``-th, at most ``limit``.

    Raises
    ------
    DataError
        The file is damaged, holds no samples, or repeats a sample id.
    """
    readers = {"extxyz": ExtxyzDataset}
    dataset = readers[format](path, slice(offset, None, every), limit)
    dataset.check_ids()
    return dataset
