"""Reads a sealed store: whole samples in any order, with the fields asked for."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.errors import DamagedStoreError, StoreError
from pipeline.store.arrays import ArrayReader, MappedArray, array_reader
from pipeline.store.backends import CachedBackend, StorageBackend, open_backend
from pipeline.store.chunks import ChunkCache
from pipeline.store.index import ROOT_KEY, SPLITS_KEY, ArrayInfo, SplitIndex
from pipeline.store.layout import IntArray
from pipeline.store.ledger import check_metadata, is_committed, unsealed_message
from pipeline.store.memory_map import advise_will_need, disk_reads
from pipeline.store.metadata import read_root, read_split
from pipeline.store.quantization import ERROR, SCALE, Quantization, relative_error
from pipeline.store.row_slices import RowSlices, row_slices

__all__ = ["ArrayInfo", "FeatureStore", "SplitReader"]

Arrays = dict[str, npt.NDArray[Any]]
CACHE_BYTES = 1 << 30
# Reads for which read-ahead stays on after pages had to come from disk.
_COLD_READS = 64


class FeatureStore:
    """A store opened for reading; holds no open file and may be used by threads.

    ``splits`` gives a `SplitReader` by name, ``attributes`` the store's provenance.
    """

    def __init__(
        self,
        place: StorageBackend,
        attributes: dict[str, Any],
        splits: dict[str, "SplitReader"],
    ) -> None:
        self.path = Path(place.url) if place.mappable else place.url
        self.attributes = attributes
        self.splits = splits

    @classmethod
    def open(
        cls,
        path: Path | str,
        allow_unsealed: bool = False,
        cache_bytes: int = CACHE_BYTES,
    ) -> "FeatureStore":
        """Store at ``path``; an unfinished one only with ``allow_unsealed``.

        ``path`` is a folder, a zip archive made without compression, or a URL of any
        protocol that fsspec knows. Metadata and index of a sealed store are checked
        against their digests here; shards are checked when they are first read.
        Chunks that are compressed or remote are kept in memory up to ``cache_bytes``.

        Raises
        ------
        StoreError
            There is no store, it is not finished, or this program is too old for it.
        DamagedStoreError
            Metadata or index are not what was sealed.
        """
        place = open_backend(path)
        try:
            return cls._from_backend(place, allow_unsealed, cache_bytes)
        except DamagedStoreError:
            # While files were read, add-field may have put its store in this place.
            return cls._from_backend(place, allow_unsealed, cache_bytes)

    @classmethod
    def _from_backend(
        cls, place: StorageBackend, allow_unsealed: bool, cache_bytes: int
    ) -> "FeatureStore":
        root = read_root(place)
        header = root[ROOT_KEY]
        # Over a network nothing is asked for twice.
        held = CachedBackend(place, check_metadata(place) if header["complete"] else {})
        splits = {
            name: replace(read_split(held, name), place=place)
            for name in root[SPLITS_KEY]
        }
        if not header["complete"] and not allow_unsealed:
            raise StoreError(unsealed_message(place, splits.values()))
        cache = ChunkCache(cache_bytes)
        readers = {name: SplitReader(split, cache) for name, split in splits.items()}
        return cls(place, header, readers)

    @property
    def fingerprint(self) -> str:
        """Hash of everything that the stored numbers depend on."""
        fingerprint = self.attributes.get("fingerprint")
        if not isinstance(fingerprint, str):
            raise StoreError(
                f"{self.path} was written without a fingerprint; build it again."
            )
        return fingerprint


class SplitReader:
    """Samples of one split by storage position, 0 to ``len(self) - 1``."""

    def __init__(self, index: SplitIndex, cache: ChunkCache) -> None:
        self.index = index
        self._cache = cache
        self._readers: dict[str, ArrayReader] = {
            path: array_reader(index, info, cache)
            for path, info in index.arrays.items()
        }
        self._by_id: IntArray | None = None
        self._disk_reads = disk_reads()
        self._cold_reads = _COLD_READS

    def __len__(self) -> int:
        return len(self.index.start)

    @property
    def name(self) -> str:
        """Name of the split."""
        return self.index.name

    @property
    def sample_ids(self) -> npt.NDArray[Any]:
        """(n,) ids, of numpy's string dtype."""
        return self.index.sample_ids

    @property
    def n_atoms(self) -> npt.NDArray[np.int32]:
        """(n,) atoms of every sample."""
        return self.index.n_atoms

    @property
    def n_edges(self) -> IntArray:
        """(n,) edges of every sample, in a split that has edge-level arrays."""
        if self.index.edges is None:
            raise StoreError(
                f"Split {self.name!r} of {self.index.place} has no edges; ask for "
                "edge_features in the spec and build the store again."
            )
        return self.index.edges.n_edges

    @property
    def checksums(self) -> npt.NDArray[np.uint64]:
        """(n,) hash of every sample's structure, see ``Structure.checksum``."""
        return self.index.checksums

    @property
    def arrays(self) -> dict[str, ArrayInfo]:
        """Dtype, trailing shape and level of every array by its path."""
        return self.index.fields

    def encoding(self, path: str) -> Quantization | None:
        """What the stored integers of an array mean; None for plain numbers."""
        return self._info(path).encoding

    def error(self, path: str) -> float | None:
        """Squared error of an encoded array relative to its variance, all samples.

        None where the numbers are stored as they are.
        """
        if self.encoding(path) is None:
            return None
        sums = self.read_stored(np.arange(len(self)), [path + ERROR])
        return relative_error(sums[path + ERROR])

    def bytes_stored(self, path: str) -> int:
        """Bytes that the samples take of an array and of what belongs to it."""
        paths = (path, *self._info(path).scale_arrays)
        return sum(self._count_bytes(self.index.arrays[one]) for one in paths)

    def _count_bytes(self, info: ArrayInfo) -> int:
        if info.clevel is None:
            _, rows = self.index.spans(info.level, slice(None))
            return int(rows.sum()) * info.row_bytes
        index, blocks = self.index, range(self.n_blocks)
        names = [index.shard_name(info.path, block) for block in blocks]
        return sum(index.place.size(name) or 0 for name in names)

    def missing_blocks(self) -> list[int]:
        """Blocks that are not written yet, in a store that is not sealed."""
        blocks = range(self.n_blocks)
        return [block for block in blocks if not is_committed(self.index, block)]

    def max_shuffle_blocks(self, paths: Sequence[str]) -> int | None:
        """Blocks whose chunks of these arrays fit into memory together, at least 1.

        Reading samples out of more blocks at a time would decode or fetch chunks again
        and again. None where rows are read where they lie, from any number of blocks.
        """
        chunked = [
            self.index.rows(info.level) * info.row_bytes
            for path in self._with_scales(paths)
            if not isinstance(self._readers[path], MappedArray)
            for info in [self.index.arrays[path]]
        ]
        return max(1, self._cache.limit // sum(chunked)) if chunked else None

    @property
    def n_blocks(self) -> int:
        """Number of blocks."""
        return self.index.n_blocks

    def block_positions(self, block: int) -> range:
        """Storage positions of the samples of ``block``."""
        return self.index.block_positions(block)

    def position(self, sample_id: str) -> int:
        """Storage position of the sample with this id; StoreError without one."""
        return int(self.positions([sample_id])[0])

    def positions(self, sample_ids: Sequence[str]) -> IntArray:
        """(m,) storage positions of the samples with these ids, in their order.

        Raises
        ------
        StoreError
            There is no sample of some id; names the first.
        """
        ids = self.index.sample_ids
        if self._by_id is None:
            self._by_id = np.argsort(ids, kind="stable")
        # Keys of another dtype would make numpy convert all ids.
        keys = np.array(list(sample_ids), ids.dtype)
        places = np.searchsorted(ids, keys, sorter=self._by_id)
        found = self._by_id[np.minimum(places, len(ids) - 1)]
        unknown = ids[found] != keys
        if unknown.any():
            first = str(keys[unknown.argmax()])
            raise StoreError(
                f"Split {self.name!r} of {self.index.place} has no sample {first!r}."
            )
        return found

    def read(self, positions: npt.ArrayLike, paths: Sequence[str]) -> Arrays:
        """Rows of the samples at ``positions``, in that order, as fresh arrays.

        Node- and edge-level arrays are concatenated over the samples to (ΣN, *shape)
        and (ΣE, *shape), sample level ones are (len(positions), *shape). Encoded
        arrays come decoded, as float32.

        Raises
        ------
        StoreError
            There is no such array or sample.
        DamagedStoreError
            Bytes are not those that were written; names file and samples.
        """
        stored = self.read_stored(positions, self._with_scales(paths))
        decoded = {}
        for path in paths:
            encoding = self.index.arrays[path].encoding
            rows = stored[path]
            if encoding is not None:
                rows = encoding.decode(rows, stored.get(path + SCALE))
            decoded[path] = rows
        return decoded

    def read_block(self, block: int, paths: Sequence[str]) -> Arrays:
        """Rows of all samples of ``block`` in storage order, see `read`."""
        positions = self.block_positions(block)
        return self.read(np.arange(positions.start, positions.stop), paths)

    def read_stored(self, positions: npt.ArrayLike, paths: Sequence[str]) -> Arrays:
        """As `read`, without decoding: the numbers as they are stored.

        Scales of the rows of q8 arrays are an array beside, ``path + "_scale"``.
        """
        chosen = self._check_positions(positions)
        infos = [self._info(path) for path in paths]
        # All views first, then all copies: copying megabytes empties the processor's
        # caches, after which interpreted code is slow.
        cut: dict[tuple[str, int], RowSlices] = {}
        readers = []
        for info in infos:
            reader = self._readers[info.path]
            key = info.level, reader.layout.inner_rows
            if key not in cut:
                cut[key] = row_slices(self.index, info.level, chosen, key[1])
            readers.append((reader, cut[key]))
        views = [reader.views(pieces) for reader, pieces in readers]
        copies = [reader.empty(pieces) for reader, pieces in readers]
        if self._is_cold():
            for view in itertools.chain.from_iterable(views):
                advise_will_need(view)
        for source, target in zip(views, copies, strict=True):
            if source:
                np.concatenate(source, out=target)
        return {
            path: reader.to_rows(copy)
            for path, (reader, _), copy in zip(paths, readers, copies, strict=True)
        }

    def _info(self, path: str) -> ArrayInfo:
        info = self.index.arrays.get(path)
        if info is None:
            raise StoreError(
                f"Split {self.name!r} of {self.index.place} has no array {path!r}; it "
                f"has {', '.join(self.index.fields)}."
            )
        return info

    def _with_scales(self, paths: Sequence[str]) -> list[str]:
        """``paths`` and the scales that some of them are decoded with."""
        scales = [
            path + SCALE
            for path in paths
            if path + SCALE in self._info(path).scale_arrays
        ]
        return [*paths, *scales]

    def _check_positions(self, positions: npt.ArrayLike) -> IntArray:
        chosen = np.asarray(positions, np.int64).reshape(-1)
        # Negative numbers are huge when read as unsigned.
        if len(chosen) and chosen.view(np.uint64).max() >= len(self):
            outside = next(p for p in chosen.tolist() if not 0 <= p < len(self))
            raise StoreError(
                f"Position {outside} is outside split {self.name!r}, which has "
                f"{len(self)} samples."
            )
        return chosen

    def _is_cold(self) -> bool:
        """Whether pages lately came from disk, so that asking for them ahead pays."""
        now = disk_reads()
        if now != self._disk_reads:
            self._disk_reads = now
            self._cold_reads = _COLD_READS
        elif self._cold_reads:
            self._cold_reads -= 1
        return self._cold_reads > 0
