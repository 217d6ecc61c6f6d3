"""Readers of the formats people have; each yields samples under stable ids."""

from collections.abc import Callable, Sequence
from pathlib import Path

from pipeline.datasets.base import Dataset, IndexedDataset, Listing, Selection
from pipeline.datasets.choosing import select_ids
from pipeline.datasets.labels import ReadOptions, warn_of_missing_labels
from pipeline.datasets.molecules import NotPeriodic
from pipeline.datasets.oc20_raw import Energy, Oc20RawDataset
from pipeline.datasets.paths import named_paths
from pipeline.datasets.rattled import Rattled
from pipeline.datasets.registry import load_reader
from pipeline.datasets.unlabelled import Unlabelled
from pipeline.errors import DataError
from pipeline.files.download import download
from pipeline.files.remote import is_url
from pipeline.spec.id_list import read_ids
from pipeline.spec.sections import SplitSpec

__all__ = [
    "Dataset",
    "IndexedDataset",
    "Lister",
    "Listing",
    "ReadOptions",
    "open_dataset",
    "open_split",
    "read_options",
    "warn_of_missing_labels",
]

Lister = Callable[[IndexedDataset], Listing]


def _list_anew(dataset: IndexedDataset) -> Listing:
    return dataset.list_samples()


def open_dataset(
    format: str,
    path: str | Sequence[str],
    *,
    offset: int = 0,
    limit: int | None = None,
    every: int = 1,
    energy: Energy | None = None,
    options: ReadOptions | None = None,
    lister: Lister = _list_anew,
    ids: str | None = None,
) -> Dataset:
    """The dataset at ``path`` from ``offset`` on, each ``every``-th, at most ``limit``.

    ``path`` is a file, a folder, a glob, or several of them. ``options`` name labels,
    units and conditions; by default ``energy`` and ``forces`` in eV and Å are read.
    ``energy`` chooses between adsorption and total energies of ``oc20_raw``; the other
    formats have one kind and take None. ``lister`` gives the listing of its samples:
    by reading all files here and now, where nothing else is said. ``ids`` names a file
    with the ids of the samples to keep of these.

    Raises
    ------
    SpecError
        There is no such format, or the plug-in that reads it is broken.
    DataError
        The file is damaged, holds no samples, repeats a sample id, or lacks an id of
        the file ``ids``.
    """
    paths = named_paths([path] if isinstance(path, str) else path)
    options = ReadOptions() if options is None else options
    selection = Selection(offset, limit, every)
    dataset: IndexedDataset
    if format == "oc20_raw":
        dataset = Oc20RawDataset(paths, selection, options, energy)
    else:
        dataset = load_reader(format)(paths, selection, options)
    listing = lister(dataset)
    if ids is not None and listing.ids:
        wanted = read_ids(Path(ids), "ids")
        listing = listing.only(select_ids(dataset.path, listing.ids, wanted, ids))
    dataset.use(listing)
    if offset and not len(dataset):
        raise DataError(
            f"{dataset.path} has no sample left after offset={offset}; lower the "
            "offset."
        )
    dataset.check_ids()
    return dataset


def open_split(split: SplitSpec, lister: Lister = _list_anew) -> Dataset:
    """The dataset that a resolved split of a spec names, as the split wants it.

    What lies behind a URL is staged on a local disk first. Rattled copies replace the
    samples; labels are left out where the split has none, and periodicity where it is
    to have none. Errors are those of open_dataset.
    """
    dataset = open_dataset(
        split.format,
        [str(download(path)) if is_url(path) else path for path in split.paths],
        offset=split.offset,
        limit=split.limit,
        every=split.every,
        energy=split.energy,
        options=read_options(split),
        lister=lister,
        ids=split.ids,
    )
    if split.pbc == "none":
        dataset = NotPeriodic(dataset)
    if split.rattle is not None:
        return Rattled(dataset, split.rattle)
    return dataset if split.labelled else Unlabelled(dataset)


def read_options(split: SplitSpec) -> ReadOptions:
    """What a split says of how its frames are to be read."""
    return ReadOptions(
        energy_key=split.energy_key,
        forces_key=split.forces_key,
        gradient_key=split.gradient_key,
        units=split.units.names,
        where=split.conditions,
        keep_bad=split.on_bad_sample == "skip",
        virial_key=split.virial_key,
        stress_key=split.stress_key,
    )
