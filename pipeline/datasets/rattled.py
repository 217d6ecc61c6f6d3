"""Copies of samples whose atoms are displaced at random, made as they are read."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from pipeline.datasets.base import Dataset, DerivedDataset
from pipeline.errors import DataError
from pipeline.graphs.neighbors import NeighborSpec, neighbor_edges
from pipeline.spec.sections import RattleSpec
from pipeline.structure import Sample, Structure

# No bond is as short; H2, the shortest, has 0.74 Å.
CLOSEST_PAIR = 0.5
_DRAWS = 100
# Displacements are multiples of this (Å), since the last bits of a logarithm differ
# between machines and those of a structure must not.
_GRID = 2.0**-24

_COLLISIONS = NeighborSpec(CLOSEST_PAIR, max_neighbors=1, symmetric=False)


class Rattled(DerivedDataset):
    """``rattle.copies`` copies of every sample of ``dataset``, without labels.

    Free atoms are displaced by Gaussians of ``rattle.sigma`` Å along each axis; cell
    and fixed atoms stay. Copy ``k`` of sample ``x`` has the id ``x~rk`` and depends on
    seed, sample and ``k`` alone. One with a pair of atoms within CLOSEST_PAIR is drawn
    again.
    """

    def __init__(self, dataset: Dataset, rattle: RattleSpec) -> None:
        super().__init__(dataset)
        self._rattle = rattle
        copies = range(rattle.copies)
        self._ids = [f"{name}~r{k}" for name in dataset.sample_ids for k in copies]
        self._n_atoms = np.repeat(dataset.n_atoms, rattle.copies)

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> Sample:
        """One copy.

        Raises
        ------
        DataError
            Every draw brings two atoms together, or no atom is free; names the sample.
        """
        number = range(len(self))[index]
        sample = self._inner[number // self._rattle.copies]
        return Sample.without_labels(
            self._ids[number], self._displace(self._ids[number], sample.structure)
        )

    @property
    def sample_ids(self) -> Sequence[str]:
        """Ids, all copies of a sample one after the other."""
        return self._ids

    @property
    def n_atoms(self) -> npt.NDArray[np.int32]:
        """Atoms of every sample, (n,) int32."""
        return self._n_atoms

    def label_names(self, index: int) -> list[str]:
        """None, since no label is missed."""
        return []

    def _displace(self, name: str, structure: Structure) -> Structure:
        if structure.fixed.all():
            raise DataError(
                f"{self.path}: sample {name!r} has fixed atoms only, so its copies "
                "would be alike; leave it out of the split with rattle:."
            )
        sigma, random = self._rattle.sigma, _generator(self._rattle.seed, name)
        for _ in range(_DRAWS):
            drawn = sigma * random.standard_normal(structure.positions.shape)
            drawn = np.round(drawn / _GRID) * _GRID
            drawn[structure.fixed] = 0.0
            moved = replace(structure, positions=structure.positions + drawn)
            if not _has_collision(name, moved):
                return moved
        raise DataError(
            f"{self.path}: sample {name!r} has two atoms within {CLOSEST_PAIR} Å in "
            f"each of {_DRAWS} draws; lower rattle.sigma, now {sigma:g} Å."
        )


def _generator(seed: int, name: str) -> np.random.RandomState:
    """Numbers of one copy; numpy keeps this generator's streams as they are."""
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=32).digest()
    return np.random.RandomState(np.frombuffer(digest, "<u4"))


def _has_collision(name: str, structure: Structure) -> bool:
    """Whether two atoms, or periodic images of them, are within CLOSEST_PAIR."""
    try:
        return len(neighbor_edges(structure, _COLLISIONS)) > 0
    except DataError as error:
        raise DataError(f"Sample {name!r}: {error}") from None
