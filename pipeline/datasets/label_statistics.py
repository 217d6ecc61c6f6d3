"""Scale, reference energies and kind of a dataset's labels."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import numpy.typing as npt
from ase.data import chemical_symbols

from pipeline.datasets import Dataset
from pipeline.datasets.base import split_pieces
from pipeline.errors import DataError, SpecError
from pipeline.models.normalizer import NUM_REFERENCES, Normalizer
from pipeline.spec.cache_spec import read_reference_energies
from pipeline.spec.sections import NO_REFERENCES, PER_ELEMENT, SplitSpec
from pipeline.structure import Sample

# Samples whose equations are folded into the triangle at a time.
FOLD = 2048
# Samples of a split whose energies are compared with those of other splits.
COMPARED = 256
# Energies are of another kind when, per atom, they differ by more than both.
KIND_DIFFERENCE = 1.5  # eV
KIND_RATIO = 5.0
# Parts of a direction below this are none.
_ZERO = 1e-6

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.uint16]


class LabelSums:
    """What a normaliser needs to know of samples that pass by once, in any number.

    The least-squares equations of the energies are kept as the triangle of their QR
    decomposition, which has the same solutions and does not grow with the samples.
    Sums of parts of a dataset, up to 2048 samples each, can be merged, in its order.
    """

    def __init__(self) -> None:
        self._pending: list[tuple[Counts, Floats]] = []
        self._triangle = np.zeros((0, NUM_REFERENCES + 1))
        self._sum = np.zeros(NUM_REFERENCES + 1)
        self._labelled = 0
        self._squares = 0.0
        self._components = 0

    def add(self, samples: Sequence[Sample]) -> None:
        """Take the labels of samples into account, where they have some."""
        labelled = [sample for sample in samples if np.isfinite(sample.energy)]
        for part in split_pieces(labelled, FOLD):
            counts = [_composition(s.structure.atomic_numbers) for s in part]
            energies = np.array([s.energy for s in part])
            self._pending.append((np.stack(counts), energies))
        for sample in samples:
            forces = sample.forces[~sample.structure.fixed].astype(np.float64)
            forces = forces[np.isfinite(forces)]
            self._squares += float((forces**2).sum())
            self._components += forces.size

    def merge(self, other: "LabelSums") -> None:
        """Take what ``other`` has seen into account, as samples that come after.

        Decompositions are made here, not where samples are read, since the number of
        threads may change their last bits.
        """
        self._fold()
        self._pending += other._pending
        self._triangle = _triangle(self._triangle, other._triangle)
        self._sum += other._sum
        self._squares += other._squares
        self._components += other._components
        self._labelled += other._labelled
        self._fold()

    def normalizer(self, reference_energies: str) -> Normalizer:
        """Normaliser fitted to the labels so far.

        Reference energies per element (eV) are none, those of the named file, or the
        least-squares fit of the total energies (smallest norm where compositions do
        not determine them); what they leave has mean ``energy_mean``. Energies and
        forces share one scale, the root mean square force component in eV/Å over free
        atoms, so that forces stay the gradient of the energy. Samples without labels
        are left out; without any force to measure the scale is 1.

        Raises
        ------
        SpecError
            The file lacks an element that occurs in a labelled sample.
        """
        self._fold()
        references = np.zeros(NUM_REFERENCES)
        mean = 0.0
        if self._labelled:
            if reference_energies == PER_ELEMENT:
                references = _least_squares(self._triangle, self._labelled)
            elif reference_energies != NO_REFERENCES:
                references = _given(Path(reference_energies), self._sum[:-1])
            mean = float(self._sum @ np.append(-references, 1.0)) / self._labelled
        squares = self._squares
        scale = float(np.sqrt(squares / self._components)) if squares > 0 else 1.0
        return Normalizer(mean, scale, scale, tuple(references.tolist()))

    @property
    def undetermined(self) -> tuple[int, ...]:
        """Elements whose reference energies the compositions leave open, ascending.

        Energies of the fit are of smallest norm there, and mean something in the sums
        of such compositions only.
        """
        self._fold()
        counts = self._triangle[:, :-1]
        present = np.flatnonzero(counts.any(axis=0))
        if not len(present):
            return ()
        free = free_directions(counts[:, present], _rounding(self._labelled))
        return tuple(present[np.abs(free).max(axis=0, initial=0) > _ZERO].tolist())

    def _fold(self) -> None:
        for counts, energies in self._pending:
            rows = np.column_stack((counts.astype(np.float64), energies))
            self._sum += rows.sum(axis=0)
            self._labelled += len(rows)
            self._triangle = _triangle(self._triangle, rows)
        self._pending = []


def _triangle(equations: Floats, more: Floats) -> Floats:
    """Triangle of the equations together; as it is where there are no more."""
    if not len(more):
        return equations
    return np.linalg.qr(np.vstack((equations, more))).R


def _composition(atomic_numbers: npt.NDArray[np.uint8]) -> Counts:
    return np.bincount(atomic_numbers, minlength=NUM_REFERENCES).astype(np.uint16)


def free_directions(counts: Floats, smallest: float) -> Floats:
    """Orthonormal rows (k, m): changes of m energies that no row of counts notices.

    ``counts`` (n, m) are compositions or combinations of them; singular values below
    ``smallest``, relative to the largest, count as zero.
    """
    m = counts.shape[1]
    # With zeros below, so that there are as many directions as elements.
    padded = np.vstack((counts, np.zeros((max(0, m - len(counts)), m))))
    _, values, directions = np.linalg.svd(padded, full_matrices=False)
    return directions[values <= smallest * values.max(initial=0)]


def _rounding(samples: int) -> float:
    """Relative size of what is zero; it grows with the samples behind the equations."""
    return float(np.finfo(np.float64).eps * max(samples, NUM_REFERENCES))


def _least_squares(equations: Floats, samples: int) -> Floats:
    """(NUM_REFERENCES,) energies; rows of ``equations`` are counts, then the energy."""
    smallest = _rounding(samples)
    counts, energies = equations[:, :-1], equations[:, -1]
    present = counts.any(axis=0)
    references = np.zeros(NUM_REFERENCES)
    solution, *_ = np.linalg.lstsq(counts[:, present], energies, rcond=smallest)
    references[present] = solution
    return references


def _given(path: Path, counts: Floats) -> Floats:
    """(NUM_REFERENCES,) energies of a file; ``counts`` says which elements occur."""
    energies = read_reference_energies(path)
    missing = [int(z) for z in np.flatnonzero(counts) if int(z) not in energies]
    if missing:
        symbols = ", ".join(chemical_symbols[z] for z in missing)
        raise SpecError(
            f"reference_energies: {path} has no energy for {symbols}; add them."
        )
    references = np.zeros(NUM_REFERENCES)
    references[list(energies)] = list(energies.values())
    return references


def check_energy_kinds(
    splits: Mapping[str, SplitSpec], datasets: Mapping[str, Dataset]
) -> None:
    """Refuse splits that mix kinds of energies, say total and adsorption energies.

    Looks at few samples of each split; ``check_energy_kind: false`` leaves a split out,
    and so does having no labels.

    Raises
    ------
    DataError
        Two splits differ beyond doubt; names both and the key that allows it.
    """
    energies = {
        name: _spread_samples(datasets[name])
        for name, split in splits.items()
        if split.check_energy_kind and split.labelled
    }
    for first, second in combinations(energies, 2):
        medians = find_differing_kinds(energies[first], energies[second])
        if medians is not None:
            raise DataError(
                f"splits.{first} has energies around {medians[0]:.3g} eV per atom and "
                f"splits.{second} around {medians[1]:.3g} eV for the same elements, so "
                "they are of different kinds (total, adsorption, ...); make them alike "
                f"or set splits.{second}.check_energy_kind: false."
            )


def find_differing_kinds(
    first: Sequence[Sample], second: Sequence[Sample]
) -> tuple[float, float] | None:
    """Median energies per atom (eV) if those are of different kinds, else None.

    Where both sides have samples of one formula, those are compared, and energies of
    one kind are within KIND_DIFFERENCE per atom. Otherwise only samples made of
    elements that occur on both sides count, and as their shares may differ, kinds do
    only when the medians are more than KIND_RATIO apart as well.
    """
    sides = [_by_formula(samples) for samples in (first, second)]
    formulas = sides[0].keys() & sides[1].keys()
    ratio = 0.0
    if not formulas:
        ratio = KIND_RATIO
        elements = [set().union(*side) for side in sides]
        shared = elements[0] & elements[1]
        formulas = {f for side in sides for f in side if shared.issuperset(f)}
    found = [[side[f] for f in formulas & side.keys()] for side in sides]
    if not all(found):
        return None
    medians = [float(np.median(energies)) for energies in found]
    small, large = sorted(map(abs, medians))
    apart = abs(medians[0] - medians[1]) > KIND_DIFFERENCE and large > ratio * small
    return (medians[0], medians[1]) if apart else None


def _by_formula(samples: Sequence[Sample]) -> dict[bytes, float]:
    """Median energy per atom (eV) by sorted atomic numbers, of labelled samples."""
    energies: dict[bytes, list[float]] = {}
    for sample in samples:
        if np.isfinite(sample.energy):
            formula = np.sort(sample.structure.atomic_numbers).tobytes()
            per_atom = sample.energy / len(sample.structure)
            energies.setdefault(formula, []).append(per_atom)
    return {formula: float(np.median(found)) for formula, found in energies.items()}


def _spread_samples(dataset: Dataset) -> list[Sample]:
    """At most COMPARED samples, evenly over the dataset."""
    step = -(-len(dataset) // COMPARED)
    return [dataset[i] for i in range(0, len(dataset), step)]
