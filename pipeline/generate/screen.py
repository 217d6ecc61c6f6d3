"""Refusal of harmful copies: close atoms, large forces, high energies."""

from dataclasses import dataclass

import numpy as np

from pipeline.errors import DataError
from pipeline.generate.method import free_atoms
from pipeline.generate.teacher import Label
from pipeline.graphs.closeness import check_distances
from pipeline.graphs.neighbors import NeighborSpec, neighbor_edges
from pipeline.spec.generate_spec import GenerateSpec
from pipeline.structure import Sample

# No bond is as short; H2, the shortest, has 0.74 Å.
CLOSEST_PAIR = 0.5
_COLLISIONS = NeighborSpec(CLOSEST_PAIR, max_neighbors=1, symmetric=False)
# The forces of most thermal copies stay below 10 eV/Å. A copy with 100 eV/Å outweighs
# all others in a loss.
_MAX_FORCE = 15.0
_FORCE_RATIO = 2.0
# Equipartition at 3 000 K is 0.4 eV per atom.
_MAX_ENERGY_RISE = 0.5
REASONS = ("close", "force", "energy")


@dataclass(frozen=True)
class Screen:
    """Limits of a split; ``closest`` is a share of the sum of covalent radii."""

    spec: GenerateSpec
    closest: float | None

    def refuse_positions(self, copy: Sample) -> tuple[str, str] | None:
        """Return why atoms of ``copy`` are too close, as kind and sentence, or None."""
        try:
            close = len(neighbor_edges(copy.structure, _COLLISIONS)) > 0
            if self.closest is not None:
                check_distances(copy, self.closest, "")
        except DataError:
            close = True
        return ("close", "two of its atoms are too close") if close else None

    def refuse_label(
        self, copy: Sample, label: Label, parent: Label
    ) -> tuple[str, str] | None:
        """Return why the teacher's ``label`` is an outlier, as kind and words, or None.

        ``parent`` is the label of the sample that the copy was made from.
        """
        force = _largest(label)
        allowed = self.spec.max_force
        if allowed is None:
            allowed = max(_MAX_FORCE, _FORCE_RATIO * _largest(parent))
        if not force <= allowed:
            return "force", f"its largest force is {force:.3g} of {allowed:.3g} eV/Å"
        rise = (label.energy - parent.energy) / len(free_atoms(copy.structure))
        most = self.spec.max_energy_rise or _MAX_ENERGY_RISE
        if not rise <= most:
            return "energy", f"its energy rises by {rise:.3g} of {most:.3g} eV per atom"
        return None


def _largest(label: Label) -> float:
    return float(np.linalg.norm(label.forces.astype(np.float64), axis=1).max())
