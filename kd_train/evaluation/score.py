"""A finished student on splits of a store or on a dataset: metrics and predictions."""

import math
import threading
from collections.abc import Container, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from ase.data import chemical_symbols
from torch_geometric.data import Data
from tqdm import tqdm

from kd_train.config.sections import LossConfig
from kd_train.evaluation.evaluate import evaluate, teacher_metrics
from kd_train.evaluation.load_student import (
    undetermined_elements,
    unlisted_elements_warning,
    untrained_elements,
)
from kd_train.evaluation.metrics import METRICS, STRESS
from kd_train.evaluation.throughput import POOL, unbatch_structures
from kd_train.loader.data import CachedSamples
from kd_train.loader.datafiles import DatasetSamples
from kd_train.loader.prefetch import pin_batches, prefetch
from kd_train.loader.sampler import Positions, ordered_batches, ordered_within
from kd_train.loader.split import Arrays, Split
from kd_train.loader.subset import SubsetSplit
from pipeline.datasets import Dataset
from pipeline.datasets.label_statistics import KIND_DIFFERENCE
from pipeline.errors import SpecError
from pipeline.graphs.neighbors import limit_warning
from pipeline.models.checkpoint import LoadedModel
from pipeline.models.elements import list_symbols
from pipeline.structure import Structure


class Samples(Protocol):
    """Batches by position: ``CachedSamples`` and ``DatasetSamples`` are some."""

    def __len__(self) -> int: ...

    def batch(self, positions: Positions) -> Data:
        """Read the samples at ``positions`` as one graph with labels."""


@dataclass(frozen=True)
class EvalSet:
    """A row of the results: samples with their (n,) ids and atom counts.

    ``split`` is set if the samples are from a store.
    """

    name: str
    samples: Samples
    sample_ids: npt.NDArray[Any]
    n_atoms: npt.NDArray[Any]
    split: Split | None = None


@dataclass(frozen=True)
class Score:
    """Metrics and predictions (eV, eV/Å, with ``sample_ids``) of one evaluation set.

    ``energy_offset`` is the median of |ΔE| per atom in eV, NaN without labels;
    ``unknown`` are elements that the student's training data lacked, ``doubts`` further
    sentences on what was met.
    """

    name: str
    metrics: dict[str, float]
    teacher: dict[str, float] | None
    predictions: Arrays
    energy_offset: float
    unknown: tuple[int, ...]
    doubts: tuple[str, ...] = ()

    @property
    def warnings(self) -> list[str]:
        """Reasons to doubt the numbers of this set, one sentence each."""
        found = []
        if self.unknown:
            symbols = ", ".join(chemical_symbols[z] for z in self.unknown)
            found.append(
                f"{self.name}: the student's training data has no {symbols}; results "
                "for samples with these elements are not meaningful."
            )
        elif self.energy_offset > KIND_DIFFERENCE:
            found.append(
                f"{self.name}: half of the energies differ from the labels by more "
                f"than {self.energy_offset:.3g} eV per atom; either the labels are "
                "of another kind than the student's energies (total, adsorption, "
                "another level of theory), or the student is hardly trained; energy "
                "MAE and EFwT do not measure its accuracy."
            )
        if math.isnan(self.metrics["energy_mae"]):
            found.append(f"{self.name}: no sample has a reference energy.")
        return [*found, *(f"{self.name}: {doubt}." for doubt in self.doubts)]


def store_eval_set(
    split: Split,
    student: LoadedModel,
    elements: Container[int],
    limit: int | None,
    every: int,
) -> EvalSet:
    """Take each ``every``-th sample of a split, at most ``limit``, in storage order.

    Others than these ``elements`` are refused.
    """
    if limit is not None or every > 1:
        split = SubsetSplit(split, np.arange(len(split))[::every][:limit])
    samples = CachedSamples(split, student.model.graph_rule, elements)
    return EvalSet(split.name, samples, split.sample_ids, split.n_atoms, split)


def dataset_eval_set(
    name: str, dataset: Dataset, student: LoadedModel, elements: Container[int]
) -> EvalSet:
    """Take all samples of a dataset, under ``name``, and accept only ``elements``."""
    samples = DatasetSamples(dataset, student.model.graph_rule, elements)
    return EvalSet(
        name, samples, np.array(dataset.sample_ids, np.str_), dataset.n_atoms
    )


def make_eval_batches(
    eval_set: EvalSet, batch_size: int | None, batch_atoms: int
) -> list[Positions]:
    """Divide all positions in order, by number of samples or of atoms."""
    if batch_size is not None:
        return ordered_batches(len(eval_set.samples), batch_size)
    return ordered_within(eval_set.n_atoms, batch_atoms)


def score(
    student: LoadedModel,
    eval_set: EvalSet,
    batches: list[Positions],
    device: torch.device,
    loader_threads: int = 2,
) -> Score:
    """Compute metrics over free atoms (meV, meV/Å, cosine, %) and all predictions.

    Raises
    ------
    SpecError
        The model predicts no forces, or a batch does not fit into the device's memory.
    DataError
        A sample has no neighbours or an element the model does not know; names it.
    """
    _require_forces(student)
    seen = _SeenSamples()

    def load_and_note(positions: Positions) -> Data:
        batch = eval_set.samples.batch(positions)
        seen.add(batch, student)
        return batch

    load = pin_batches(load_and_note, device)
    with closing(prefetch(load, batches, threads=loader_threads)) as stream:
        progress = tqdm(stream, eval_set.name, len(batches), unit="batch", disable=None)
        try:
            result = evaluate(
                student.model, progress, student.normalizer, LossConfig(), device
            )
        except torch.OutOfMemoryError:
            raise SpecError(
                f"A batch of {eval_set.name} does not fit into the memory of {device}; "
                "lower --batch-atoms or --batch-size."
            ) from None
    found = result.predictions
    return Score(
        eval_set.name,
        result.metrics,
        None if eval_set.split is None else teacher_metrics(eval_set.split),
        {"sample_ids": np.array(eval_set.sample_ids.tolist()), **found},
        _energy_offset(found),
        tuple(untrained_elements(student, seen.elements)),
        tuple(seen.doubts(student)),
    )


class _SeenSamples:
    """Elements and neighbour limits seen in the batches of a set.

    Several threads may add batches at the same time.
    """

    def __init__(self) -> None:
        self.elements: set[int] = set()
        self._arbitrary: set[int] = set()
        self._crowded = 0
        self._atoms = 0
        self._lock = threading.Lock()

    def add(self, batch: Data, student: LoadedModel) -> None:
        """Take note of a batch before it is moved to the device."""
        numbers = batch.atomic_numbers.numpy()
        samples = np.split(numbers, np.cumsum(batch.natoms.numpy())[:-1])
        arbitrary = {z for s in samples for z in undetermined_elements(student, s)}
        with self._lock:
            self.elements.update(np.unique(numbers).tolist())
            self._arbitrary |= arbitrary
            self._crowded += batch.crowded
            self._atoms += len(numbers)

    def doubts(self, student: LoadedModel) -> list[str]:
        """List reasons to doubt the numbers, each without its full stop."""
        rule = student.model.graph_rule
        found = [
            unlisted_elements_warning(student),
            limit_warning(rule, self._crowded, self._atoms),
        ]
        if self._arbitrary:
            found.append(
                "the training compositions do not determine the reference energies "
                f"of {list_symbols(sorted(self._arbitrary))}, so energies of "
                "compositions that are not combinations of them are not meaningful"
            )
        return [text for text in found if text is not None]


def throughput_pool(eval_set: EvalSet) -> list[Structure]:
    """Take at most POOL structures, evenly over the set, to measure throughput."""
    step = -(-len(eval_set.samples) // POOL)
    return unbatch_structures(
        eval_set.samples.batch(np.arange(0, len(eval_set.samples), step))
    )


def mean_over(rows: Iterable[Mapping[str, float] | None]) -> dict[str, float] | None:
    """Average every metric over the rows that have it, or return None without rows."""
    present = [row for row in rows if row is not None]
    if not present:
        return None
    stress = [STRESS] if any(STRESS in row for row in present) else []
    return {
        name: _mean([row.get(name, math.nan) for row in present])
        for name in (*METRICS, *stress)
    }


def _mean(values: list[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def _require_forces(student: LoadedModel) -> None:
    if not student.model.hyperparameters.get("regress_forces", True):
        raise SpecError(
            "The model does not predict forces (regress_forces is false), so it cannot "
            "be evaluated."
        )


def _energy_offset(predictions: Arrays) -> float:
    error = np.abs(predictions["energy"] - predictions["energy_label"])
    per_atom = (error / predictions["n_atoms"])[np.isfinite(error)]
    return float(np.median(per_atom)) if len(per_atom) else math.nan
