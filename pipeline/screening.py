"""Samples that no teacher pass could ever do: found before blocks are planned."""

import logging
from collections.abc import Callable, Collection, Container, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt

from pipeline.datasets import Dataset
from pipeline.datasets.base import DerivedDataset, in_pieces
from pipeline.errors import DataError
from pipeline.execution.passes import Run, not_told
from pipeline.graphs.neighbors import GraphRule, sample_edges
from pipeline.models.elements import check_elements
from pipeline.structure import Sample
from pipeline.teacher import Teacher

log = logging.getLogger("pipeline.screening")
_NAMED = 5
_PIECE = 512
_Needs = tuple[Container[int], GraphRule]


class Without(DerivedDataset):
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

    @property
    def n_atoms(self) -> npt.NDArray[np.int32]:
        """Atoms of every sample that is left, (n,) int32."""
        return self._inner.n_atoms[np.asarray(self._chosen, np.intp)]


class Checked(DerivedDataset):
    """Another dataset, whose samples are refused when a teacher cannot take them.

    Elements are looked up; neighbours are searched for only where no two atoms that
    follow each other are within the cutoff, so that this costs next to nothing.
    """

    def __init__(
        self, inner: Dataset, elements: Container[int], rule: GraphRule
    ) -> None:
        super().__init__(inner)
        self._elements = elements
        self._rule = rule

    def __getitem__(self, index: int) -> Sample:
        sample = self._inner[index]
        _check_elements(sample, self._elements)
        steps = np.diff(sample.structure.positions, axis=0)
        if not (np.square(steps).sum(axis=1) <= self._rule.cutoff**2).any():
            sample_edges(sample.sample_id, sample.structure, self._rule)
        return sample


def without(dataset: Dataset, ids: Collection[str]) -> Dataset:
    """``dataset`` without the samples of these ids."""
    unwanted = frozenset(ids)
    known = dataset.sample_ids
    return Without(
        dataset, [i for i in range(len(dataset)) if known[i] not in unwanted]
    )


def bad_samples(
    split: str,
    dataset: Dataset,
    teacher: Teacher | None,
    run: Run = map,
    read: Callable[[int], None] = not_told,
) -> list[tuple[str, str]]:
    """Id and reason of every sample that cannot be read or made a graph of.

    They are looked at in the processes of ``run``; what is found, and in which order,
    does not depend on how many these are. ``read`` is told how many more samples are.

    Raises
    ------
    DataError
        Not one is sound.
    """
    needs: _Needs | None = None
    if teacher is not None:
        # All of a teacher that a graph needs; the rest may not bear being sent.
        needs = teacher.potential.elements, teacher.potential.graph_rule
    elif dataset.keeps_samples:
        run = map  # there is less to do than to send
    look = partial(_bad_among, dataset, needs)
    found: list[tuple[str, str]] = []
    pieces = in_pieces(range(len(dataset)), _PIECE)
    for piece, part in zip(pieces, run(look, pieces), strict=True):
        found += part
        read(len(piece))
    if not found:
        return []
    named = ", ".join(repr(sample_id) for sample_id, _ in found[:_NAMED])
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    if len(found) == len(dataset):
        raise DataError(
            f"splits.{split}: none of its {len(found)} samples can be used, the first "
            f"because: {found[0][1]}"
        )
    log.warning(
        "splits.%s: %d of %d samples are left out: %s%s; the store names all of them",
        split,
        len(found),
        len(dataset),
        named,
        more,
    )
    return found


def _bad_among(
    dataset: Dataset, needs: _Needs | None, indices: range
) -> list[tuple[str, str]]:
    found = []
    for index in indices:
        try:
            sample = dataset[index]
            if needs is not None:
                elements, rule = needs
                _check_elements(sample, elements)
                sample_edges(sample.sample_id, sample.structure, rule)
        except DataError as error:
            found.append((dataset.sample_ids[index], str(error)))
    return found


def _check_elements(sample: Sample, elements: Container[int]) -> None:
    numbers = sample.structure.atomic_numbers
    check_elements(numbers, elements, [sample.sample_id] * len(numbers))
