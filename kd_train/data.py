"""From the store to batches: which samples in which order, and their graphs."""

import contextlib
import itertools
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch_geometric.data import Data

from pipeline.fields import (
    EDGE_IDENTITY_FIELDS,
    FIELDS,
    LABEL_FIELDS,
    STRUCTURE_FIELDS,
)
from pipeline.graphs.batch import collate
from pipeline.graphs.neighbors import Edges, GraphRule, sample_edges
from pipeline.models.elements import check_elements
from pipeline.store.reader import SplitReader
from pipeline.structure import Structure

Positions = npt.NDArray[np.int64]
Item = TypeVar("Item")
EDGE_CACHE_BYTES = 1 << 30


class CachedSamples:
    """Batches of one split for one model: structures, labels, ``fields``, edges.

    Edges are built from the stored structures under ``rule`` and kept in memory up to
    1 GiB, since structures do not change between epochs.
    """

    def __init__(
        self,
        split: SplitReader,
        rule: GraphRule,
        elements: Sequence[int],
        fields: Sequence[str] = (),
    ) -> None:
        self.split = split
        self.rule = rule
        self.elements = elements
        self.fields = (*STRUCTURE_FIELDS, *LABEL_FIELDS, *fields)
        read = self.fields
        if "edge_features" in fields:
            read += EDGE_IDENTITY_FIELDS
        self._paths = {name: FIELDS[name].path for name in read}
        self._edges: dict[int, Edges] = {}
        self._edge_bytes = 0

    def __len__(self) -> int:
        return len(self.split)

    def batch(self, positions: Positions) -> Data:
        """The samples at ``positions`` as one graph, see ``pipeline.graphs.batch``.

        Adds ``energy`` (B,) float64 in eV, ``forces`` (N, 3) float32 in eV/Å and every
        asked field, features as float32. With ``edge_features`` (E, C) come their edges
        ``teacher_edge_index`` (2, E) int64, source first, ``teacher_cell_offsets``
        (E, 3) int8, and ``edge_mismatch``, the id of the first sample whose edges are
        not those of the model's own graph, empty where all are.

        Raises
        ------
        DataError
            A sample has no neighbours or an element the model does not know.
        DamagedStoreError
            Bytes on disk are not those that were written.
        """
        arrays = self.split.read(positions, tuple(self._paths.values()))
        values = {name: arrays[path] for name, path in self._paths.items()}
        structures = self._structures(positions, values)
        edges = [
            self._edges_of(int(position), structure)
            for position, structure in zip(positions, structures, strict=True)
        ]
        data = collate(structures, edges)
        for name in self.fields:
            if name not in STRUCTURE_FIELDS:
                tensor = torch.from_numpy(values[name])
                data[name] = tensor.float() if tensor.dtype == torch.float16 else tensor
        if "edge_features" in values:
            self._add_teacher_edges(data, positions, values, edges)
        return data

    def _add_teacher_edges(
        self,
        data: Data,
        positions: Positions,
        values: dict[str, npt.NDArray[Any]],
        edges: Sequence[Edges],
    ) -> None:
        index = values["edge_index"].astype(np.int64)
        offsets = values["cell_offsets"]
        counts = self.split.n_edges[positions]
        data.edge_mismatch = ""
        ends = np.cumsum(counts)[:-1]
        parts = zip(edges, np.split(index, ends), np.split(offsets, ends), strict=True)
        for position, (own, pairs, shifts) in zip(positions, parts, strict=True):
            same_atoms = np.array_equal(own.edge_index.T, pairs)
            if not same_atoms or not np.array_equal(own.cell_offsets, shifts):
                data.edge_mismatch = str(self.split.sample_ids[position])
                break
        n_atoms = self.split.n_atoms[positions].astype(np.int64)
        first_atom = np.repeat(np.cumsum(n_atoms) - n_atoms, counts)
        data.teacher_edge_index = torch.from_numpy(index.T + first_atom)
        data.teacher_cell_offsets = torch.from_numpy(offsets)

    def _structures(
        self, positions: Positions, values: dict[str, npt.NDArray[Any]]
    ) -> list[Structure]:
        check_elements(
            values["atomic_numbers"],
            self.elements,
            np.repeat(self.split.sample_ids[positions], self.split.n_atoms[positions]),
        )
        ends = np.cumsum(self.split.n_atoms[positions])
        starts = ends - self.split.n_atoms[positions]
        fixed = values["fixed"].astype(np.bool_)
        pbc = values["pbc"].astype(np.bool_)
        return [
            Structure(
                values["atomic_numbers"][a:b],
                values["positions"][a:b],
                values["cell"][i],
                pbc[i],
                values["tags"][a:b],
                fixed[a:b],
            )
            for i, (a, b) in enumerate(zip(starts, ends, strict=True))
        ]

    def _edges_of(self, position: int, structure: Structure) -> Edges:
        edges = self._edges.get(position)
        if edges is None:
            sample_id = str(self.split.sample_ids[position])
            edges = sample_edges(sample_id, structure, self.rule)
            if self._edge_bytes + edges.nbytes <= EDGE_CACHE_BYTES:
                self._edges[position] = edges
                self._edge_bytes += edges.nbytes
        return edges


def ordered_batches(count: int, batch_size: int) -> list[Positions]:
    """Positions 0..count-1 in order, in groups of ``batch_size``."""
    return [
        np.arange(first, min(first + batch_size, count))
        for first in range(0, count, batch_size)
    ]


def shuffled_batches(
    blocks: Sequence[range],
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    buffer_blocks: int = 16,
) -> list[Positions]:
    """Every position once, shuffled, in groups of ``batch_size`` (the last is shorter).

    Blocks come in random order and samples are shuffled within ``buffer_blocks`` of
    them at a time: as good as a full shuffle, because the store's own order is a random
    permutation, and reading stays local. The same (seed, epoch) gives the same order.
    """
    generator = np.random.default_rng((seed, epoch))
    order = generator.permutation(len(blocks))
    pieces = []
    for first in range(0, len(order), buffer_blocks):
        window = [np.asarray(blocks[b]) for b in order[first : first + buffer_blocks]]
        pieces.append(generator.permutation(np.concatenate(window)))
    positions = np.concatenate(pieces)
    return [
        positions[first : first + batch_size]
        for first in range(0, len(positions), batch_size)
    ]


def training_batches(
    blocks: Sequence[range], batch_size: int, *, seed: int, first_step: int, steps: int
) -> Iterator[Positions]:
    """Batches of steps ``first_step`` to ``steps``, across epochs; resumes exactly."""
    per_epoch = -(-sum(len(block) for block in blocks) // batch_size)
    step = first_step
    while step < steps:
        epoch, offset = divmod(step, per_epoch)
        batches = shuffled_batches(blocks, batch_size, seed=seed, epoch=epoch)
        for positions in batches[offset : offset + steps - step]:
            yield positions
            step += 1


@dataclass(frozen=True)
class _End:
    """Last thing a prefetching thread delivers."""

    error: BaseException | None


def prefetch(
    make: Callable[[Positions], Item], batches: Iterable[Positions], depth: int = 4
) -> Iterator[Item]:
    """``make`` of every batch, computed ahead in a thread; errors reach the caller."""
    ready: queue.Queue[Item | _End] = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def put(item: Item | _End) -> None:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(item, timeout=0.1)
                return

    def work() -> None:
        error: BaseException | None = None
        try:
            for positions in itertools.takewhile(
                lambda _: not stopped.is_set(), batches
            ):
                put(make(positions))
        except BaseException as caught:
            error = caught
        put(_End(error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while not isinstance(item := ready.get(), _End):
            yield item
        if item.error is not None:
            raise item.error
    finally:
        stopped.set()
        thread.join()
