"""Samples per second of inference at the best batch size, with graphs and without.

Without graphs: forward pass and conversion to eV, on batches on the device. With
graphs: all steps from structures to energies and forces in memory, in one thread
(neighbour lists, collation, copies, forward pass).
"""

import itertools
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch_geometric.data import Data

from kd_train.evaluation.load_student import predict
from pipeline.errors import SpecError
from pipeline.graphs.batch import collate
from pipeline.graphs.neighbors import sample_edges
from pipeline.models.checkpoint import LoadedModel
from pipeline.structure import Structure

# Number of distinct samples, which are measured repeatedly.
POOL = 512
# Least gain in rate that justifies the memory of a larger batch.
_GAIN = 1.03
# Batch sizes without this gain before the search stops.
_PATIENCE = 2
_PASSES = 3


@dataclass(frozen=True)
class Throughput:
    """Rates in samples per second at ``batch_size``, and what they hold for.

    ``tried`` has the rate without graphs of every batch size. ``stopped_by`` is the
    reason to try no larger batch: rate, memory or samples.
    """

    samples_per_second: float
    samples_per_second_with_graphs: float
    batch_size: int
    device: str
    device_name: str
    threads: int
    mean_atoms: float
    samples: int
    stopped_by: str
    tried: dict[int, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able form."""
        tried = {str(size): rate for size, rate in self.tried.items()}
        return {**vars(self), "tried": tried}

    def __str__(self) -> str:
        return (
            f"{self.samples_per_second:.4g} samples/s without and "
            f"{self.samples_per_second_with_graphs:.4g} samples/s with graph "
            f"building, batches of {self.batch_size}, {self.mean_atoms:.1f} atoms on "
            f"average, {self.threads} thread(s), {self.device_name}"
        )


def measure(
    student: LoadedModel,
    structures: Sequence[Structure],
    device: torch.device,
    seconds: float = 1.0,
) -> Throughput:
    """Measure ``student`` on ``structures``, for at least ``seconds`` per number.

    The batch size doubles from one until the rate stops growing, the memory would not
    hold twice as much, or a batch has all structures; the one with the highest rate
    without graphs counts. Rates are medians over passes.

    Raises
    ------
    DataError
        A structure has no neighbours.
    SpecError
        One sample is too large for the device.
    """
    tried: dict[int, float] = {}
    stopped_by = "samples"
    for size in (1 << k for k in range(len(structures).bit_length())):
        if tried and _memory_is_short(device):
            stopped_by = "memory"
            break
        try:
            tried[size] = _model_rate(student, structures, size, device, seconds)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            stopped_by = "memory"
            break
        if _has_levelled_off(list(tried.values())):
            stopped_by = "rate"
            break
    if not tried:
        raise SpecError(f"A single sample does not fit into the memory of {device}.")
    best = max(tried, key=lambda size: tried[size])
    return Throughput(
        samples_per_second=tried[best],
        samples_per_second_with_graphs=_whole_rate(
            student, structures, best, device, seconds
        ),
        batch_size=best,
        device=str(device),
        device_name=device_name(device),
        threads=torch.get_num_threads(),
        mean_atoms=float(np.mean([len(structure) for structure in structures])),
        samples=len(structures),
        stopped_by=stopped_by,
        tried=tried,
    )


def unbatch_structures(batch: Data) -> list[Structure]:
    """Return the structures of a collated batch, with its precision."""
    ends = batch.natoms.cumsum(0).tolist()
    starts = [0, *ends[:-1]]
    return [
        Structure(
            batch.atomic_numbers[a:b].numpy().astype(np.uint8),
            batch.positions[a:b].double().numpy(),
            batch.cell[k].double().numpy(),
            batch.pbc[k].numpy(),
            batch.tags[a:b].numpy().astype(np.int8),
            batch.fixed[a:b].numpy(),
        )
        for k, (a, b) in enumerate(zip(starts, ends, strict=True))
    ]


def device_name(device: torch.device) -> str:
    """Return the name that the device reports."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    models = _values(Path("/proc/cpuinfo"), "model name")
    return models[0] if models else platform.processor() or platform.machine()


def _values(path: Path, key: str) -> list[str]:
    """Return the values of ``key`` in a table of the system, if there are any."""
    if not path.exists():
        return []
    pairs = (line.partition(":") for line in path.read_text().splitlines())
    return [value.strip() for name, _, value in pairs if name.strip() == key]


def _memory_is_short(device: torch.device) -> bool:
    """Return whether a pass with twice the peak memory might not fit.

    A GPU raises an error; a machine without memory swaps or ends the process.
    """
    if device.type != "cpu":
        return False
    available = _values(Path("/proc/meminfo"), "MemAvailable")
    if not available:
        return False
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return peak > 1024 * int(available[0].split()[0])


def _has_levelled_off(rates: list[float]) -> bool:
    """Return whether the last sizes gained nothing over the best earlier size."""
    before, last = rates[:-_PATIENCE], rates[-_PATIENCE:]
    return bool(before) and max(last) < _GAIN * max(before)


def _groups(structures: Sequence[Structure], size: int) -> list[list[Structure]]:
    """Group all structures in batches of ``size``, the last filled from the start."""
    endless = itertools.cycle(structures)
    count = -(-len(structures) // size)
    return [list(itertools.islice(endless, size)) for _ in range(count)]


def _graph(student: LoadedModel, structures: Sequence[Structure]) -> Data:
    rule = student.model.graph_rule
    edges = [sample_edges(str(k), s, rule) for k, s in enumerate(structures)]
    return collate(structures, edges)


def _model_rate(
    student: LoadedModel,
    structures: Sequence[Structure],
    size: int,
    device: torch.device,
    seconds: float,
) -> float:
    batches = [_graph(student, g).to(device) for g in _groups(structures, size)]
    endless = itertools.cycle(batches)
    return size * _rate(lambda: predict(student, next(endless)), device, seconds)


def _whole_rate(
    student: LoadedModel,
    structures: Sequence[Structure],
    size: int,
    device: torch.device,
    seconds: float,
) -> float:
    endless = itertools.cycle(_groups(structures, size))

    def whole() -> None:
        graph = _graph(student, next(endless)).to(device)
        energy, forces = predict(student, graph)
        energy.cpu()
        if forces is not None:
            forces.cpu()

    return size * _rate(whole, device, seconds)


def _rate(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Measure calls per second, as a median over passes of equal length."""
    call()  # the first call allocates memory and compiles kernels
    _wait_for(device)
    calls = 1
    while (spent := _time_calls(call, calls, device)) < seconds / (2 * _PASSES):
        calls *= 2
    passes = [spent]
    while len(passes) < _PASSES or sum(passes) < seconds:
        passes.append(_time_calls(call, calls, device))
    return calls / statistics.median(passes)


def _time_calls(call: Callable[[], object], calls: int, device: torch.device) -> float:
    started = time.perf_counter()
    for _ in range(calls):
        call()
    _wait_for(device)
    return time.perf_counter() - started


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
