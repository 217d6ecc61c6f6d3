"""Columns of the teacher's force Jacobian, by central differences of its forces."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pipeline.spec.sections import DEFAULT_COLUMNS, DEFAULT_STEP, FeatureSpec
from pipeline.structure import Sample, Structure
from pipeline.teachers.potential import Potential, SampleGraph

if TYPE_CHECKING:
    from pipeline.teachers.runner import TeacherRunner

COLUMN_FIELD = "force_jacobian_column"
NO_COLUMN = -1

Columns = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ColumnSpec:
    """The ``count`` of columns of a structure, and the ``step`` of differences in Å."""

    count: int = DEFAULT_COLUMNS
    step: float = DEFAULT_STEP

    @classmethod
    def of(cls, features: Mapping[str, FeatureSpec]) -> "ColumnSpec":
        """Return what the ``features`` of a spec ask for."""
        wanted = features.get("force_jacobian", FeatureSpec())
        return cls(wanted.columns or DEFAULT_COLUMNS, wanted.step or DEFAULT_STEP)


DEFAULT = ColumnSpec()


def choose_columns(sample: Sample, count: int) -> Columns:
    """Draw ``count`` coordinates of free atoms without repetition, by the sample's id.

    A coordinate is ``3 * atom + axis``. Fewer columns are the first of more columns.
    Structures with fewer free coordinates have NO_COLUMN for the missing columns.
    """
    free = np.flatnonzero(np.repeat(~sample.structure.fixed, 3))
    digest = hashlib.blake2b(b"column " + sample.sample_id.encode(), digest_size=32)
    random = np.random.RandomState(np.frombuffer(digest.digest(), "<u4"))
    chosen = random.permutation(free)[:count]
    missing = np.full(count - len(chosen), NO_COLUMN)
    return np.concatenate((chosen, missing)).astype(np.int32)


def displaced_graphs(
    potential: Potential,
    sample: Sample,
    graph: SampleGraph,
    columns: Iterable[int],
    step: float,
) -> Iterator[tuple[Sample, SampleGraph]]:
    """Yield for every column the graph with +``step`` and that with -``step``.

    All have the edges of the undisplaced structure, because a limit of neighbours makes
    forces jump if the edges change.
    """
    for column in columns:
        for sign in (1, -1):
            positions = graph.structure.positions.copy()
            positions.reshape(-1)[column] += sign * step
            yield sample, potential.with_positions(graph, positions)


def difference_quotients(forces: Floats, structure: Structure, step: float) -> Floats:
    """Return ∂F/∂x of every column, (columns, N, 3) in eV/Å².

    ``forces`` (2 * columns * N, 3) are those of the graphs of `displaced_graphs`.
    """
    pairs = forces.astype(np.float64).reshape(-1, 2, len(structure), 3)
    difference: Floats = (pairs[:, 0] - pairs[:, 1]) / (2 * step)
    return difference


def force_jacobian(
    teacher: "TeacherRunner", samples: Sequence[Sample]
) -> dict[str, npt.NDArray[Any]]:
    """Return ``force_jacobian`` and ``force_jacobian_column`` of ``samples``.

    ``force_jacobian`` (ΣN, k, 3) float32 in eV/Å²: entry [j, c] is the change of the
    force on atom j per Å of coordinate ``force_jacobian_column[c]``. It is a column of
    ∂F/∂x. Rows of ∂F/∂x differ from columns if forces are no gradient.

    Raises
    ------
    DataError
        A sample cannot be computed.
    """
    spec, potential = teacher.columns, teacher.potential
    columns = np.stack([choose_columns(sample, spec.count) for sample in samples])
    present = [row[row != NO_COLUMN] for row in columns]

    def graphs() -> Iterator[tuple[Sample, SampleGraph]]:
        for sample, chosen in zip(samples, present, strict=True):
            if len(chosen):
                graph = potential.graph(sample)
                yield from displaced_graphs(
                    potential, sample, graph, chosen.tolist(), spec.step
                )

    rows = [
        2 * len(chosen) * len(s.structure)
        for s, chosen in zip(samples, present, strict=True)
    ]
    forces = np.zeros((0, 3))
    if any(rows):
        forces = teacher.predict_graphs(graphs(), ())["teacher_forces"]
    parts = np.split(forces, np.cumsum(rows)[:-1])
    found = []
    for sample, part in zip(samples, parts, strict=True):
        quotients = difference_quotients(part, sample.structure, spec.step)
        jacobian = np.zeros((len(sample.structure), spec.count, 3), np.float32)
        jacobian[:, : len(quotients)] = quotients.swapaxes(0, 1)
        found.append(jacobian)
    return {"force_jacobian": np.concatenate(found), COLUMN_FIELD: columns}
