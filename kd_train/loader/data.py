"""From the store to batches: samples, their graphs and what strategies read."""

import copy
import threading
from collections.abc import Container, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch_geometric.data import Data

from kd_train.loader.sampler import Positions
from kd_train.loader.split import Split
from pipeline.fields import (
    EDGE_IDENTITY_FIELDS,
    FIELDS,
    LABEL_FIELDS,
    STRUCTURE_FIELDS,
    TEACHER_VIRIAL,
)
from pipeline.graphs.batch import collate
from pipeline.graphs.neighbors import Edges, NeighborSpec, sample_edges
from pipeline.models.elements import check_elements
from pipeline.store.quantization import PIECE_ROWS, SCALE, dequantize
from pipeline.structure import Structure

EDGE_CACHE_BYTES = 1 << 30
# Bytes that Python takes for the edges of a sample, without the numbers (measured).
_EDGE_OVERHEAD = 600

Tables = dict[str, torch.Tensor]


class CachedSamples:
    """Batches of one split for one model: structures, labels, ``fields``, edges.

    Edges are built from the stored structures under ``rule`` and kept in memory up to
    ``edge_cache_bytes``, since structures do not change between epochs. Threads may
    make batches at the same time.
    """

    def __init__(
        self,
        split: Split,
        rule: NeighborSpec,
        elements: Container[int],
        fields: Sequence[str] = (),
        edge_cache_bytes: int = EDGE_CACHE_BYTES,
    ) -> None:
        self.edge_cache_bytes = edge_cache_bytes
        self.split = split
        self.rule = rule
        self.elements = elements
        virials = [
            name
            for name, needed in (
                ("virial", "energy"),
                (TEACHER_VIRIAL, "teacher_energy"),
            )
            if needed in (*LABEL_FIELDS, *fields) and FIELDS[name].path in split.arrays
        ]
        self.fields = (*STRUCTURE_FIELDS, *LABEL_FIELDS, *virials, *fields)
        self._paths = read_paths([*virials, *fields])
        self.encodings = {
            name: encoding
            for name in fields
            if (encoding := split.encoding(self._paths[name])) is not None
        }
        self._paths |= {
            name + SCALE: self._paths[name] + SCALE
            for name, encoding in self.encodings.items()
            if encoding.has_row_scales
        }
        self._lock = threading.Lock()
        self._edges: dict[int, Edges] = {}
        self._edge_bytes = 0

    def __len__(self) -> int:
        return len(self.split)

    def batch(self, positions: Positions) -> Data:
        """Read samples at ``positions`` as one graph, see ``pipeline.graphs.batch``.

        Adds ``energy`` (B,) float64 in eV, ``forces`` (N, 3) float32 in eV/Å and every
        asked field as it is stored, see ``decode_batch``. Splits with virials add
        ``virial``, and next to ``teacher_energy`` also ``teacher_virial``, (B, 3, 3)
        float64 in eV. With ``edge_features`` (E, C)
        come their edges ``teacher_edge_index`` (2, E) int64, source first,
        ``teacher_cell_offsets`` (E, 3) int8, and ``edge_mismatch``, the id of the first
        sample whose edges differ from the model's own graph, empty if all agree.

        Raises
        ------
        DataError
            A sample has no neighbours or an element the model does not know.
        DamagedStoreError
            Bytes on disk are not those that were written.
        """
        arrays = self.split.read_stored(positions, tuple(self._paths.values()))
        values = {name: arrays[path] for name, path in self._paths.items()}
        structures = self._structures(positions, values)
        edges = [
            self._edges_of(int(position), structure)
            for position, structure in zip(positions, structures, strict=True)
        ]
        data = collate(structures, edges)
        for name, rows in values.items():
            if name not in (*STRUCTURE_FIELDS, *EDGE_IDENTITY_FIELDS):
                data[name] = torch.from_numpy(rows)
        if "edge_features" in values:
            self._add_teacher_edges(data, positions, values, edges)
        return data

    def max_shuffle_blocks(self, wished: int) -> int:
        """Return the number of blocks to shuffle among, ``wished`` or fewer.

        Beyond that limit, chunks would be decoded or fetched several times.
        """
        limit = self.split.max_shuffle_blocks(tuple(self._paths.values()))
        return wished if limit is None else min(wished, limit)

    def tables(self, device: torch.device) -> dict[str, Tables]:
        """Return what ``decode_batch`` needs on ``device`` for fields of integers."""
        return {
            name: {n: torch.tensor(v, device=device) for n, v in part.decoder.items()}
            for name, part in self.encodings.items()
        }

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
            with self._lock:
                size = edges.nbytes + _EDGE_OVERHEAD
                if self._edge_bytes + size <= self.edge_cache_bytes:
                    self._edges[position] = edges
                    self._edge_bytes += size
        return edges


def read_paths(fields: Sequence[str]) -> dict[str, str]:
    """Return the array paths of a batch by name: structures, labels and ``fields``.

    Edge features come with the two arrays that say which edge a row belongs to.
    """
    names = (*STRUCTURE_FIELDS, *LABEL_FIELDS, *fields)
    if "edge_features" in fields:
        names += EDGE_IDENTITY_FIELDS
    return {name: FIELDS[name].path for name in names}


def decode_batch(
    batch: Data, fields: Sequence[str], tables: Mapping[str, Tables]
) -> Data:
    """Return ``batch`` with its ``fields`` decoded to float32.

    Halves are converted, integers decoded with the ``tables`` of their field. To be
    called on the device, so that only the stored bytes travel to it.
    """
    batch = copy.copy(batch)
    for name in fields:
        values = batch[name]
        if name in tables:
            batch[name] = _floats(values, batch.get(name + SCALE), tables[name])
        elif values.dtype == torch.float16:
            batch[name] = values.float()
    return batch


def _floats(
    values: torch.Tensor, scale: torch.Tensor | None, decoder: Tables
) -> torch.Tensor:
    """Decode the integers ``values`` to float32, bit for bit as `Encoding.decode`."""
    dtype = decoder["mean"].dtype
    if scale is not None:
        scale = scale.to(dtype).reshape(-1, *[1] * (values.ndim - 1))
    # On a CPU large float64 arrays cost more than their numbers.
    if values.device.type != "cpu" or "weights" not in decoder or scale is not None:
        return dequantize(values.to(dtype), scale, decoder).float()
    found = torch.empty(values.shape, dtype=torch.float32)
    pieces = zip(found.split(PIECE_ROWS), values.split(PIECE_ROWS), strict=True)
    for target, piece in pieces:
        target.copy_(dequantize(piece.to(dtype), None, decoder))
    return found
