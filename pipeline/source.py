"""What blocks are filled from: datasets in storage order and the teacher."""

import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import numpy as np

from pipeline.calibrating import calibrate_fields
from pipeline.datasets import Dataset, open_split
from pipeline.errors import DataError
from pipeline.fields import FIELDS
from pipeline.planning import CountEdges, wanted_features
from pipeline.screening import without
from pipeline.spec import CacheSpec
from pipeline.store.adoption import Adoption
from pipeline.store.calibration import Calibration, known_calibration
from pipeline.store.index import SplitIndex
from pipeline.store.layout import IntArray, storage_order
from pipeline.store.writer import StoreWriter
from pipeline.structure import Sample
from pipeline.teacher import Arrays, Teacher


@dataclass(frozen=True)
class Source:
    """All that a process needs to fill blocks of a planned store.

    ``orders`` gives for every split the dataset index at each storage position.
    """

    spec: CacheSpec
    datasets: dict[str, Dataset]
    orders: dict[str, IntArray]
    teacher: Teacher | None
    _working: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def open(
        cls,
        spec: CacheSpec,
        device: str = "cpu",
        left_out: Mapping[str, Collection[str]] = MappingProxyType({}),
    ) -> "Source":
        """Datasets and teacher of ``spec``; reads no sample.

        ``left_out`` has ids of samples of splits that are passed over.

        Raises
        ------
        SpecError, DataError, CheckpointError
            A file is not what the spec says, or the teacher lacks a field.
        """
        layers = {n: f.layer for n, f in spec.features.items() if f.layer is not None}
        teacher = None
        if spec.teacher is not None:
            teacher = Teacher.load(spec.teacher, device, layers)
            teacher.check_fields(tuple(spec.features))
        datasets = {name: open_split(split) for name, split in spec.splits.items()}
        for name, ids in left_out.items():
            datasets[name] = without(datasets[name], ids)
        return cls(spec, datasets, _orders(spec, datasets), teacher)

    def leaving_out(self, split: str, ids: Collection[str]) -> "Source":
        """The same without some samples of a split."""
        datasets = {**self.datasets, split: without(self.datasets[split], ids)}
        return replace(self, datasets=datasets, orders=_orders(self.spec, datasets))

    def fill_block(
        self,
        writer: StoreWriter,
        split: str,
        block: int,
        before: SplitIndex | None = None,
    ) -> int:
        """Compute and write one block unless it is there; returns its samples.

        Threads may fill different blocks at once: one of them has the teacher, while
        others read samples or write. Arrays that the split already had ``before`` are
        taken over from there.

        Raises
        ------
        DataError
            A structure is not the one that was planned.
        """
        positions = writer.splits[split].block_positions(block)
        with writer.claim_block(split, block) as missing:
            if not missing:
                return len(positions)
            index = writer.splits[split]
            known = () if before is None else before.arrays.keys()
            wanted = index.fields.keys() - known
            arrays: Arrays = {}
            if wanted:
                fields = [f for f in self.fields(split) if FIELDS[f].path in wanted]
                computed = self._arrays(index, positions, fields)
                arrays = {path: computed[path] for path in wanted}
            adopted = None if before is None else Adoption(before, known, link=True)
            writer.write_block(split, block, arrays, adopted)
        return len(positions)

    def _arrays(
        self, index: SplitIndex, positions: range, fields: Sequence[str]
    ) -> Arrays:
        """Structures, labels and predictions of samples, by path."""
        chosen = self.orders[index.name][positions.start : positions.stop]
        samples = [self.datasets[index.name][int(i)] for i in chosen]
        _check_unchanged(index, positions, samples)
        values = _source_arrays(samples)
        if self.teacher is not None:
            with self._working:
                values |= self.teacher.predict(samples, fields)
        return {FIELDS[name].path: array for name, array in values.items()}

    def fields(self, split: str) -> tuple[str, ...]:
        """Fields that the teacher is asked for in ``split``."""
        return tuple(wanted_features(self.spec, self.spec.splits[split]))

    def calibrations(
        self, split: str, before: SplitIndex | None = None
    ) -> dict[str, Calibration]:
        """Encodings for the features of ``split`` that are not stored faithfully.

        Those that the split already had ``before`` stay what they are.
        """
        if self.teacher is None:
            return {}
        wanted = wanted_features(self.spec, self.spec.splits[split])
        known = {} if before is None else before.fields
        kept = {
            name: calibration
            for name in wanted
            if (calibration := known_calibration(known.get(FIELDS[name].path)))
        }
        missing = {name: part for name, part in wanted.items() if name not in kept}
        return kept | calibrate_fields(self.datasets[split], self.teacher, missing)

    def edge_counter(self, split: str) -> CountEdges | None:
        """Counts the teacher's edges, where this split is to keep them."""
        if self.teacher is None or "edge_features" not in self.fields(split):
            return None
        return self.teacher.count_edges


def _orders(spec: CacheSpec, datasets: Mapping[str, Dataset]) -> dict[str, IntArray]:
    seed = spec.store.seed
    return {name: storage_order(len(d), seed) for name, d in datasets.items()}


def _check_unchanged(
    index: SplitIndex, positions: range, samples: Sequence[Sample]
) -> None:
    """Raise unless ``samples`` are those that the store was planned for."""
    for position, sample in zip(positions, samples, strict=True):
        planned = int(index.checksums[position]), str(index.sample_ids[position])
        if planned != (sample.structure.checksum, sample.sample_id):
            raise DataError(
                f"splits.{index.name}: sample {planned[1]!r} is not what it was when "
                f"{index.place} was planned; restore the dataset or choose another "
                "store.path."
            )


def _source_arrays(samples: Sequence[Sample]) -> Arrays:
    """Structures and labels of ``samples`` by field name, node fields concatenated."""
    structures = [sample.structure for sample in samples]
    return {
        "atomic_numbers": np.concatenate([s.atomic_numbers for s in structures]),
        "positions": np.concatenate([s.positions for s in structures]),
        "fixed": np.concatenate([s.fixed for s in structures]).astype(np.uint8),
        "tags": np.concatenate([s.tags for s in structures]),
        "cell": np.stack([s.cell for s in structures]),
        "pbc": np.stack([s.pbc for s in structures]).astype(np.uint8),
        "energy": np.array([sample.energy for sample in samples]),
        "forces": np.concatenate([sample.forces for sample in samples]),
    }
