"""Everything that ``kd-eval --dynamics`` does, from its file to its results."""

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from tqdm import tqdm

from kd_train.dynamics.checks import attach
from kd_train.dynamics.measure import Potential, measure
from kd_train.dynamics.plots import plot_files
from kd_train.dynamics.rdf import (
    Distribution,
    check_comparable,
    radial_distribution,
)
from kd_train.dynamics.results import Results
from kd_train.dynamics.spec import DynamicsSpec
from kd_train.dynamics.structures import read_start, read_trajectory, to_structure
from kd_train.evaluation.calculator import StudentCalculator
from kd_train.evaluation.load_student import known_elements
from pipeline.errors import DataError, DeviceError, PipelineError, SpecError
from pipeline.files.atomic import write_atomically
from pipeline.models.elements import check_elements
from pipeline.spec.sections import MIN_PAIR_DISTANCE

log = logging.getLogger("kd_train")
RESULTS = "dynamics.json"
_REPLICAS = "replicas"


def run_dynamics(
    run: Path,
    spec: DynamicsSpec,
    out: Path,
    device: str | None = None,
    any_element: bool = False,
) -> Results:
    """Measure the student of ``run`` and write results and plots to ``out``.

    Raises
    ------
    CheckpointError
        There is no model, or its file is damaged.
    SpecError
        A model predicts no forces.
    DataError
        A file cannot be read, atoms are too close, or a model refuses the structure.
    """
    path = Path(spec.structure)
    start = read_start(path, spec.index, spec.failure.close or MIN_PAIR_DISTANCE)
    with warnings_logged():
        student = load_potential("student", run, spec, device, any_element)
        check_start(student, start, path, any_element)
        reference = _trajectory_rdf(spec, start)
        potentials = [student]
        if spec.reference is not None and spec.reference.teacher is not None:
            model = Path(spec.reference.teacher)
            teacher = load_potential("teacher", model, spec, device, any_element)
            check_start(teacher, start, path, any_element)
            potentials.append(teacher)
        results = measure_all(run, spec, start, potentials, reference, out)
    write_results(results, out)
    return results


def measure_all(
    run: Path,
    spec: DynamicsSpec,
    start: Atoms,
    potentials: list[Potential],
    reference: Distribution | None,
    out: Path,
) -> Results:
    """Measure the student and, if there is a second potential, the teacher.

    Each replica is kept in ``out/replicas``, which loses those of an earlier call.
    """
    _remove_earlier(out)
    steps = spec.replicas * (spec.equilibration + spec.n_steps)
    with tqdm(
        None, "dynamics", steps * len(potentials), unit="step", disable=None
    ) as bar:
        try:
            measured = [
                measure(potential, start, spec, out / _REPLICAS, bar.update)
                for potential in potentials
            ]
        except torch.OutOfMemoryError:
            raise DeviceError(
                f"{len(start)} atoms do not fit into the memory of the device; "
                "choose a smaller structure or --device cpu."
            ) from None
    teacher = measured[1] if len(measured) > 1 else None
    if teacher is not None:
        reference = teacher.rdf
    return Results(run, spec, measured[0], teacher, reference)


def write_results(results: Results, out: Path) -> None:
    """Write ``dynamics.json`` and the plots; without matplotlib there is a warning."""
    content = json.dumps(results.to_dict(), indent=2, ensure_ascii=False)
    write_atomically(out / RESULTS, content.encode())
    try:
        files = plot_files(results)
    except PipelineError as error:
        log.warning("%s", str(error).rstrip("."))
        return
    for name, content_of_file in files.items():
        write_atomically(out / name, content_of_file)


def load_potential(
    name: str, model: Path, spec: DynamicsSpec, device: str | None, any_element: bool
) -> Potential:
    """Load a model twice: in double precision for checks, and as it runs.

    Raises
    ------
    CheckpointError
        There is no model, or its file is damaged.
    SpecError
        The model predicts no forces.
    """
    forces = spec.forces if name == "student" else "model"
    exact, running = (
        StudentCalculator(
            model, device=device, dtype=dtype, forces=forces, any_element=any_element
        )
        for dtype in ("float64", spec.dtype)
    )
    if "forces" not in exact.implemented_properties:
        raise SpecError(f"{model} predicts no forces, so it cannot run dynamics.")
    return Potential(name, exact, running)


def check_start(
    potential: Potential, start: Atoms, path: Path, any_element: bool
) -> None:
    """Refuse a structure that the model cannot calculate.

    Raises
    ------
    DataError
        An element is unknown, the model refuses the structure, or its energy or forces
        are not finite.
    """
    calculator: Any = potential.exact
    elements = known_elements(calculator.student, "--any-element", any_element)
    check_elements(to_structure(start).atomic_numbers, elements, noun=str(path))
    atoms = attach(start, calculator)
    try:
        found = [atoms.get_potential_energy(), *atoms.get_forces().ravel()]
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    if not np.isfinite(found).all():
        raise DataError(
            f"{path}: energy or forces of the {potential.name} are not finite; "
            "evaluate it with --data first."
        )


def _trajectory_rdf(spec: DynamicsSpec, start: Atoms) -> Distribution | None:
    if spec.reference is None or spec.reference.trajectory is None:
        return None
    path = Path(spec.reference.trajectory)
    frames = read_trajectory(path)
    own = to_structure(start)
    for k, frame in enumerate(frames):
        check_comparable(own, frame, f"{path}: frame {k}")
    return radial_distribution(frames, spec.rdf.r_max, spec.rdf.bins)


def _remove_earlier(out: Path) -> None:
    """Remove results of an earlier call, so that none is taken for a new one."""
    earlier = [
        path
        for name in ("student", "teacher")
        for suffix in ("npz", "extxyz")
        for path in (out / _REPLICAS).glob(f"{name}-*.{suffix}")
    ]
    earlier += [path for path in [out / RESULTS] if path.exists()]
    if earlier:
        log.warning("%s: results of an earlier call are replaced", out)
    for path in earlier:
        path.unlink()


@contextmanager
def warnings_logged() -> Iterator[None]:
    """Log warnings of calculators as other warnings of a command."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        log.warning("%s", str(message).rstrip("."))

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show
        yield
