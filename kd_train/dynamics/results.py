"""Results of ``kd-eval --dynamics``: verdicts, table, and ``dynamics.json``."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kd_train.dynamics.measure import Measured, describe_replica
from kd_train.dynamics.rdf import Distribution
from kd_train.dynamics.spec import METRICS, DynamicsSpec

_MISSING = "–"


@dataclass(frozen=True)
class Results:
    """Measurements of a student, of its teacher if it ran, and the reference RDF."""

    run: Path
    spec: DynamicsSpec
    student: Measured
    teacher: Measured | None
    reference_rdf: Distribution | None

    @property
    def rdf_difference(self) -> float | None:
        """Mean absolute difference of the radial distributions; None without both."""
        if self.student.rdf is None or self.reference_rdf is None:
            return None
        return self.student.rdf.difference(self.reference_rdf)

    def student_metrics(self) -> dict[str, float | None]:
        """Return all metrics of the student by name."""
        found = self.student.metrics(self._nve)
        found["rdf_difference"] = self.rdf_difference
        return {name: found[name] for name in METRICS}

    def faults(self) -> list[str]:
        """Return a sentence for each threshold that the student exceeds."""
        found = self.student_metrics()
        limits = self.spec.thresholds.model_dump()
        return [
            sentence
            for name, value in found.items()
            if (sentence := _judge(name, value, limits[name])) is not None
        ]

    def to_text(self) -> str:
        """Return the table, failures of replicas, and the faults."""
        rows = [["", *(m.name for m in self._measured), "threshold"]]
        rows += self._metric_rows()
        for title, values in (
            ("earliest failure [ps]", [m.earliest_failure for m in self._measured]),
            ("simulated time in a day [ns]", [m.ns_per_day for m in self._measured]),
        ):
            rows.append([title, *map(_number, values), ""])
        lines = [self._title(), "", *_align(rows)]
        failures = [line for m in self._measured for line in _failures(m)]
        for part in (failures, self.faults()):
            if part:
                lines += ["", *part]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for ``dynamics.json``."""
        return {
            "model": str(self.run),
            "spec": self.spec.model_dump(),
            "formula": self.student.atoms.get_chemical_formula(),
            "atoms": len(self.student.atoms),
            "student": self._describe(self.student, self.student_metrics()),
            "teacher": None
            if self.teacher is None
            else self._describe(self.teacher, self.teacher.metrics(self._nve)),
            "rdf": self._rdf(),
            "exceeded": self.faults(),
        }

    @property
    def _nve(self) -> bool:
        return self.spec.ensemble == "nve"

    @property
    def _measured(self) -> Sequence[Measured]:
        return [m for m in (self.student, self.teacher) if m is not None]

    def _describe(
        self, measured: Measured, metrics: dict[str, float | None]
    ) -> dict[str, Any]:
        nve = self._nve
        n_atoms = len(measured.atoms)
        return {
            "metrics": _plain(metrics),
            "cell_errors": _plain(measured.cell_errors),
            "earliest_failure": measured.earliest_failure,
            "ns_per_day": measured.ns_per_day,
            "replicas": [describe_replica(r, n_atoms, nve) for r in measured.replicas],
        }

    def _rdf(self) -> dict[str, Any]:
        def values(rdf: Distribution | None) -> list[float] | None:
            return None if rdf is None else rdf.values.tolist()

        own = self.student.rdf
        return {
            "r": None if own is None else own.r.tolist(),
            "kind": None if own is None else ("g" if own.is_g else "distances"),
            "student": values(own),
            "reference": values(self.reference_rdf),
        }

    def _title(self) -> str:
        spec, atoms = self.spec, self.student.atoms
        return (
            f"{self.run}: {atoms.get_chemical_formula()}, {len(atoms)} atoms, "
            f"{spec.ensemble} from {spec.temperature:g} K, {spec.replicas} replicas of "
            f"{spec.n_steps} steps of {spec.timestep:g} fs"
        )

    def _metric_rows(self) -> Iterator[list[str]]:
        limits = self.spec.thresholds.model_dump()
        columns = [self.student_metrics()]
        if self.teacher is not None:
            columns.append(self.teacher.metrics(self._nve))
        for name, (title, unit) in METRICS.items():
            values = [_number(column.get(name)) for column in columns]
            limit = "" if limits[name] is None else f"{limits[name]:g}"
            yield [f"{title} [{unit}]" if unit else title, *values, limit]


def _judge(name: str, value: float | None, limit: float | None) -> str | None:
    """Return what is wrong with ``value`` of a metric, or None."""
    title, unit = METRICS[name]
    if limit is None:
        return None
    if value is None:
        return f"Threshold {name}: there is no {title}, because no replica got so far."
    if value <= limit:
        return None
    shown = f"{_number(value)} {unit}".rstrip()
    return f"Threshold {name}: the {title} is {shown}, more than {limit:g}."


def _failures(measured: Measured) -> list[str]:
    return [
        f"Failed: {measured.name}, replica {replica.number}, after "
        f"{replica.failed_after:.4g} ps: {replica.reason}."
        for replica in measured.failed
    ]


def _plain(metrics: Mapping[str, float | None]) -> dict[str, float | None]:
    """Return ``metrics`` with null for infinity, which JSON does not have."""
    return {
        name: value if value is not None and np.isfinite(value) else None
        for name, value in metrics.items()
    }


def _number(value: float | None) -> str:
    return _MISSING if value is None else f"{value:.3g}"


def _align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table: the first column to the left, the others to the right."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if k == 0 else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
