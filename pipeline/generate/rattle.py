"""Gaussian displacements, alone or with steps downhill in between."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from pipeline.generate.method import Copy, Method, PassEstimate
from pipeline.generate.randomness import Floats, round_to_grid
from pipeline.spec.generate_spec import GenerateSpec
from pipeline.structure import Sample, Structure

# A step downhill moves an atom by at most this (Å) and by this much for each eV/Å.
_MAX_MOVE = 0.05
_MOVE_PER_FORCE = 0.02


class Rattle(Method):
    """Independent Gaussians of ``sigma`` Å along each axis, in opposite pairs."""

    letter = "r"

    def propose(self, copies: Sequence[Copy], attempt: int) -> list[Structure]:
        """Return the displaced structures."""
        return [
            displace(
                self.parents[copy.parent].structure,
                self.spec.setting("sigma") * self.normals(copy, attempt),
            )
            for copy in copies
        ]

    @classmethod
    def estimate_passes(cls, spec: GenerateSpec, n_atoms: int) -> PassEstimate:
        """Return the pass of the sample itself; the method needs none."""
        return PassEstimate(1, 0)


class RattleRelax(Method):
    """Displacement and a few steps downhill in turn, from one copy to the next.

    Copies spread out along a walk that stays at low energies (Gardner et al. 2025,
    arXiv:2506.10956). Each attempt begins a walk of its own.
    """

    letter = "w"

    def propose(self, copies: Sequence[Copy], attempt: int) -> list[Structure]:
        """Return the structures of the walks that ``copies`` belong to."""
        wanted = {c.parent: 1 for c in copies}
        last = {p: max(c.number for c in copies if c.parent == p) for p in wanted}
        walks = {p: self.parents[p].structure for p in wanted}
        found: dict[Copy, Structure] = {}
        for number in range(max(last.values()) + 1):
            moving = [p for p in wanted if number <= last[p]]
            for parent in moving:
                copy = Copy(parent, number)
                drawn = self.generator(copy, attempt, "walk").standard_normal(
                    walks[parent].positions.shape
                )
                shift = self.spec.setting("sigma") * drawn
                walks[parent] = displace(walks[parent], shift)
            self._relax(walks, moving)
            found |= {Copy(p, number): walks[p] for p in moving}
        return [found[copy] for copy in copies]

    def _relax(self, walks: dict[int, Structure], moving: Sequence[int]) -> None:
        for _ in range(self.spec.setting("relax_steps")):
            labels = self.teacher.label(
                [
                    Sample.without_labels(self.parents[p].sample_id, walks[p])
                    for p in moving
                ]
            )
            for parent, label in zip(moving, labels, strict=True):
                walks[parent] = displace(walks[parent], _downhill(label.forces))

    @classmethod
    def estimate_passes(cls, spec: GenerateSpec, n_atoms: int) -> PassEstimate:
        """Return the passes of the steps downhill."""
        return PassEstimate(1, spec.setting("relax_steps"))


def displace(structure: Structure, shift: Floats) -> Structure:
    """Return ``structure`` with free atoms moved by ``shift`` (N, 3) in Å."""
    moved = round_to_grid(shift)
    moved[structure.fixed] = 0.0
    return replace(structure, positions=structure.positions + moved)


def _downhill(forces: npt.NDArray[np.float32]) -> Floats:
    """Return moves (N, 3) in Å along ``forces``, of bounded length."""
    moves: Floats = _MOVE_PER_FORCE * forces.astype(np.float64)
    lengths = np.linalg.norm(moves, axis=1, keepdims=True)
    return moves * np.minimum(1.0, _MAX_MOVE / np.maximum(lengths, 1e-12))
