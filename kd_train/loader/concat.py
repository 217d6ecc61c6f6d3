"""Several splits of a store, read as one."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from kd_train.loader.split import Arrays, Indices, Split
from pipeline.errors import SpecError, StoreError
from pipeline.fields import FIELDS, Level
from pipeline.store.reader import ArrayInfo

# Arrays that a split may lack, and the values that mean "nothing known" there.
_FILL = {
    FIELDS["force_jacobian"].path: 0,
    FIELDS["force_jacobian_column"].path: -1,
    FIELDS["virial"].path: np.nan,
    FIELDS["teacher_virial"].path: np.nan,
}


class ConcatSplit:
    """The samples of several splits, one split after the other.

    Every array in ``wanted`` that one split has must be the same kind in all splits.
    Other arrays are visible if they are the same kind in all splits. Splits without
    columns of the force Jacobian have no column for each sample, and splits without
    virials have missing ones.

    Raises
    ------
    SpecError
        A wanted array is missing or different in one split, or a sample is in two.
    """

    def __init__(self, parts: Sequence[Split], wanted: Sequence[str]) -> None:
        for path in wanted:
            _require_alike(parts, path)
        _require_distinct(parts)
        self._parts = tuple(parts)
        self._bounds = np.cumsum([0, *(len(part) for part in parts)])
        self._first_block = np.cumsum([0, *(part.n_blocks for part in parts)])
        self._sample_ids = np.concatenate([part.sample_ids for part in parts])
        self._n_atoms = np.concatenate([part.n_atoms for part in parts])
        known = {path: info for part in parts for path, info in part.arrays.items()}
        self._arrays = {
            path: info
            for path, info in known.items()
            if all(_is_alike(info, _info(part, path, info)) for part in parts)
        }

    def __len__(self) -> int:
        return len(self._n_atoms)

    @property
    def name(self) -> str:
        """Names of the splits, joined with +."""
        return "+".join(part.name for part in self._parts)

    @property
    def sample_ids(self) -> npt.NDArray[Any]:
        """(n,) ids, of numpy's string dtype."""
        return self._sample_ids

    @property
    def n_atoms(self) -> npt.NDArray[np.int32]:
        """(n,) atoms of every sample."""
        return self._n_atoms

    @cached_property
    def checksums(self) -> npt.NDArray[np.uint64]:
        """(n,) hash of every sample's structure."""
        return np.concatenate([part.checksums for part in self._parts])

    @cached_property
    def n_edges(self) -> Indices:
        """(n,) edges of every sample.

        Raises StoreError if a split stores no edges.
        """
        return np.concatenate([part.n_edges for part in self._parts])

    @property
    def arrays(self) -> dict[str, ArrayInfo]:
        """Dtype, trailing shape and level of the arrays that all splits share."""
        return self._arrays

    @property
    def n_blocks(self) -> int:
        """Number of blocks of all splits."""
        return int(self._first_block[-1])

    def block_positions(self, block: int) -> range:
        """Return the positions of the samples of ``block``, counted over all splits."""
        part = int(np.searchsorted(self._first_block, block, side="right")) - 1
        if not 0 <= part < len(self._parts):
            raise StoreError(
                f"Split {self.name!r} has blocks 0 to {self.n_blocks - 1}, not {block}."
            )
        own = self._parts[part].block_positions(block - int(self._first_block[part]))
        shift = int(self._bounds[part])
        return range(own.start + shift, own.stop + shift)

    def encoding(self, path: str) -> None:
        """Return None: encodings differ between splits, so rows are read decoded."""

    def max_shuffle_blocks(self, paths: Sequence[str]) -> int | None:
        """Return the maximum number of blocks to read at a time, None if unlimited."""
        limits = [
            part.max_shuffle_blocks([path for path in paths if path in part.arrays])
            for part in self._parts
        ]
        return min((limit for limit in limits if limit is not None), default=None)

    def read_stored(self, positions: npt.ArrayLike, paths: Sequence[str]) -> Arrays:
        """Read decoded rows, as `read` does."""
        return self.read(positions, paths)

    def read(self, positions: npt.ArrayLike, paths: Sequence[str]) -> Arrays:
        """Read rows of the samples at ``positions``, in that order, as new arrays.

        Shapes are those of ``SplitReader.read``; each split is read once.
        """
        chosen = np.asarray(positions, np.int64).reshape(-1)
        self._check(chosen, paths)
        owner = np.searchsorted(self._bounds, chosen, side="right") - 1
        owners = np.unique(owner).tolist() or [0]
        found = [
            self._read_part(part, chosen[owner == part] - self._bounds[part], paths)
            for part in owners
        ]
        if len(found) == 1:
            return found[0]
        # Places of the requested samples in the rows that were read, split after split.
        place = np.argsort(np.argsort(owner, kind="stable"))
        levels = {self._arrays[path].level for path in paths}
        order = {level: _rows(self._counts(level, chosen), place) for level in levels}
        return {
            path: np.concatenate([part[path] for part in found])[
                order[self._arrays[path].level]
            ]
            for path in paths
        }

    def _read_part(
        self, number: int, positions: Indices, paths: Sequence[str]
    ) -> Arrays:
        """Read rows of one split, and fill arrays that it may lack."""
        part = self._parts[number]
        found = part.read(positions, [path for path in paths if path in part.arrays])
        for path in paths:
            if path not in found:
                info = self._arrays[path]
                node = info.level == "node"
                rows = part.n_atoms[positions].sum() if node else len(positions)
                found[path] = np.full((rows, *info.shape), _FILL[path], info.dtype)
        return found

    def _check(self, chosen: Indices, paths: Sequence[str]) -> None:
        outside = chosen[(chosen < 0) | (chosen >= len(self))]
        if len(outside):
            raise StoreError(
                f"Position {outside[0]} is outside split {self.name!r}, which has "
                f"{len(self)} samples."
            )
        for path in paths:
            if path not in self._arrays:
                raise StoreError(
                    f"The splits {self.name!r} do not share an array {path!r}; they "
                    f"share {', '.join(self._arrays)}."
                )

    def _counts(self, level: Level, chosen: Indices) -> Indices:
        """Count the rows of every requested sample on the axis of ``level``."""
        if level == "node":
            return self._n_atoms[chosen].astype(np.int64)
        if level == "edge":
            return self.n_edges[chosen]
        return np.ones(len(chosen), np.int64)


def _rows(counts: Indices, place: Indices) -> Indices:
    """Compute the index that brings rows of samples into order.

    ``counts`` (m,) are rows of the samples in the order wanted, ``place`` (m,) says
    which in the given order each of them is.
    """
    given = np.empty_like(counts)
    given[place] = counts
    start = (np.cumsum(given) - given)[place]
    shift = start - (np.cumsum(counts) - counts)
    return np.arange(int(counts.sum())) + np.repeat(shift, counts)


def _info(part: Split, path: str, info: ArrayInfo) -> ArrayInfo | None:
    """Return the array of ``part``, or ``info`` if the split may lack it."""
    return part.arrays.get(path, info if path in _FILL else None)


def _is_alike(info: ArrayInfo, other: ArrayInfo | None) -> bool:
    return other is not None and _kind(info) == _kind(other)


def _kind(info: ArrayInfo) -> tuple[object, ...]:
    return info.level, info.dtype, info.shape


def _require_alike(parts: Sequence[Split], path: str) -> None:
    """Refuse ``path`` if only some splits have it, or have it in another shape."""
    having = [part for part in parts if path in part.arrays]
    if not having:
        return
    first = having[0]
    for part in parts if path not in _FILL else having:
        if part not in having:
            raise SpecError(
                f"Split {part.name!r} lacks {path!r}, which split {first.name!r} "
                f"has, so they cannot be joined; omit {part.name!r}, or set "
                f"splits.{part.name}.features: true in the spec and build the store "
                "again."
            )
        info, other = first.arrays[path], part.arrays[path]
        if not _is_alike(info, other):
            raise SpecError(
                f"Splits {first.name!r} and {part.name!r} cannot be joined: their "
                f"{path!r} is {info.dtype} {info.shape} and {other.dtype} "
                f"{other.shape}; build them with one spec."
            )


def _require_distinct(parts: Sequence[Split]) -> None:
    """Refuse a sample that occurs in two of the splits.

    A sample is the same if id and structure are: ids may be numbers of the frames of a
    file.
    """
    owners: dict[tuple[str, int], str] = {}
    for part in parts:
        samples = [*zip(part.sample_ids.tolist(), part.checksums.tolist(), strict=True)]
        twice = next((sample for sample in samples if sample in owners), None)
        if twice is not None:
            raise SpecError(
                f"Sample {twice[0]!r} is in split {owners[twice]!r} and in split "
                f"{part.name!r}; join splits without common samples."
            )
        owners.update(dict.fromkeys(samples, part.name))


def shared_structures(split: Split, other: Split) -> tuple[int, str]:
    """Count samples of ``split`` whose structure is in ``other``; name the first.

    The id is empty if there are none.
    """
    shared = np.flatnonzero(np.isin(split.checksums, other.checksums))
    return len(shared), str(split.sample_ids[shared[0]]) if len(shared) else ""
