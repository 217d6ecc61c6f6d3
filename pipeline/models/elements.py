"""Checks that a model knows the elements it is asked about."""

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from ase.data import chemical_symbols

from pipeline.errors import DataError
from pipeline.models.normalizer import Normalizer

# Entry of a file's provenance that says what its model was trained on.
TRAINING_DATA = "training_data"


@dataclass(frozen=True)
class TrainedElements(Container[int]):
    """Elements that a model can embed and that its training data held.

    ``option`` is what a user sets to do without the second condition.
    """

    embedded: Container[int]
    trained: frozenset[int]
    option: str

    def __contains__(self, number: object) -> bool:
        return number in self.trained and number in self.embedded


def trained_elements(
    normalizer: Normalizer, provenance: Mapping[str, Any]
) -> frozenset[int] | None:
    """Atomic numbers that a model's training data held; None where its file is silent.

    Our files list them. Of others, those with a reference energy were there.
    """
    about = provenance.get(TRAINING_DATA)
    listed = about.get("elements") if isinstance(about, Mapping) else None
    if isinstance(listed, list):
        return frozenset(int(number) for number in listed)
    references = normalizer.element_references
    return frozenset(z for z, e in enumerate(references) if e != 0.0) or None


def usable_elements(
    embedded: Container[int], trained: frozenset[int] | None, option: str
) -> Container[int]:
    """Elements that a model may be given, as far as ``trained`` is known."""
    return embedded if trained is None else TrainedElements(embedded, trained, option)


def list_symbols(atomic_numbers: npt.ArrayLike) -> str:
    """Symbols of distinct elements, joined by commas, in ascending order."""
    return ", ".join(chemical_symbols[z] for z in np.unique(atomic_numbers))


def check_elements(
    atomic_numbers: npt.ArrayLike,
    elements: Container[int],
    sample_ids: npt.ArrayLike | None = None,
    noun: str = "Sample",
) -> None:
    """Raise :class:`DataError` for the first atom whose element is not in ``elements``.

    ``sample_ids`` (N,) names each atom's sample, for the message; ``noun`` is what a
    sample is called there.
    """
    numbers = np.asarray(atomic_numbers)
    unknown = [int(z) for z in np.unique(numbers) if int(z) not in elements]
    if not unknown:
        return
    atom = int(np.flatnonzero(np.isin(numbers, unknown))[0])
    where = "" if sample_ids is None else f" {str(np.asarray(sample_ids)[atom])!r}"
    number = int(numbers[atom])
    if isinstance(elements, TrainedElements) and number in elements.embedded:
        raise DataError(
            f"{noun}{where} holds {list_symbols(number)}; the data that this model was "
            f"trained on held no {list_symbols(number)}, so its numbers would mean "
            f"nothing; leave such samples out, or set {elements.option} to go on."
        )
    raise DataError(
        f"{noun}{where} holds an atom with atomic number {number}, which "
        "this model cannot embed; leave such samples out or use a model with more "
        "elements."
    )
