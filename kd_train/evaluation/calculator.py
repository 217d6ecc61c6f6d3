"""A finished student as a calculator of ASE, for relaxations and dynamics."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import (
    Calculator,
    PropertyNotImplementedError,
    all_changes,
)
from ase.data import chemical_symbols
from ase.stress import full_3x3_to_voigt_6_stress
from torch_geometric.data import Data

from kd_train.evaluation.load_student import (
    known_elements,
    load_student,
    predict_consistently,
    reference_energies,
    undetermined_elements,
    unlisted_elements_warning,
)
from pipeline.datasets.samples import Fields, make_sample
from pipeline.errors import DataError, SpecError
from pipeline.graphs.batch import collate
from pipeline.graphs.neighbors import Edges, limit_warning, neighbor_edges
from pipeline.models.checkpoint import LoadedModel
from pipeline.models.elements import check_elements, list_symbols
from pipeline.models.network import Network
from pipeline.parallel.device_choice import choose_device
from pipeline.structure import Structure

_DTYPES = {"float32": torch.float32, "float64": torch.float64}


class StudentCalculator(Calculator):
    """Energy (eV) and forces (eV/Å) of a student for ``atoms.calc``.

    Graphs are built as in training, so results equal the results of ``kd-eval``. If
    forces are gradients of the energy, there is ``stress`` (eV/Å³, positive in tension)
    of structures that are periodic in three directions. ``energies`` are the parts of
    atoms. ``free_energy`` is the energy.

    Parameters
    ----------
    model
        A run folder, its ``student.safetensors``, or any model file of this project.
    device
        ``cpu``, ``cuda`` or ``cuda:1`` (default: a GPU if there is one).
    dtype
        ``float64`` for finite differences and phonons; training had ``float32``.
    forces
        ``model`` for the forces of the student (default), ``gradient`` for minus the
        gradient of its energy, also if the student has a force head.
    any_element
        Accept elements that the network can embed but that its training data lacked.

    Raises
    ------
    CheckpointError
        There is no model, or its file is damaged.
    SpecError
        ``device``, ``dtype`` or ``forces`` cannot be used.
    PropertyNotImplementedError
        Of ``stress``: forces come from a head, or a direction is not periodic.
    DataError
        From calculations: an element is unknown, a position is not finite, the cell is
        impossible, or the student ignores periodicity.
    """

    implemented_properties: list[str]

    def __init__(
        self,
        model: str | Path,
        *,
        device: str | None = None,
        dtype: str = "float32",
        forces: str = "model",
        any_element: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if dtype not in _DTYPES:
            raise SpecError(f"dtype is {dtype!r}; choose one of {', '.join(_DTYPES)}.")
        if forces not in ("model", "gradient"):
            raise SpecError(f"forces is {forces!r}; choose one of model, gradient.")
        self.device = choose_device(device)
        self.dtype = _DTYPES[dtype]
        self.student = load_student(Path(model), self.device)
        self._elements = known_elements(self.student, "any_element=True", any_element)
        self.student.model.to(self.dtype)
        self._gradient = forces == "gradient"
        self.implemented_properties = ["energy", "free_energy", "energies"]
        settings = self.student.model.hyperparameters
        if self._gradient or settings.get("regress_forces", True):
            self.implemented_properties.append("forces")
        if self._gradient or _has_gradient_forces(self.student):
            self.implemented_properties.append("stress")
        self._told: set[str] = set()
        self._warn("elements", unlisted_elements_warning(self.student))

    def reference_energies(self) -> dict[str, float]:
        """Return energies of isolated atoms (eV), which total energies contain.

        A formation energy is the energy minus the sum of these over the atoms. Empty if
        the student's energies have no such references.
        """
        return reference_energies(self.student)

    def get_property(
        self, name: str, atoms: Atoms | None = None, allow_calculation: bool = True
    ) -> Any:
        """Return a property of ``atoms``, as ASE asks for it."""
        if name == "stress" and allow_calculation:
            self._check_stress(self.atoms if atoms is None else atoms)
        return super().get_property(name, atoms, allow_calculation)

    def _check_stress(self, atoms: Atoms | None) -> None:
        """Refuse a stress that does not exist."""
        if "stress" not in self.implemented_properties:
            raise PropertyNotImplementedError(
                "The student has no stress, because its forces come from a force head; "
                'use StudentCalculator(…, forces="gradient"), or a student with '
                "direct_forces: false."
            )
        if atoms is not None and not atoms.pbc.all():
            raise PropertyNotImplementedError(
                "Stress needs a cell that is periodic in three directions, but pbc is "
                f"{' '.join('FT'[int(flag)] for flag in atoms.pbc)}; set atoms.pbc and "
                "atoms.cell, or ask for energies and forces."
            )

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = tuple(all_changes),
    ) -> None:
        """Fill ``results`` for ``atoms``.

        ASE applies constraints.
        """
        super().calculate(atoms, properties, system_changes)
        assert self.atoms is not None
        batch = self._batch(self.atoms)
        found = predict_consistently(self.student, batch, gradient=self._gradient)
        energy = found.energy.item()
        self.results = {"energy": energy, "free_energy": energy}
        self.results["energies"] = found.energies.cpu().numpy()
        if found.forces is not None:
            self.results["forces"] = found.forces.double().cpu().numpy()
        if found.virial is not None:
            if not self._gradient:
                self._warn_of_scales()
            if self.atoms.pbc.all():
                virial = found.virial[0].double().cpu().numpy()
                stress = -virial / self.atoms.get_volume()
                self.results["stress"] = full_3x3_to_voigt_6_stress(stress)

    def _batch(self, atoms: Atoms) -> Data:
        model = self.student.model
        structure = self._structure(atoms)
        edges = neighbor_edges(structure, model.graph_rule)
        self._warn_of(atoms, edges)
        return collate([structure], [edges], self.dtype).to(self.device)

    def _structure(self, atoms: Atoms) -> Structure:
        """Convert ``atoms`` as stage one reads a sample from a file."""
        where = "The Atoms object"
        if atoms.pbc.any() and not self.student.model.graph_rule.periodic:
            raise DataError(
                f"{where} is periodic, but the student's graphs ignore periodic images "
                "(use_pbc: false); use a student with use_pbc: true, or set "
                "atoms.pbc = False for a molecule in a box."
            )
        fields = Fields(
            atoms.numbers,
            atoms.positions,
            atoms.cell.array,
            atoms.pbc,
            tags=atoms.arrays.get("tags"),
        )
        structure = make_sample("", fields, where).structure
        check_elements(structure.atomic_numbers, self._elements, noun=where)
        return structure

    def _warn_of(self, atoms: Atoms, edges: Edges) -> None:
        """Warn of reasons to doubt the results, once each."""
        rule = self.student.model.graph_rule
        lone = np.setdiff1d(np.arange(len(atoms)), edges.edge_index[1])
        if len(lone):
            symbol = chemical_symbols[atoms.numbers[lone[0]]]
            self._warn(
                "lone",
                f"Atom {lone[0]} ({symbol}) has no neighbour within {rule.cutoff} Å; "
                "students are hardly trained on free atoms; check that positions are "
                "in Å",
            )
        self._warn("limit", limit_warning(rule, edges.crowded, len(atoms)))
        arbitrary = undetermined_elements(self.student, atoms.numbers)
        if arbitrary:
            self._warn(
                "references",
                "the training compositions do not determine the reference energies "
                f"of {list_symbols(arbitrary)}, and {atoms.get_chemical_formula()} is "
                "not a combination of these compositions, so do not compare its "
                "energy with energies of other compositions",
            )

    def _warn_of_scales(self) -> None:
        """Warn once if losses saw gradient forces on another scale than energies."""
        normalizer = self.student.normalizer
        if normalizer.force_std != normalizer.energy_std:
            self._warn(
                "scales",
                f"the student's scales of energies ({normalizer.energy_std:g} eV) and "
                f"forces ({normalizer.force_std:g} eV/Å) differ; forces and stress "
                "have the scale of the energy here, so that they are its derivatives",
            )

    def _warn(self, kind: str, text: str | None) -> None:
        if text is not None and kind not in self._told:
            self._told.add(kind)
            warnings.warn(f"{text[0].upper()}{text[1:]}.", stacklevel=2)


def _has_gradient_forces(student: LoadedModel) -> bool:
    """Return whether forces of ``student`` are gradients with a virial."""
    settings = student.model.hyperparameters
    if not settings.get("regress_forces", True) or settings.get("direct_forces"):
        return False
    # Networks of plug-ins may derive their forces in their own way.
    return type(student.model).predict_energies is not Network.predict_energies
