"""A finished student as one function of a structure, which every MD engine calls."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from ase.data import chemical_symbols
from torch import Tensor

from kd_train.evaluation.load_student import (
    known_elements,
    load_student,
    unlisted_elements_warning,
)
from pipeline.datasets.samples import Fields, make_sample
from pipeline.errors import DataError, SpecError
from pipeline.graphs.batch import collate
from pipeline.graphs.neighbors import (
    Edges,
    NeighborSpec,
    limit_warning,
    neighbor_edges,
)
from pipeline.models.checkpoint import LoadedModel
from pipeline.models.derivatives import predict_gradients
from pipeline.models.elements import check_elements
from pipeline.parallel.device_choice import choose_device
from pipeline.structure import Structure

_DTYPES = {"float32": torch.float32, "float64": torch.float64}
_NOUN = "The structure"
_Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Evaluation:
    """Results of one structure, float64.

    ``energy`` in eV, ``forces`` (N, 3) in eV/Å. ``virial`` (3, 3) in eV is minus the
    derivative of the energy by a symmetric strain. ``stress`` (3, 3) in eV/Å³ is minus
    the virial over the volume, positive if the structure is stretched. It is None
    unless the structure is periodic in all three directions.
    """

    energy: float
    forces: _Floats
    virial: _Floats
    stress: _Floats | None


@dataclass(frozen=True)
class BatchEvaluation:
    """Results of B structures with N atoms together, as tensors on the device.

    ``energy`` (B,) float64 in eV; ``forces`` (N, 3) in eV/Å and ``virial`` (B, 3, 3) in
    eV in the precision of the potential.
    """

    energy: Tensor
    forces: Tensor
    virial: Tensor


class StudentPotential:
    """Energy, forces and stress of a student, with one scale for all three.

    Forces are always the gradient of the energy, so dynamics conserve it. Graphs are
    built as in training. Atoms keep their order, and a cell smaller than the cutoff
    has its periodic images.

    Parameters
    ----------
    model
        A run folder, its ``student.safetensors``, or any model file of this project.
    device
        ``cpu``, ``cuda`` or ``cuda:1`` (default: a GPU if there is one).
    dtype
        ``float64`` or ``float32``; training had ``float32``.
    any_element
        Accept elements that the network can embed but that its training data lacked.
    forces
        ``gradient`` accepts a student with a force head without a warning. The head is
        never used.

    Raises
    ------
    CheckpointError
        There is no model, or its file is damaged.
    SpecError
        ``device``, ``dtype`` or ``forces`` cannot be used.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        device: str | None = None,
        dtype: str = "float64",
        any_element: bool = False,
        forces: str | None = None,
    ) -> None:
        if dtype not in _DTYPES:
            raise SpecError(f"dtype is {dtype!r}; choose one of {', '.join(_DTYPES)}.")
        if forces not in (None, "gradient"):
            raise SpecError(
                f"forces is {forces!r}, but dynamics only have 'gradient', the "
                "derivatives of the energy; leave it out."
            )
        self.device = choose_device(device)
        self.dtype = _DTYPES[dtype]
        self.student = load_student(Path(model), self.device)
        self.elements = known_elements(self.student, "any_element=True", any_element)
        self.student.model.to(self.dtype)
        self._told: set[str] = set()
        self._warn("elements", unlisted_elements_warning(self.student))
        self._warn("forces", _forces_warning(self.student, forces))

    @property
    def rule(self) -> NeighborSpec:
        """Rule by which the student's graphs are built."""
        return self.student.model.graph_rule

    def check_elements(self, numbers: npt.ArrayLike, noun: str = _NOUN) -> None:
        """Refuse atomic numbers (N,) that the student does not know.

        Raises
        ------
        DataError
            Names the first unknown element; ``noun`` begins the sentence.
        """
        check_elements(numbers, self.elements, noun=noun)

    def check_periodicity(self, pbc: npt.NDArray[np.bool_]) -> None:
        """Refuse periodic directions (3,) if the student ignores periodicity.

        Raises
        ------
        DataError
            A direction is periodic, and the student was trained without images.
        """
        if pbc.any() and not self.rule.periodic:
            raise DataError(
                f"{_NOUN} is periodic, but the student's graphs ignore periodic images "
                "(use_pbc: false); use a student with use_pbc: true, or run the "
                "molecule without periodic boundaries."
            )

    def evaluate(
        self,
        numbers: npt.ArrayLike,
        positions: npt.ArrayLike,
        cell: npt.ArrayLike,
        pbc: npt.ArrayLike,
    ) -> Evaluation:
        """Evaluate one structure.

        ``numbers`` (N,) are atomic numbers, ``positions`` (N, 3) and ``cell`` (3, 3)
        are in Å, with cell vectors as rows. ``pbc`` (3,) are the periodic directions.
        Positions may lie outside the cell.

        Raises
        ------
        DataError
            An element is unknown, a number is not finite, the cell is impossible, no
            atom has a neighbour, or the student ignores periodicity.
        """
        structure = self.structure(numbers, positions, cell, pbc)
        batch = self.evaluate_batch([structure])
        virial = batch.virial[0].double().cpu().numpy()
        stress = None
        if structure.pbc.all():
            stress = -virial / abs(float(np.linalg.det(structure.cell)))
        forces = batch.forces.double().cpu().numpy()
        return Evaluation(float(batch.energy.item()), forces, virial, stress)

    def structure(
        self,
        numbers: npt.ArrayLike,
        positions: npt.ArrayLike,
        cell: npt.ArrayLike,
        pbc: npt.ArrayLike,
    ) -> Structure:
        """Return a checked structure; arguments and errors are those of `evaluate`."""
        fields = Fields(numbers, positions, cell, pbc)
        structure = make_sample("", fields, _NOUN).structure
        self.check_periodicity(structure.pbc)
        self.check_elements(structure.atomic_numbers)
        return structure

    def evaluate_batch(self, structures: Sequence[Structure]) -> BatchEvaluation:
        """Evaluate several structures in one pass; atoms follow one another.

        Raises
        ------
        DataError
            A structure has no neighbours, an impossible cell, or an energy or forces
            that are not finite.
        """
        edges = [self._edges(structure) for structure in structures]
        batch = collate(structures, edges, self.dtype).to(self.device)
        normalizer = self.student.normalizer
        with torch.no_grad():
            output = predict_gradients(self.student.model, batch)
        assert output.forces is not None
        assert output.virial is not None
        energy = normalizer.denormalize_energy(
            output.energy, batch.atomic_numbers, batch.batch
        )
        # The scale of the energy: with another, forces would not be its gradient.
        forces = output.forces * normalizer.energy_std
        if not (energy.isfinite().all() and forces.isfinite().all()):
            raise DataError(
                "The student's energy or forces are not finite; the atoms are probably "
                "far from any structure of its training data, so use a smaller time "
                "step or start from a relaxed structure."
            )
        virial = normalizer.denormalize_virial(output.virial)
        return BatchEvaluation(energy, forces, virial)

    def _edges(self, structure: Structure) -> Edges:
        edges = neighbor_edges(structure, self.rule)
        if len(edges) == 0:
            raise DataError(
                f"No atom has a neighbour within {self.rule.cutoff} Å, the cutoff of "
                "the student, so there is no interaction to calculate; check that "
                "positions are in Å."
            )
        self._warn("lone", _lone_warning(structure, edges, self.rule))
        self._warn("limit", limit_warning(self.rule, edges.crowded, len(structure)))
        return edges

    def _warn(self, kind: str, text: str | None) -> None:
        """Warn once of each kind."""
        if text is not None and kind not in self._told:
            self._told.add(kind)
            warnings.warn(f"{text[0].upper()}{text[1:]}.", stacklevel=3)


def _forces_warning(student: LoadedModel, forces: str | None) -> str | None:
    """Return a warning if forces differ from those that ``kd-eval`` measures."""
    options = student.model.hyperparameters
    if options.get("direct_forces") and options.get("regress_forces", True):
        if forces is not None:
            return None
        return (
            "the student has a force head, which does not conserve energy; the forces "
            "here are the gradient of its energy, whose accuracy kd-eval does not "
            "measure (forces='gradient' accepts this)"
        )
    scales = student.normalizer
    if scales.energy_std == scales.force_std or forces is not None:
        return None
    return (
        f"the student scales energies by {scales.energy_std:g} and forces by "
        f"{scales.force_std:g}; the forces here are the gradient of its energy, so "
        "they differ from those of kd-eval by the quotient (forces='gradient' accepts "
        "this)"
    )


def _lone_warning(structure: Structure, edges: Edges, rule: NeighborSpec) -> str | None:
    """Return a warning if an atom has no neighbour."""
    lone = np.setdiff1d(np.arange(len(structure)), edges.edge_index[1])
    if not len(lone):
        return None
    symbol = chemical_symbols[structure.atomic_numbers[lone[0]]]
    return (
        f"atom {lone[0]} ({symbol}) has no neighbour within {rule.cutoff} Å; "
        "students are hardly trained on free atoms"
    )
