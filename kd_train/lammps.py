"""A student in LAMMPS, through ``fix external`` of the caller's LAMMPS object.

Nothing of LAMMPS is imported here.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from ase.data import atomic_numbers

from kd_train.evaluation.potential import StudentPotential
from pipeline.errors import DataError, SpecError

# LAMMPS' own factor between its units metal (eV) and real (kcal/mol).
_UNITS = {"metal": 1.0, "real": 23.060549}
# Methods of a LAMMPS object that execute commands.
_COMMANDS = ("command", "commands_list", "commands_string", "file")
_Floats = npt.NDArray[np.float64]


def attach(
    lmp: Any,
    model: str | Path | StudentPotential,
    elements: Sequence[str],
    *,
    name: str = "kd",
    **options: Any,
) -> "Attachment":
    """Let the student ``model`` drive all atoms of the LAMMPS object ``lmp``.

    Call it after the box and the atoms exist. Energy, forces and virial are added to
    those of any pair style. If the student cannot evaluate a step, the command that
    runs ends, and its Python method raises the error.

    Parameters
    ----------
    lmp
        An object of ``lammps.lammps``, on one MPI rank, in units ``metal`` or ``real``.
    model
        A run folder, a model file, or a potential that is loaded already.
    elements
        The element of each atom type of LAMMPS, first type first.
    name
        Identifier of the fix in LAMMPS.
    **options
        ``device``, ``dtype``, ``any_element``, ``forces`` of `StudentPotential`.

    Raises
    ------
    SpecError
        The LAMMPS object or ``elements`` cannot be used.
    DataError
        The student does not know an element.
    CheckpointError
        There is no model, or its file is damaged.
    """
    numbers = _check(lmp, elements)
    if not isinstance(model, StudentPotential):
        model = StudentPotential(model, **options)
    elif options:
        raise SpecError(
            f"A potential that is loaded takes no options, but {sorted(options)} are "
            "set; set them in StudentPotential."
        )
    model.check_elements(numbers[1:], "The list of elements")
    model.check_periodicity(_box(lmp)[1])
    return Attachment(lmp, model, numbers, name)


class Attachment:
    """The link between a LAMMPS object and a student.

    ``error`` is the exception that ended a run, or None.
    """

    def __init__(
        self,
        lmp: Any,
        potential: StudentPotential,
        numbers: npt.NDArray[np.int64],
        name: str,
    ) -> None:
        self.potential = potential
        self.error: BaseException | None = None
        self._lmp, self._name = lmp, name
        self._numbers = numbers
        self._unit = _UNITS[lmp.extract_global("units")]
        self._failed = False
        self._command = lmp.command
        lmp.command(f"fix {name} all external pf/callback 1 1")
        lmp.set_fix_external_callback(name, self._callback, lmp)
        for method in _COMMANDS:
            setattr(lmp, method, self._raising(getattr(lmp, method)))

    def _raising(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a method of LAMMPS so that it raises what the callback could not."""

        @wraps(method)
        def run(*args: Any, **kwargs: Any) -> Any:
            self._failed = False
            try:
                return method(*args, **kwargs)
            finally:
                if self._failed and self.error is not None:
                    # Else LAMMPS would leave out later runs without a word.
                    self._command("timer timeout off")
                    raise self.error

        return run

    def _callback(
        self,
        lmp: Any,
        step: int,
        n_atoms: int,
        tags: npt.NDArray[np.int64],
        positions: _Floats,
        forces: _Floats,
    ) -> None:
        """Fill ``forces`` (N, 3) in place; LAMMPS calls it in every step.

        ctypes would print an exception, and LAMMPS would run on with old forces.
        """
        try:
            if self.error is None:
                self._evaluate(n_atoms, tags, positions, forces)
        except BaseException as error:
            self.error = error
        if self.error is not None:
            self._failed = True
            forces[:] = 0.0
            lmp.fix_external_set_energy_global(self._name, float("nan"))
            # This run ends after the step, and so do later ones of the same script.
            lmp.force_timeout()

    def _evaluate(
        self,
        n_atoms: int,
        tags: npt.NDArray[np.int64],
        positions: _Floats,
        forces: _Floats,
    ) -> None:
        lmp, unit = self._lmp, self._unit
        expected = int(lmp.get_natoms())
        if n_atoms != expected:
            raise DataError(
                f"LAMMPS lost {expected - n_atoms} of {expected} atoms; use a smaller "
                "time step, a relaxed start or periodic boundaries."
            )
        # LAMMPS sorts atoms during a run, but edges depend on their order.
        order = np.argsort(tags[:n_atoms], kind="stable")
        types = lmp.numpy.extract_atom("type")[:n_atoms][order]
        cell, pbc = _box(lmp)
        result = self.potential.evaluate(
            self._numbers[types], positions[:n_atoms][order], cell, pbc
        )
        forces[order] = result.forces * unit
        lmp.fix_external_set_energy_global(self._name, result.energy * unit)
        w = result.virial * unit
        virial = [w[0, 0], w[1, 1], w[2, 2], w[0, 1], w[0, 2], w[1, 2]]
        lmp.fix_external_set_virial_global(self._name, virial)


def _box(lmp: Any) -> tuple[_Floats, npt.NDArray[np.bool_]]:
    """Cell (3, 3) in Å with vectors as rows, and periodic directions (3,)."""
    low, high, xy, yz, xz, periodic, _ = lmp.extract_box()
    cell = np.diag(np.subtract(high, low))
    cell[1, 0], cell[2, 0], cell[2, 1] = xy, xz, yz
    return cell, np.array(periodic, bool)


def _check(lmp: Any, elements: Sequence[str]) -> npt.NDArray[np.int64]:
    """Return the atomic number of each type, after a 0, if ``lmp`` can be used."""
    ranks = int(lmp.extract_setting("world_size"))
    if ranks > 1:
        raise SpecError(
            f"LAMMPS runs on {ranks} MPI ranks, but a student needs all atoms on one; "
            "start it without mpirun and use a GPU or threads of torch."
        )
    units = lmp.extract_global("units")
    if units not in _UNITS:
        raise SpecError(
            f"LAMMPS has units {units}; choose `units metal` or `units real`."
        )
    if not int(lmp.extract_setting("box_exist")):
        raise SpecError(
            "LAMMPS has no box yet; call attach after `read_data` or `create_box`."
        )
    unknown = [symbol for symbol in elements if symbol not in atomic_numbers]
    if isinstance(elements, str) or unknown:
        raise SpecError(
            f"elements is {elements!r}; it must be a list of symbols such as "
            "['H', 'O'], one for each atom type."
        )
    n_types = int(lmp.extract_setting("ntypes"))
    if len(elements) != n_types:
        raise SpecError(
            f"elements has {len(elements)} symbols, but LAMMPS has {n_types} atom "
            "types; name one symbol for each type, first type first."
        )
    return np.array([0, *(atomic_numbers[symbol] for symbol in elements)])
