"""Samples that nobody could learn from: found before blocks are planned."""

import logging
from collections.abc import Callable, Collection, Container, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt

from pipeline.datasets import Dataset
from pipeline.datasets.base import DerivedDataset, KnownLabel, split_pieces
from pipeline.errors import DataError
from pipeline.graphs.closeness import check_distances
from pipeline.graphs.neighbors import NeighborSpec, check_cell, sample_edges
from pipeline.parallel.ordered_map import OrderedMap, ignore_items
from pipeline.spec.sections import SplitSpec
from pipeline.structure import Sample
from pipeline.teachers.potential import check_sample
from pipeline.teachers.runner import TeacherRunner

log = logging.getLogger("pipeline.build.filter_samples")
_NAMED = 5
_PIECE = 512
# Without a teacher nobody says how far atoms are seen; the students that see least have
# this cutoff (Å).
_SHORTEST_SIGHT = NeighborSpec(6.0, 1, symmetric=False)


@dataclass(frozen=True)
class Demands:
    """What a sample of split ``split`` must be like; None where nothing is asked.

    ``elements`` are those that a teacher knows, ``rule`` that of the graph in which
    atoms need a neighbour, ``closest`` the least distance of a pair, as a share of the
    sum of its covalent radii.
    """

    split: str
    elements: Container[int] | None = None
    rule: NeighborSpec | None = None
    closest: float | None = None

    @classmethod
    def of(
        cls, name: str, split: SplitSpec, teacher: TeacherRunner | None
    ) -> "Demands":
        """What ``teacher`` and the keys of a split ask for."""
        closest = split.min_pair_distance or None
        if teacher is None:
            return cls(name, closest=closest)
        # All of a teacher that a graph needs; the rest may not bear being sent.
        potential = teacher.potential
        return cls(name, potential.elements, potential.graph_rule, closest)

    def check_atoms(self, sample: Sample) -> None:
        """Refuse impossible cells, unknown elements and atoms that are too close.

        Raises
        ------
        DataError
            Names the sample, and the key that allows it.
        """
        try:
            check_cell(sample.structure)
        except DataError as error:
            raise DataError(f"Sample {sample.sample_id!r}: {error}") from None
        if self.elements is not None and self.rule is not None:
            check_sample(sample, self.elements, self.rule)
        if self.closest is not None:
            check_distances(
                sample,
                self.closest,
                f"or set splits.{self.split}.on_bad_sample: skip, or "
                f"splits.{self.split}.min_pair_distance: 0 if they are meant",
            )

    def check_neighbours(self, sample: Sample) -> None:
        """Refuse a sample without neighbours; they are searched for.

        Raises
        ------
        DataError
            Names the sample.
        """
        if self.rule is not None:
            sample_edges(sample.sample_id, sample.structure, self.rule)

    def may_lack_neighbours(self, sample: Sample) -> bool:
        """Whether no two atoms that follow each other are within the cutoff."""
        if self.rule is None:
            return False
        steps = np.diff(sample.structure.positions, axis=0)
        return not (np.square(steps).sum(axis=1) <= self.rule.cutoff**2).any()


class SubsetDataset(DerivedDataset):
    """Samples of another dataset, some left out, the others in their order."""

    def __init__(self, inner: Dataset, chosen: Sequence[int]) -> None:
        super().__init__(inner)
        self._chosen = chosen

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> Sample:
        return self._inner[self._chosen[index]]

    @property
    def sample_ids(self) -> Sequence[str]:
        """Ids of the samples that are left."""
        ids = self._inner.sample_ids
        return [ids[index] for index in self._chosen]

    def label_names(self, index: int) -> list[str]:
        """Names in the record of a sample that look like labels but are not used."""
        return self._inner.label_names(self._chosen[index])

    def known_label(self, index: int) -> KnownLabel | None:
        """Return the teacher's energy and forces of a sample if they are known."""
        return self._inner.known_label(self._chosen[index])

    @property
    def n_atoms(self) -> npt.NDArray[np.int32]:
        """Atoms of every sample that is left, (n,) int32."""
        return self._inner.n_atoms[np.asarray(self._chosen, np.intp)]


class ValidatedDataset(DerivedDataset):
    """Another dataset, whose samples are refused when they do not meet ``demands``.

    Neighbours are searched for only where no two atoms that follow each other are
    within the cutoff, so that this costs next to nothing.
    """

    def __init__(self, inner: Dataset, demands: Demands) -> None:
        super().__init__(inner)
        self._demands = demands

    def __getitem__(self, index: int) -> Sample:
        sample = self._inner[index]
        self._demands.check_atoms(sample)
        if self._demands.may_lack_neighbours(sample):
            self._demands.check_neighbours(sample)
        return sample


def drop_samples(dataset: Dataset, ids: Collection[str]) -> Dataset:
    """``dataset`` without the samples of these ids."""
    unwanted = frozenset(ids)
    known = dataset.sample_ids
    return SubsetDataset(
        dataset, [i for i in range(len(dataset)) if known[i] not in unwanted]
    )


def find_bad_samples(
    dataset: Dataset,
    demands: Demands,
    run: OrderedMap = map,
    read: Callable[[int], None] = ignore_items,
) -> list[tuple[str, str]]:
    """Id and reason of every sample that cannot be read or does not meet ``demands``.

    They are looked at in the processes of ``run``; what is found, and in which order,
    does not depend on how many these are. ``read`` is told how many more samples are.

    Raises
    ------
    DataError
        Not one is sound.
    """
    if demands.rule is None:
        if dataset.keeps_samples:
            run = map  # there is less to do than to send
        demands = replace(demands, rule=_SHORTEST_SIGHT)
    look = partial(_find_bad_in, dataset, demands)
    found: list[tuple[str, str]] = []
    pieces = split_pieces(range(len(dataset)), _PIECE)
    for piece, part in zip(pieces, run(look, pieces), strict=True):
        found += part
        read(len(piece))
    if not found:
        return []
    if len(found) == len(dataset):
        raise _none_left(demands.split, found)
    warn_of_bad_samples(demands.split, found, len(dataset))
    return found


def sound_samples(name: str, dataset: Dataset, demands: Demands, skip: bool) -> Dataset:
    """Samples of split ``name`` where no store is planned that would name bad ones.

    A bad one is left out and named in a warning if ``skip``, else refused when it is
    read.

    Raises
    ------
    DataError
        Not one is sound.
    """
    if skip:
        bad = _find_bad_in(dataset, demands, range(len(dataset)))
        if len(bad) == len(dataset):
            raise _none_left(name, bad)
        if bad:
            warn_of_bad_samples(name, bad, len(dataset), stored=False)
        dataset = drop_samples(dataset, [sample_id for sample_id, _ in bad])
    return ValidatedDataset(dataset, demands)


def _none_left(split: str, found: Sequence[tuple[str, str]]) -> DataError:
    return DataError(
        f"splits.{split}: none of its {len(found)} samples can be used, the first "
        f"because: {found[0][1]}"
    )


def warn_of_bad_samples(
    split: str, found: Sequence[tuple[str, str]], total: int, *, stored: bool = True
) -> None:
    """Warn of the samples, ids and reasons, that a split of ``total`` skips.

    ``stored`` says whether a store names all of them.
    """
    named = ", ".join(repr(sample_id) for sample_id, _ in found[:_NAMED])
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    # Without the advice, which has been followed.
    reason = found[0][1].split("; ")[0].rstrip(".")
    log.warning(
        "splits.%s: %d of %d samples are skipped: %s%s; the reason of the first: %s%s",
        *(split, len(found), total, named, more, reason),
        "; the store lists all of them" if stored else "",
    )


def _find_bad_in(
    dataset: Dataset, demands: Demands, indices: range
) -> list[tuple[str, str]]:
    found = []
    for index in indices:
        try:
            sample = dataset[index]
            demands.check_atoms(sample)
            demands.check_neighbours(sample)
        except DataError as error:
            found.append((dataset.sample_ids[index], str(error)))
    return found
