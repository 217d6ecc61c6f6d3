"""What a store is planned to be: splits and their arrays, checked before it is made."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.errors import DataError, SpecError
from pipeline.fields import Level
from pipeline.store.calibration import Calibration
from pipeline.store.edges import CELL_OFFSETS, EDGE_INDEX, MAX_ATOMS
from pipeline.store.index import (
    DIGESTS,
    EDGE_COLUMNS,
    EDGE_IDENTITY,
    LEVELS,
    TABLES_GROUP,
    ArrayInfo,
    SplitFiles,
    table_paths,
)
from pipeline.store.layout import BlockPlan
from pipeline.store.quantization import ERROR, SCALE

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_RESERVED = {DIGESTS}
_RESERVED_GROUPS = {"index", TABLES_GROUP}


@dataclass(frozen=True)
class ArrayPlan:
    """An array to be made: ``shape`` is what follows the axis of its level.

    With a ``calibration``, integers of ``dtype`` are stored in place of the numbers.
    """

    path: str
    level: Level
    shape: tuple[int, ...]
    dtype: str
    attributes: dict[str, Any] = field(default_factory=dict)
    calibration: Calibration | None = None

    @property
    def info(self) -> ArrayInfo:
        """The array as a reader will find it."""
        dtype = np.dtype(self.dtype)
        if self.calibration is None:
            return ArrayInfo(self.path, self.level, dtype, self.shape)
        chosen = self.calibration
        return ArrayInfo(
            self.path, self.level, dtype, self.shape, chosen.encoding, chosen.clevel
        )

    @property
    def scale_arrays(self) -> tuple["ArrayPlan", ...]:
        """Arrays that go with an encoded one."""
        made = {
            SCALE: ArrayPlan(
                self.path + SCALE,
                self.level,
                (),
                "float16",
                {"meaning": f"scale of every row of {self.path}"},
            ),
            ERROR: ArrayPlan(
                self.path + ERROR,
                "sample",
                (2,),
                "float64",
                {
                    "meaning": f"squared error of {self.path} in a sample, and its "
                    "squared distance to the mean"
                },
            ),
        }
        return tuple(
            made[path.removeprefix(self.path)] for path in self.info.scale_arrays
        )


@dataclass(frozen=True, eq=False)
class SplitPlan:
    """A split to be made; ids and checksums (n,) uint64 are in storage order."""

    name: str
    sample_ids: Sequence[str]
    checksums: npt.NDArray[np.uint64]
    blocks: BlockPlan
    arrays: tuple[ArrayPlan, ...]

    @property
    def stored(self) -> tuple[ArrayPlan, ...]:
        """All arrays to be made: those planned, each with its companions."""
        return tuple(
            part for array in self.arrays for part in (array, *array.scale_arrays)
        )

    @property
    def levels(self) -> dict[str, Level]:
        """Level of every stored array by its path."""
        return {array.path: array.level for array in self.stored}

    @property
    def files(self) -> SplitFiles:
        """What decides the names of this split's small files."""
        return SplitFiles(
            self.name,
            self.levels,
            table_paths(array.info for array in self.stored),
            self.blocks.n_samples,
            self.blocks.n_blocks,
        )


def check_split(split: SplitPlan) -> None:
    """Raise SpecError or DataError where a split cannot be made as planned."""
    if not _NAME.fullmatch(split.name) or split.name in _RESERVED:
        raise SpecError(
            f"Split name {split.name!r} cannot be a folder of the store; use letters, "
            f"digits, '_', '-' and '.', and not {DIGESTS!r}."
        )
    n_samples = split.blocks.n_samples
    if not len(split.sample_ids) == len(split.checksums) == n_samples:
        raise DataError(
            f"Split {split.name!r} plans {n_samples} samples but has "
            f"{len(split.sample_ids)} ids and {len(split.checksums)} checksums; give "
            "one of each per sample."
        )
    if len(set(split.sample_ids)) < n_samples:
        ((name, times),) = Counter(split.sample_ids).most_common(1)
        raise DataError(
            f"Sample id {name!r} occurs {times} times in split {split.name!r}; ids "
            "must be unique, so rename or remove the copies."
        )
    _check_arrays(split)
    if "edge" in split.levels.values() or split.blocks.edges is not None:
        _check_edges(split)


def _check_edges(split: SplitPlan) -> None:
    planned = {(a.path, a.level, a.shape, a.dtype) for a in split.arrays}
    identity = {(f.path, f.level, f.shape, f.dtype) for f in EDGE_IDENTITY}
    edges = split.blocks.edges
    if edges is None or not identity <= planned:
        raise SpecError(
            f"Split {split.name!r} needs edge counts and the arrays {EDGE_INDEX!r} and "
            f"{CELL_OFFSETS!r} beside its other edge arrays; plan them together."
        )
    if len(edges.n_edges) != split.blocks.n_samples or edges.n_edges.min() < 0:
        raise DataError(
            f"Split {split.name!r} needs one edge count of 0 or more for each of its "
            f"{split.blocks.n_samples} samples; count them again."
        )
    largest = int(split.blocks.n_atoms.argmax())
    if split.blocks.n_atoms[largest] > MAX_ATOMS:
        raise DataError(
            f"Sample {split.sample_ids[largest]!r} of split {split.name!r} has "
            f"{split.blocks.n_atoms[largest]} atoms and edges can be stored for up to "
            f"{MAX_ATOMS}; leave it out or do not ask for edge_features."
        )


def _check_arrays(split: SplitPlan) -> None:
    paths = [array.path for array in split.stored]
    if not paths:
        raise SpecError(f"Split {split.name!r} has no arrays; plan at least one.")
    for array in split.stored:
        parts = array.path.split("/")
        usable = all(_NAME.fullmatch(part) for part in parts)
        usable = usable and parts[0] not in _RESERVED_GROUPS
        reserved = array.path in EDGE_COLUMNS
        if not usable or reserved or paths.count(array.path) > 1:
            raise SpecError(
                f"Array path {array.path!r} of split {split.name!r} is repeated, "
                "reserved or no valid name; choose another."
            )
        supported = (
            np.dtype(array.dtype).kind in "fiu" and min(array.shape, default=1) > 0
        )
        if array.level not in LEVELS or not supported:
            raise SpecError(
                f"Array {array.path!r} of split {split.name!r} has level "
                f"{array.level!r}, dtype {array.dtype!r} and shape {array.shape}; use "
                "node, edge or sample, a number type and sizes above 0."
            )
