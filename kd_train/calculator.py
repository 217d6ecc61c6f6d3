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

from kd_train.evaluation.trained import load_student, predict, without_reference
from pipeline.commands import chosen_device
from pipeline.datasets.samples import Fields, checked_sample
from pipeline.errors import DataError, SpecError
from pipeline.graphs.batch import collate
from pipeline.graphs.neighbors import neighbor_edges
from pipeline.models.elements import check_elements
from pipeline.structure import Structure

_DTYPES = {"float32": torch.float32, "float64": torch.float64}


class StudentCalculator(Calculator):
    """Energy (eV) and forces (eV/Å) of a student for ``atoms.calc``.

    Graphs are those of training, so that results are those of ``kd-eval``. There is no
    stress. ``free_energy`` is the energy.

    Parameters
    ----------
    model
        A run folder, its ``student.safetensors``, or any model file of ours.
    device
        ``cpu``, ``cuda``, ``cuda:1``; without, a GPU if there is one.
    dtype
        ``float64`` for finite differences and phonons; training had ``float32``.
    any_element
        Accept elements that the network can embed but that no training label held.

    Raises
    ------
    CheckpointError
        There is no model, or its file is damaged.
    SpecError
        ``device`` or ``dtype`` cannot be used.
    DataError
        From calculations: an element is unknown, no atom has a neighbour, or the cell
        is impossible.
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
        self.device = chosen_device(device)
        self.dtype = _DTYPES[dtype]
        self.any_element = any_element
        self.student = load_student(Path(model), self.device)
        self.student.model.to(self.dtype)
        self.implemented_properties = ["energy", "free_energy"]
        if self.student.model.hyperparameters.get("regress_forces", True):
            self.implemented_properties.append("forces")
        self._warned = False

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = tuple(all_changes),
    ) -> None:
        """Fill ``results`` for ``atoms``; constraints are the business of ASE."""
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
                "cutoff of the student, so there is nothing to calculate; check that "
                "positions are in Å."
            )
        lone = np.setdiff1d(np.arange(len(atoms)), edges.edge_index[1])
        if len(lone) and not self._warned:
            self._warned = True
            warnings.warn(
                f"Atom {lone[0]} ({chemical_symbols[atoms.numbers[lone[0]]]}) has no "
                f"neighbour within {model.graph_rule.cutoff} Å; students have hardly "
                "seen free atoms.",
                stacklevel=2,
            )
        return collate([structure], [edges], self.dtype).to(self.device)

    def _structure(self, atoms: Atoms) -> Structure:
        """``atoms`` as stage one would read them from a file."""
        check_elements(atoms.numbers, self.student.model.elements)
        new = without_reference(self.student.normalizer, set(atoms.numbers.tolist()))
        if new and not self.any_element:
            symbols = ", ".join(chemical_symbols[z] for z in new)
            raise DataError(
                f"The labels that the student was trained on held no {symbols}, so its "
                "energies would mean nothing; train on such samples, or set "
                "any_element=True."
            )
        fields = Fields(
            atoms.numbers,
            atoms.positions,
            atoms.cell.array,
            atoms.pbc,
            tags=atoms.arrays.get("tags"),
        )
        return checked_sample("", fields, "The Atoms object").structure
