"""The teacher of generated structures; it counts its passes."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.structure import Sample, Structure
from pipeline.teachers.potential import SampleGraph
from pipeline.teachers.runner import TeacherRunner


class Label(NamedTuple):
    """The teacher's ``energy`` in eV and ``forces`` (N, 3) float32 in eV/Å."""

    energy: float
    forces: npt.NDArray[np.float32]


class CountedTeacher:
    """A teacher that labels structures; ``passes`` counts them."""

    def __init__(self, runner: TeacherRunner) -> None:
        self.runner = runner
        self.passes = 0

    def label(self, samples: Sequence[Sample]) -> list[Label]:
        """Return energy and forces of every sample."""
        if not samples:
            return []
        self.passes += len(samples)
        found = self.runner.predict(samples, ())
        ends = np.cumsum([len(sample.structure) for sample in samples])[:-1]
        forces = np.split(found["teacher_forces"], ends)
        return [
            Label(float(energy), part)
            for energy, part in zip(found["teacher_energy"], forces, strict=True)
        ]

    def label_structure(self, name: str, structure: Structure) -> Label:
        """Return energy and forces of one structure under the id ``name``."""
        return self.label([Sample.without_labels(name, structure)])[0]

    def forces_of_graphs(
        self, graphs: Iterable[tuple[Sample, SampleGraph]]
    ) -> npt.NDArray[np.float32]:
        """Return the forces on all atoms of ``graphs``, (ΣN, 3) in eV/Å."""

        def counted() -> Iterable[tuple[Sample, SampleGraph]]:
            for pair in graphs:
                self.passes += 1
                yield pair

        forces: npt.NDArray[np.float32] = self.runner.predict_graphs(counted(), ())[
            "teacher_forces"
        ]
        return forces
