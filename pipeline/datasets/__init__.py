"""Readers of the formats people have; each yields samples under stable ids."""

from collections.abc import Callable

from pipeline.datasets.ase_db import AseDbDataset
from pipeline.datasets.aselmdb import AselmdbDataset
from pipeline.datasets.base import Dataset, IndexedDataset, Listing, Selection
from pipeline.datasets.extxyz import ExtxyzDataset
from pipeline.datasets.molecules import NotPeriodic
from pipeline.datasets.oc20_lmdb import Oc20LmdbDataset
from pipeline.datasets.oc20_raw import Energy, Oc20RawDataset
from pipeline.datasets.rattled import Rattled
from pipeline.datasets.unlabelled import Unlabelled
from pipeline.remote import is_url
from pipeline.spec import SplitSpec
from pipeline.staging import staged

__all__ = [
    "Dataset",
    "IndexedDataset",
    "Lister",
    "Listing",
    "open_dataset",
    "open_split",
]

READERS: dict[str, Callable[[str, Selection], IndexedDataset]] = {
    "extxyz": ExtxyzDataset,
    "oc20_lmdb": Oc20LmdbDataset,
    "ase_db": AseDbDataset,
    "aselmdb": AselmdbDataset,
}
Lister = Callable[[IndexedDataset], Listing]


def _list_anew(dataset: IndexedDataset) -> Listing:
    return dataset.list_samples()


def open_dataset(
    format: str,
    path: str,
    *,
    offset: int = 0,
    limit: int | None = None,
    every: int = 1,
    energy: Energy | None = None,
    lister: Lister = _list_anew,
) -> Dataset:
    """The dataset at ``path`` from ``offset`` on, each ``every``-th, at most ``limit``.

    ``energy`` chooses between adsorption and total energies of ``oc20_raw``; the other
    formats have one kind and take None. ``lister`` gives the listing of its samples:
    by reading all files here and now, where nothing else is said.

    Raises
    ------
    DataError
        The file is damaged, holds no samples, or repeats a sample id.
    """
    selection = Selection(offset, limit, every)
    dataset: IndexedDataset
    if format == "oc20_raw":
        dataset = Oc20RawDataset(path, selection, energy)
    else:
        dataset = READERS[format](path, selection)
    dataset.use(lister(dataset))
    dataset.check_ids()
    return dataset


def open_split(split: SplitSpec, lister: Lister = _list_anew) -> Dataset:
    """The dataset that a resolved split of a spec names, as the split wants it.

    What lies behind a URL is staged on a local disk first. Rattled copies replace the
    samples; labels are left out where the split has none, and periodicity where it is
    to have none. Errors are those of open_dataset.
    """
    path = str(staged(split.path)) if is_url(split.path) else split.path
    dataset = open_dataset(
        split.format,
        path,
        offset=split.offset,
        limit=split.limit,
        every=split.every,
        energy=split.energy,
        lister=lister,
    )
    if split.pbc == "none":
        dataset = NotPeriodic(dataset)
    if split.rattle is not None:
        return Rattled(dataset, split.rattle)
    return dataset if split.labelled else Unlabelled(dataset)
