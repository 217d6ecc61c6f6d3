"""A student in i-PI, as a driver in Python.

i-PI takes drivers from a file that it is given the path of. This file must not have
the name ``ipi.py``, since i-PI would then import it in place of itself.
"""

from pathlib import Path
from typing import Any

import ase
import ase.io
import numpy as np
import numpy.typing as npt

from kd_train.evaluation.potential import StudentPotential
from pipeline.errors import DataError, SpecError

try:
    from ipi.pes.dummy import Dummy_driver
    from ipi.utils.units import unit_to_internal, unit_to_user
except ImportError as error:
    raise ImportError(
        f"i-PI cannot be imported ({error}); install it with "
        "`pip install 'kd-train[ipi]'`, and do not name this file as its driver."
    ) from error

_Floats = npt.NDArray[np.float64]


class StudentDriver(Dummy_driver):
    """Driver of i-PI around a student.

    Parameters
    ----------
    model
        A run folder or a model file.
    template
        A file that ASE reads, with the atoms in the order of i-PI.
    pbc
        Whether the cell of i-PI is periodic (default: True, whatever the template is).
    any_element
        As in `StudentPotential`.
    verbose, verbosity
        As in every driver of i-PI; both are without effect.
    **options
        ``device``, ``dtype``, ``forces`` of `StudentPotential`.

    Raises
    ------
    SpecError
        The template cannot be read, or an option is impossible.
    DataError
        The student does not know an element, or ignores the periodic cell.
    """

    def __init__(
        self,
        model: str | Path,
        template: str | Path,
        pbc: bool | str = True,
        any_element: bool | str = False,
        verbose: bool = False,
        verbosity: object = None,
        **options: Any,
    ) -> None:
        super().__init__(verbose=verbose)
        try:
            atoms = ase.io.read(template, index=0)
            assert isinstance(atoms, ase.Atoms)
        except Exception as error:
            raise SpecError(
                f"The template {template} cannot be read ({error}); name a file that "
                "ase.io.read reads, such as the start structure."
            ) from error
        unknown = _flag(any_element, "any_element")
        self.potential = StudentPotential(model, any_element=unknown, **options)
        self.numbers = atoms.numbers
        self.pbc = np.full(3, _flag(pbc, "pbc"))
        self.potential.check_elements(self.numbers, f"The template {template}")
        self.potential.check_periodicity(self.pbc)

    def compute_structure(
        self, cell: _Floats, pos: _Floats
    ) -> tuple[_Floats, _Floats, _Floats, str]:
        """Return energy, forces (N, 3), virial (3, 3) and an empty text.

        All numbers are in atomic units; cell vectors of i-PI are columns.
        """
        if pos.shape != (len(self.numbers), 3):
            raise DataError(
                f"i-PI has {len(pos)} atoms, but the template has "
                f"{len(self.numbers)}; name the start structure as the template."
            )
        result = self.potential.evaluate(
            self.numbers,
            unit_to_user("length", "angstrom", pos),
            unit_to_user("length", "angstrom", cell.T),
            self.pbc,
        )
        energy = unit_to_internal("energy", "electronvolt", result.energy)
        forces = unit_to_internal("force", "ev/ang", result.forces)
        virial = unit_to_internal("energy", "electronvolt", result.virial.T)
        return np.asarray(energy, np.float64), forces, virial, ""


def _flag(value: bool | str, name: str) -> bool:
    """Return a value of ``<parameters>``, which may be text, as a flag."""
    text = str(value).strip().lower()
    if text not in ("true", "false"):
        raise SpecError(f"{name} is {value!r}; choose true or false.")
    return text == "true"
