"""A finished student as a calculator of ASE, for relaxations and dynamics."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes
from ase.data import chemical_symbols
from torch_geometric.data import Data

from kd_train.evaluation.load_student import (
    known_elements,
    load_student,
    predict,
    reference_energies,
    undetermined_elements,
    unlisted_elements_warning,
)
from pipeline.datasets.samples import Fields, make_sample
from pipeline.errors import DataError, SpecError
from pipeline.graphs.batch import collate
from pipeline.graphs.neighbors import Edges, limit_warning, neighbor_edges
from pipeline.models.elements import check_elements, list_symbols
from pipeline.parallel.device_choice import choose_device
from pipeline.structure import Structure

_DTYPES = {"float32": torch.float32, "float64": torch.float64}


class StudentCalculator(Calculator):
    """Energy (eV) and forces (eV/Å) of a student for ``atoms.calc``.

    Graphs are built as in training, so results equal the results of ``kd-eval``. The
    calculator has no stress. ``free_energy`` is the energy.

    Parameters
    ----------
    model
        A run folder, its ``student.safetensors``, or any model file of this project.
    device
        ``cpu``, ``cuda`` or ``cuda:1`` (default: a GPU if there is one).
    dtype
        ``float64`` for finite differences and phonons; training had ``float32``.
    any_element
        Accept elements that the network can embed but that its training data lacked.

    Raises
    ------
    CheckpointError
        There is no model, or its file is damaged.
    SpecError
        ``device`` or ``dtype`` cannot be used.
    DataError
        From calculations: an element is unknown, a position is not finite, the cell is
        impossible, no atom has a neighbour, or the student ignores periodicity.
    """

    implemented_properties: list[str]

    def __init__(
        self,
        model: str | Path,
        *,
        device: str | None = None,
        dtype: str = "float32",
        any_element: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if dtype not in _DTYPES:
            raise SpecError(f"dtype is {dtype!r}; choose one of {', '.join(_DTYPES)}.")
        self.device = choose_device(device)
        self.dtype = _DTYPES[dtype]
        self.student = load_student(Path(model), self.device)
        self._elements = known_elements(self.student, "any_element=True", any_element)
        self.student.model.to(self.dtype)
        self.implemented_properties = ["energy", "free_energy"]
        if self.student.model.hyperparameters.get("regress_forces", True):
            self.implemented_properties.append("forces")
        self._told: set[str] = set()
        self._warn("elements", unlisted_elements_warning(self.student))

    def reference_energies(self) -> dict[str, float]:
        """Return energies of isolated atoms (eV), which total energies contain.

        A formation energy is the energy minus the sum of these over the atoms. Empty if
        the student's energies have no such references.
        """
        return reference_energies(self.student)

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
        energy, forces = predict(self.student, batch)
        self.results = {"energy": energy.item(), "free_energy": energy.item()}
        if forces is not None:
            self.results["forces"] = forces.double().cpu().numpy()

    def _batch(self, atoms: Atoms) -> Data:
        model = self.student.model
        structure = self._structure(atoms)
        edges = neighbor_edges(structure, model.graph_rule)
        if len(edges) == 0:
            raise DataError(
                f"No atom has a neighbour within {model.graph_rule.cutoff} Å, the "
                "cutoff of the student, so there is no interaction to calculate; "
                "check that positions are in Å."
            )
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
                "students are hardly trained on free atoms",
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

    def _warn(self, kind: str, text: str | None) -> None:
        if text is not None and kind not in self._told:
            self._told.add(kind)
            warnings.warn(f"{text[0].upper()}{text[1:]}.", stacklevel=2)
