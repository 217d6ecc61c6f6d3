"""Batches from dataset files, as CachedSamples makes them from a store."""

from collections.abc import Container
from pathlib import Path

import numpy as np
import torch
from torch_geometric.data import Data

from kd_train.loader.sampler import Positions
from pipeline.datasets import Dataset
from pipeline.datasets.paths import PACKED
from pipeline.datasets.registry import format_of_suffix
from pipeline.errors import SpecError
from pipeline.graphs.batch import collate
from pipeline.graphs.neighbors import NeighborSpec, sample_edges
from pipeline.models.elements import check_elements
from pipeline.spec.formats import FORMATS


class DatasetSamples:
    """Batches of a dataset for one model: structures, labels and edges.

    The same tensors that ``CachedSamples`` gives for the same samples; threads may make
    batches at the same time.
    """

    def __init__(
        self, dataset: Dataset, rule: NeighborSpec, elements: Container[int]
    ) -> None:
        self.dataset = dataset
        self.rule = rule
        self.elements = elements

    def __len__(self) -> int:
        return len(self.dataset)

    def batch(self, positions: Positions) -> Data:
        """Read samples at ``positions`` as one graph, see ``pipeline.graphs.batch``.

        Adds ``energy`` (B,) float64 in eV and ``forces`` (N, 3) float32 in eV/Å, NaN
        if the source has no label, and ``virial`` (B, 3, 3) float64 in eV if a sample
        has this label.

        Raises
        ------
        DataError
            A sample cannot be read, has no neighbours, or holds an element that the
            model does not know.
        """
        samples = [self.dataset[int(position)] for position in positions]
        for sample in samples:
            numbers = sample.structure.atomic_numbers
            check_elements(numbers, self.elements, [sample.sample_id] * len(numbers))
        edges = [sample_edges(s.sample_id, s.structure, self.rule) for s in samples]
        data = collate([sample.structure for sample in samples], edges)
        data.energy = torch.tensor([s.energy for s in samples], dtype=torch.float64)
        data.forces = torch.from_numpy(np.concatenate([s.forces for s in samples]))
        virials = np.stack([sample.virial for sample in samples])
        if np.isfinite(virials).any():
            data.virial = torch.from_numpy(virials)
        return data


def guess_format(path: Path) -> str:
    """Format of a dataset file by its suffix, or of a folder by its files'.

    Raises
    ------
    SpecError
        The path does not exist, or does not show the format; names the option.
    """
    if not path.exists():
        raise SpecError(f"--data {path} does not exist.")
    found = _of_folder(path) if path.is_dir() else _of_file(path)
    found = found or _of_plugin(path)
    if found == "extxyz" and _has_energies_beside(path):
        raise SpecError(
            f"--data {path} may be a raw chunk of OC20, because a .txt file is next "
            "to it; add --format oc20_raw or --format extxyz."
        )
    if found is None:
        *others, last = FORMATS.names()
        known = f"{', '.join(others)} or {last}"
        raise SpecError(
            f"--data {path} is not a store, and its name does not show its format; "
            f"add --format {known}."
        )
    return found


def _of_file(path: Path, *, plugins: bool = False) -> str | None:
    suffixes = [suffix for suffix in path.suffixes if suffix not in PACKED]
    return format_of_suffix(suffixes[-1], plugins=plugins) if suffixes else None


def _of_plugin(path: Path) -> str | None:
    """Format of a plug-in that all files of its kind at ``path`` have."""
    files = path.iterdir() if path.is_dir() else [path]
    found = {_of_file(file, plugins=True) for file in files} - {None}
    return found.pop() if len(found) == 1 else None


def _of_folder(path: Path) -> str | None:
    if path.suffix == ".lmdb" or (path / "data.mdb").is_file():
        return "oc20_lmdb"
    found = {_of_file(entry) for entry in path.iterdir()} - {None}
    # fairchem stores a metadata.npz next to its files.
    for formats in ({"oc20_lmdb", "aselmdb"}, {"traj", "npz", "hdf5", "extxyz"}):
        if likely := found & formats:
            # Frames in a folder may be OC20's.
            return likely.pop() if len(likely) == 1 and likely != {"extxyz"} else None
    return None


def _has_energies_beside(path: Path) -> bool:
    stem = path.name.split(".")[0]
    return any((path.parent / f"{stem}.txt{p}").exists() for p in ("", *PACKED))
