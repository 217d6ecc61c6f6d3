"""A finished student as a file of metatomic, which several MD programs read.

PaiNN and SchNet without a limit of neighbours, as TorchScript. The file gives energies
of atoms, and programs differentiate them.
"""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from kd_train.evaluation.load_student import load_student, student_file
from pipeline.errors import CheckpointError, SpecError
from pipeline.models.checkpoint import LoadedModel
from pipeline.parallel.device_choice import choose_device

EXPORTABLE = ("painn", "schnet")
DTYPES = ("float32", "float64")


def export_metatomic(
    place: Path, path: Path, *, device: str = "cpu", dtype: str = "float64"
) -> dict[str, float]:
    """Write the student at ``place`` to ``path`` (.pt) and return its deviations.

    The file runs on ``device`` in ``dtype``, without this package. Forces of programs
    are gradients of the energy; a force head is left out. Returns the largest
    deviations from the student of energies (eV) and forces (eV/Å), on structures of
    other sizes than the recorded ones.

    A new process writes the file: metatensor cannot be imported after torch_geometric,
    which changes a function of torch.

    Raises
    ------
    SpecError
        ``dtype`` is unknown, or metatomic is not installed.
    CheckpointError
        The student cannot be exported, or the file computes something else.
    """
    if dtype not in DTYPES:
        raise SpecError(f"dtype is {dtype!r}; choose one of {', '.join(DTYPES)}.")
    if find_spec("metatomic") is None or find_spec("metatensor") is None:
        raise SpecError(
            "metatomic-torch is not installed; install it with "
            "`pip install 'kd-train[metatomic]'`."
        )
    _check(load_student(place, choose_device(device)))
    command = [
        *(sys.executable, "-m", "kd_train.evaluation.metatomic_program"),
        *(str(student_file(place)), str(path), device, dtype),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    last = (done.stdout or done.stderr or "no message").strip().splitlines()[-1]
    if done.returncode:
        raise CheckpointError(
            f"{path} was not written; metatomic's export ended: {last}"
        )
    worst: dict[str, float] = json.loads(last)
    return worst


def _check(student: LoadedModel) -> None:
    """Refuse students that have no energies of atoms from their neighbours alone."""
    if student.name not in EXPORTABLE:
        raise CheckpointError(
            f"A {student.name} cannot be exported to metatomic; export "
            f"{' or '.join(EXPORTABLE)}, or use LAMMPS and OpenMM of kd_train."
        )
    limit = student.model.graph_rule.max_neighbors
    if limit is not None:
        raise CheckpointError(
            f"The student sees at most {limit} neighbours of an atom, which metatomic "
            "cannot express; train one with max_neighbors: null, such as a -md preset."
        )
    if student.model.hyperparameters.get("readout") == "mean":
        raise CheckpointError(
            "The student's energy is a mean over atoms (readout: mean), but metatomic "
            "sums energies of atoms; train one with readout: add."
        )
