"""A trained potential in, named fields in eV and Å out; knows nothing of the store."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from pipeline.errors import DataError, SpecError
from pipeline.fields import (
    EDGE_IDENTITY_FIELDS,
    FIELDS,
    PREDICTION_FIELDS,
    TEACHER_VIRIAL,
)
from pipeline.graphs.neighbors import NeighborSpec, neighbor_edges
from pipeline.parallel.devices import is_out_of_memory, run_halving_on_oom
from pipeline.spec.sections import TeacherSpec
from pipeline.structure import Sample, Structure
from pipeline.teachers.jacobian import COLUMN_FIELD, DEFAULT, ColumnSpec, force_jacobian
from pipeline.teachers.potential import FieldInfo, Potential, SampleGraph, check_sample
from pipeline.teachers.registry import load_potential

log = logging.getLogger("pipeline.teachers.runner")
Arrays = dict[str, npt.NDArray[Any]]
# What a potential gives without being asked for it.
_UNASKED = (*PREDICTION_FIELDS, TEACHER_VIRIAL, *EDGE_IDENTITY_FIELDS)
# What is not rounded to single precision.
_OF_SAMPLES = ("teacher_energy", TEACHER_VIRIAL)
Item = TypeVar("Item")


@dataclass(frozen=True)
class TeacherRunner:
    """A potential on a device, with what it takes to run it over a dataset.

    ``layers`` names the layer of every field that is not taken from the default one,
    ``columns`` the columns of ``force_jacobian``.
    """

    potential: Potential
    spec: TeacherSpec
    device: torch.device
    layers: Mapping[str, str] = field(default_factory=dict)
    columns: ColumnSpec = DEFAULT

    @classmethod
    def load(
        cls,
        spec: TeacherSpec,
        device: str = "cpu",
        layers: Mapping[str, str] | None = None,
        columns: ColumnSpec = DEFAULT,
    ) -> "TeacherRunner":
        """The teacher of a resolved spec, ready to predict.

        Raises
        ------
        CheckpointError
            The file is not what the spec says, or lacks scale factors.
        SpecError
            There is no such teacher here, or the model has no such layer for a field.
        """
        potential = load_potential(spec)
        potential.to(torch.device(device))
        place = torch.device(device)
        teacher = cls(potential, spec, place, dict(layers or {}), columns)
        teacher._check_layers()
        teacher._check_precision()
        return teacher

    @property
    def widths(self) -> dict[str, int]:
        """Width of every field this teacher can give; 0 for fields without channels."""
        available_fields = self.potential.available_fields
        default = {
            n: o.width for n, o in available_fields.items() if o.width is not None
        }
        chosen = {
            n: available_fields[n].layers[layer] for n, layer in self.layers.items()
        }
        return default | chosen

    @property
    def stored_widths(self) -> dict[str, int]:
        """Width of every field that a spec may ask for, and of its companions."""
        columns = dict.fromkeys(("force_jacobian", COLUMN_FIELD), self.columns.count)
        return self.widths | columns

    @property
    def virial_fields(self) -> tuple[str, ...]:
        """The field of virials if this teacher has them, to be asked for in a pass."""
        return (TEACHER_VIRIAL,) if self.potential.has_virial else ()

    def check_fields(self, names: Sequence[str]) -> None:
        """Raise SpecError when a field of the spec is none of this teacher's."""
        for name in names:
            if name not in self.stored_widths:
                raise SpecError(
                    f"features: teacher {self.spec.model!r} has no {name!r}; it offers "
                    f"{', '.join(self._offered())}{self._elsewhere(name)}."
                )

    def _offered(self) -> list[str]:
        return sorted(self.stored_widths.keys() - {COLUMN_FIELD})

    def _elsewhere(self, name: str) -> str:
        """Say at which layers a field exists that the default layer lacks."""
        layers = self._list_layers(name)
        return f", and {name} with layer: {' | '.join(layers)}" if layers else ""

    def _list_layers(self, name: str) -> tuple[str, ...]:
        return tuple(
            self.potential.available_fields.get(name, FieldInfo(name, None)).layers
        )

    def _check_layers(self) -> None:
        for name, layer in self.layers.items():
            offered = self._list_layers(name)
            if layer not in offered:
                raise SpecError(
                    f"features.{name}.layer is {layer!r}; teacher {self.spec.model!r} "
                    f"offers {', '.join(offered) or 'no other layer'} for it."
                )

    def _check_precision(self) -> None:
        precision, offered = self.spec.precision, self.potential.precisions
        if precision not in offered:
            raise SpecError(
                f"teacher.precision is {precision}; teacher {self.spec.model!r} runs "
                f"in {', '.join(offered)}."
            )
        if precision == "tf32" and self.device.type != "cuda":
            log.warning(
                "teacher.precision: tf32 changes nothing on %s", self.device.type
            )

    @property
    def identity(self) -> dict[str, Any]:
        """Everything about the teacher that decides its numbers; JSON-able."""
        return {
            **self.potential.identity,
            "model": self.spec.model,
            "precision": self.spec.precision,
            "layers": dict(self.layers),
            "batch_atoms": self.spec.batch_atoms,
            "max_batch_gib": self.spec.max_batch_gib,
            "graph_rule": self.potential.graph_rule.to_dict(),
            "normalizer": self.potential.normalizer.to_dict(),
        }

    @property
    def count_edges(self) -> Callable[[Structure], int]:
        """Counts the edges that ``edge_features`` of a structure will have.

        Knows the graph rule alone, so that it can be sent to other processes.
        """
        return partial(_count_edges, self.potential.graph_rule)

    def predict(self, samples: Sequence[Sample], fields: Sequence[str]) -> Arrays:
        """Energies, forces and ``fields`` of ``samples``, in their order.

        Node fields come concatenated over samples, (ΣN, ...); ``teacher_energy`` is
        (len(samples),) float64 in eV, ``teacher_forces`` (ΣN, 3) in eV/Å. Of teachers
        with virials, ``teacher_virial`` (len(samples), 3, 3) in eV may be asked for.
        ``edge_features`` (ΣE, C) bring ``edge_index`` (ΣE, 2) and ``cell_offsets``
        (ΣE, 3), edges sorted by (target, source, shift) within each sample.

        Raises
        ------
        DataError
            A sample has an element the model does not know, no neighbours, or does not
            fit into memory alone. Where several do not fit together, they are passed in
            parts, which may change the last bits of their numbers.
        """
        derived = "force_jacobian" in fields
        direct = [name for name in fields if name != "force_jacobian"]
        arrays = self.predict_graphs(map(self._make_graph, samples), direct)
        return arrays | force_jacobian(self, samples) if derived else arrays

    def predict_graphs(
        self, graphs: Iterable[tuple[Sample, SampleGraph]], fields: Sequence[str]
    ) -> Arrays:
        """Return the same for graphs that exist, such as those of displaced atoms.

        Graphs of the next batch are made while the network works on this batch.
        """
        names = (*PREDICTION_FIELDS, *fields)
        if "edge_features" in fields:
            names += EDGE_IDENTITY_FIELDS
        parts: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in names}
        for group in _prefetch_one(self._groups(graphs)):
            for arrays in run_halving_on_oom(
                lambda some: self._predict_some(some, names), group
            ):
                for name, values in arrays.items():
                    parts[name].append(values)
        return {name: np.concatenate(pieces) for name, pieces in parts.items()}

    def precision_error(
        self, samples: Sequence[Sample], fields: Sequence[str]
    ) -> dict[str, float]:
        """Error of reduced precision, by field: RMS of the difference to float32.

        Features, relative to the RMS of the field; energies in eV, forces in eV/Å.
        """
        exact = replace(
            self, spec=self.spec.model_copy(update={"precision": "float32"})
        )
        wanted, found = exact.predict(samples, fields), self.predict(samples, fields)
        errors = {}
        for name in (*PREDICTION_FIELDS, *fields):
            difference = _rms(found[name].astype(np.float64) - wanted[name])
            absolute = name in PREDICTION_FIELDS
            scale = 1.0 if absolute else _rms(wanted[name].astype(np.float64))
            errors[name] = difference / scale if scale else 0.0
        return errors

    def _make_graph(self, sample: Sample) -> tuple[Sample, SampleGraph]:
        # Potentials may make their graphs in another way than ours.
        check_sample(sample, self.potential.elements, self.potential.graph_rule)
        return sample, self.potential.graph(sample)

    def _groups(
        self, graphs: Iterable[tuple[Sample, SampleGraph]]
    ) -> Iterator[list[tuple[Sample, SampleGraph]]]:
        """Yield consecutive graphs, as many as one forward pass takes."""
        group: list[tuple[Sample, SampleGraph]] = []
        atoms = size = 0
        for sample, graph in graphs:
            need = self.potential.estimate_memory(graph)
            many = atoms + len(graph.structure) > self.spec.batch_atoms
            if group and (many or size + need > self.spec.max_batch_gib * 2**30):
                yield group
                group, atoms, size = [], 0, 0
            group.append((sample, graph))
            atoms += len(graph.structure)
            size += need
        if group:
            yield group

    def _predict_some(
        self, named: Sequence[tuple[Sample, SampleGraph]], names: Sequence[str]
    ) -> Arrays:
        try:
            return self._predict_group([graph for _, graph in named], names)
        except Exception as error:
            if len(named) > 1 or not is_out_of_memory(error):
                raise
            sample = named[0][0]
            raise DataError(
                f"Sample {sample.sample_id!r} of {len(sample.structure)} atoms does "
                f"not fit into the memory of {self.device}; use a device with more "
                "memory, or remove the sample."
            ) from None

    def _predict_group(
        self, group: Sequence[SampleGraph], names: Sequence[str]
    ) -> Arrays:
        layers = {name: self.layers[name] for name in names if name in self.layers}
        wanted = [name for name in names if name not in _UNASKED]
        with torch.no_grad(), _set_precision(self.spec.precision, self.device):
            values = self.potential.forward(group, wanted, layers)
        identity = {
            "edge_index": np.concatenate([g.edges.edge_index.T for g in group]),
            "cell_offsets": np.concatenate([g.edges.cell_offsets for g in group]),
        }
        arrays: Arrays = {}
        for name in names:
            if name in identity:
                arrays[name] = identity[name]  # the writer checks that they fit
                continue
            single = values[name] if name in _OF_SAMPLES else values[name].float()
            arrays[name] = single.detach().cpu().numpy()
        return arrays


def _count_edges(rule: NeighborSpec, structure: Structure) -> int:
    return len(neighbor_edges(structure, rule))


def width_shape(name: str, width: int) -> tuple[int, ...]:
    """Trailing shape of field ``name`` for a teacher ``width`` channels wide."""
    return tuple(width if size is None else size for size in FIELDS[name].shape)


def _set_precision(
    precision: str, device: torch.device
) -> AbstractContextManager[object]:
    """Context in which matrix products have a reduced precision."""
    if precision == "bfloat16":
        return torch.autocast(device.type, torch.bfloat16)
    return _tf32() if precision == "tf32" else nullcontext()


@contextmanager
def _tf32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _prefetch_one(items: Iterator[Item]) -> Iterator[Item]:
    """Pass on ``items``; each is made in a thread while the one before is used."""
    end = object()
    with ThreadPoolExecutor(max_workers=1) as thread:
        pending = thread.submit(next, items, end)
        while (item := pending.result()) is not end:
            pending = thread.submit(next, items, end)
            yield item  # type: ignore[misc]


def _rms(values: npt.NDArray[np.float64]) -> float:
    return float(np.sqrt(np.mean(np.square(values)))) if values.size else 0.0
