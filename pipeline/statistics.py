"""Scale and per-element reference energies of a dataset's labels."""

import numpy as np
import numpy.typing as npt

from pipeline.datasets import Dataset
from pipeline.models.normalizer import NUM_REFERENCES, Normalizer


def label_statistics(dataset: Dataset, reference_energies: str) -> Normalizer:
    """Normaliser fitted to the labels of ``dataset``.

    Reference energies per element (eV) are the least-squares fit of the total energies
    (smallest norm where compositions do not determine them); what they leave has mean
    ``energy_mean``. Energies and forces share one scale, the root mean square force
    component in eV/Å over free atoms, so that forces stay the gradient of the energy.
    Samples without labels are left out; without any force to measure the scale is 1.
    """
    samples = [dataset[i] for i in range(len(dataset))]
    labelled = [s for s in samples if np.isfinite(s.energy)]
    references = np.zeros(NUM_REFERENCES)
    mean = 0.0
    if labelled:
        energies = np.array([s.energy for s in labelled])
        counts = np.stack([_composition(s.structure.atomic_numbers) for s in labelled])
        if reference_energies == "per_element":
            references = _least_squares(counts, energies)
        mean = float((energies - counts @ references).mean())
    forces = [s.forces[~s.structure.fixed].astype(np.float64) for s in samples]
    components = np.concatenate(forces).ravel() if forces else np.zeros(0)
    components = components[np.isfinite(components)]
    scale = float(np.sqrt((components**2).mean())) if components.any() else 1.0
    return Normalizer(mean, scale, scale, tuple(references.tolist()))


def _composition(atomic_numbers: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    return np.bincount(atomic_numbers, minlength=NUM_REFERENCES).astype(np.float64)


def _least_squares(
    counts: npt.NDArray[np.float64], energies: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    present = counts.any(axis=0)
    references = np.zeros(NUM_REFERENCES)
    references[present] = np.linalg.lstsq(counts[:, present], energies, rcond=None)[0]
    return references
