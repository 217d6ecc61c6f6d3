"""Thermal displacements along the normal modes of the teacher's own Hessian."""

from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt
from ase import units
from ase.geometry import find_mic

from pipeline.generate.method import Copy, Method, PassEstimate, free_atoms
from pipeline.generate.randomness import Floats, make_generator
from pipeline.generate.rattle import displace
from pipeline.spec.generate_spec import GenerateSpec
from pipeline.structure import Sample, Structure
from pipeline.teachers.jacobian import difference_quotients, displaced_graphs
from pipeline.teachers.potential import SampleGraph

# Singular values below this, relative to the largest, are those of no motion: the
# rotation of a linear molecule around its axis.
_NO_MOTION = 1e-6


class NormalModes(Method):
    """Displacements of the thermal distribution of a harmonic teacher.

    H = -(J + Jᵀ)/2 with J = ∂F/∂x by central differences, on the graph of the sample.
    With H v = w v, displacements are Σ ξ √(kT / max(|w|, w₀)) v, ξ standard normal. The
    absolute value is taken because samples are not minima. Translations and rotations
    of free molecules are projected out. Copies come in pairs of opposite displacements.
    """

    letter = "m"

    def propose(self, copies: Sequence[Copy], attempt: int) -> list[Structure]:
        """Return the displaced structures."""
        found = []
        for copy in copies:
            group, factor = self._factors[copy.parent]
            structure = self.parents[copy.parent].structure
            shift = np.zeros(structure.positions.shape)
            drawn = self.normals(copy, attempt)[group]
            shift[group] = (factor @ drawn.reshape(-1)).reshape(-1, 3)
            found.append(displace(structure, shift))
        return found

    @classmethod
    def estimate_passes(cls, spec: GenerateSpec, n_atoms: int) -> PassEstimate:
        """Return the 6 passes for each atom of the Hessian."""
        return PassEstimate(6 * min(n_atoms, spec.setting("max_hessian_atoms")) + 1, 0)

    @cached_property
    def _factors(self) -> list[tuple[npt.NDArray[np.intp], Floats]]:
        """For every sample, its moving atoms and the matrix √(kT / |H|)."""
        groups = [self._group(sample) for sample in self.parents]
        hessians = self._hessians(groups)
        return [
            (group, self._factor(sample.structure, group, hessian))
            for sample, group, hessian in zip(
                self.parents, groups, hessians, strict=True
            )
        ]

    def _group(self, sample: Sample) -> npt.NDArray[np.intp]:
        """Return the atoms that move: all free atoms, or a random atom's neighbours."""
        free, most = (
            free_atoms(sample.structure),
            self.spec.setting("max_hessian_atoms"),
        )
        if len(free) <= most:
            return free
        random = make_generator(self.spec.seed, sample.sample_id, "group")
        centre = free[random.randint(len(free))]
        positions = sample.structure.positions
        _, distance = find_mic(
            positions[free] - positions[centre],
            sample.structure.cell,
            sample.structure.pbc,
        )
        nearest = np.argsort(distance, kind="stable")[:most]
        return np.sort(free[nearest])

    def _hessians(self, groups: Sequence[npt.NDArray[np.intp]]) -> list[Floats]:
        """Return H of every group, (3n, 3n) in eV/Å²."""
        step = self.spec.setting("step")
        potential = self.teacher.runner.potential
        columns = [(3 * g[:, None] + np.arange(3)).reshape(-1) for g in groups]

        def graphs() -> Iterator[tuple[Sample, SampleGraph]]:
            for sample, chosen in zip(self.parents, columns, strict=True):
                graph = potential.graph(sample)
                yield from displaced_graphs(
                    potential, sample, graph, chosen.tolist(), step
                )

        forces = self.teacher.forces_of_graphs(graphs())
        rows = [
            2 * len(c) * len(s.structure)
            for s, c in zip(self.parents, columns, strict=True)
        ]
        found = []
        parts = np.split(forces, np.cumsum(rows)[:-1])
        for sample, chosen, part in zip(self.parents, columns, parts, strict=True):
            slopes = difference_quotients(
                part.astype(np.float64), sample.structure, step
            )
            jacobian = slopes.reshape(len(chosen), -1)[:, chosen].T
            found.append(-(jacobian + jacobian.T) / 2)
        return found

    def _factor(
        self, structure: Structure, group: npt.NDArray[np.intp], hessian: Floats
    ) -> Floats:
        """Return √(kT / max(|H|, w₀)) without translations and rotations, (3n, 3n).

        A function of the matrix does not depend on signs or on the choice of vectors
        of equal curvature, so every machine has the same displacements.
        """
        basis = _inner_motions(structure, group)
        curvatures, modes = np.linalg.eigh(basis.T @ hessian @ basis)
        floor = self.spec.setting("min_curvature")
        variance = units.kB * self.spec.setting("temperature")
        widths = np.sqrt(variance / np.maximum(np.abs(curvatures), floor))
        vectors = basis @ modes
        factor: Floats = (vectors * widths) @ vectors.T
        return factor


def _inner_motions(structure: Structure, group: npt.NDArray[np.intp]) -> Floats:
    """Return an orthonormal basis (3n, m) of the motions that change the structure.

    A group of some atoms, or free atoms near fixed atoms, has no such symmetry. A
    periodic structure has translations, a molecule also rotations.
    """
    count = 3 * len(group)
    if len(group) < len(structure):
        return np.eye(count)
    centred = structure.positions - structure.positions.mean(axis=0)
    symmetric = [np.tile(axis, len(structure)) for axis in np.eye(3)]
    if not structure.pbc.any():
        symmetric += [np.cross(axis, centred).reshape(-1) for axis in np.eye(3)]
    left, values, _ = np.linalg.svd(np.array(symmetric).T, full_matrices=True)
    rank = int((values > _NO_MOTION * values.max()).sum())
    basis: Floats = left[:, rank:]
    return basis
