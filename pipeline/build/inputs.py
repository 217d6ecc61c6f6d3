"""What blocks are filled from: datasets in storage order and the teacher."""

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.build.calibrate import calibrate_fields
from pipeline.build.filter_samples import Demands, ValidatedDataset, drop_samples
from pipeline.build.generated import wrap_generated
from pipeline.build.plan import features_of_split
from pipeline.build.scan import CountEdges, Hashes, Scan, sample_hash, scan_dataset
from pipeline.build.scan_cache import ScanCache
from pipeline.datasets import Dataset, open_split
from pipeline.errors import DataError
from pipeline.fields import FIELDS, TEACHER_VIRIAL
from pipeline.files.atomic import is_free
from pipeline.models.normalizer import Normalizer
from pipeline.parallel.ordered_map import OrderedMap, ignore_items
from pipeline.spec.cache_spec import CacheSpec
from pipeline.store.backends import LocalBackend
from pipeline.store.calibration import Calibration, known_calibration
from pipeline.store.index import ROOT_KEY, SplitIndex
from pipeline.store.layout import IntArray, storage_order
from pipeline.store.metadata import read_root
from pipeline.store.reused_shards import ReusedShards
from pipeline.store.writer import StoreWriter
from pipeline.structure import Sample
from pipeline.teachers.jacobian import ColumnSpec
from pipeline.teachers.runner import Arrays, TeacherRunner


@dataclass(frozen=True)
class BuildInputs:
    """All that a process needs to fill blocks of a planned store.

    ``orders`` gives for every split the dataset index at each storage position,
    ``planned`` ids and reasons of samples that planned splits do without, ``known``
    what a pass over its content found when the store was planned, ``generated`` the
    datasets of generated splits with all their copies.
    """

    spec: CacheSpec
    datasets: dict[str, Dataset]
    orders: dict[str, IntArray]
    teacher: TeacherRunner | None
    sidecar: ScanCache
    planned: dict[str, list[tuple[str, str]]]
    known: dict[str, Scan]
    generated: dict[str, Dataset] = field(default_factory=dict)
    _working: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def open(
        cls,
        spec: CacheSpec,
        device: str = "cpu",
        run: OrderedMap = map,
        store: Path | None = None,
    ) -> "BuildInputs":
        """Datasets and teacher of ``spec``; reads no sample.

        Samples are listed by ``run``, unless the sidecar of the store has them. Those
        that ``store`` was planned without, by default the one of ``spec``, are passed
        over.

        Raises
        ------
        SpecError, DataError, CheckpointError
            A file is not what the spec says, or the teacher lacks a field.
        """
        layers = {n: f.layer for n, f in spec.features.items() if f.layer is not None}
        teacher = None
        if spec.teacher is not None:
            columns = ColumnSpec.of(spec.features)
            teacher = TeacherRunner.load(spec.teacher, device, layers, columns)
            teacher.check_fields(tuple(spec.features))
        place = Path(spec.store.path)
        sidecar = ScanCache(place)
        header = _header(place if store is None else store)
        planned = _left_out(header)
        datasets = {
            name: open_split(split, sidecar.lister(name, split, run))
            for name, split in spec.splits.items()
        }
        generated: dict[str, Dataset] = {}
        if teacher is not None:
            generated = wrap_generated(spec, datasets, sidecar, teacher)
        datasets |= generated
        for name in datasets.keys() & planned.keys():
            if planned[name]:
                ids = [sample_id for sample_id, _ in planned[name]]
                datasets[name] = drop_samples(datasets[name], ids)
        known = _known_scans(header, sidecar, datasets)
        orders = _orders(spec, datasets)
        return cls(spec, datasets, orders, teacher, sidecar, planned, known, generated)

    def drop(self, split: str, ids: Collection[str]) -> "BuildInputs":
        """The same without some samples of a split."""
        if not ids:
            return self
        datasets = {**self.datasets, split: drop_samples(self.datasets[split], ids)}
        return replace(self, datasets=datasets, orders=_orders(self.spec, datasets))

    def scan(
        self,
        split: str,
        count_edges: bool,
        run: OrderedMap = map,
        read: Callable[[int], None] = ignore_items,
    ) -> Scan:
        """What the store was planned for, or else a pass over the dataset.

        Edges are counted, where the split keeps any, if they are asked for. ``read`` is
        told how many more samples are done.
        """
        counter = self.edge_counter(split) if count_edges else None
        known = self.known.get(split)
        if known is not None and counter is None:
            read(len(known.structure_hashes))
            return known
        references = self.spec.splits[split].reference_energies
        return scan_dataset(
            self._validated_dataset(split), references, counter, run, read
        )

    def _validated_dataset(self, split: str) -> Dataset:
        """A dataset whose samples are refused when nobody could learn from them."""
        return ValidatedDataset(self.datasets[split], self.demands(split))

    def demands(self, split: str) -> Demands:
        """What the samples of a split must be like."""
        return Demands.of(split, self.spec.splits[split], self.teacher)

    def save_scans(self, scans: Mapping[str, Scan]) -> None:
        """Keep what passes found, once the store is known to be planned for it."""
        for name, scan in scans.items():
            if scan is not self.known.get(name):
                self.sidecar.save_scan(name, scan)
                self.known[name] = scan

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
                names = (*self.fields(split), TEACHER_VIRIAL)
                fields = [name for name in names if FIELDS[name].path in wanted]
                computed = self._arrays(index, positions, fields)
                arrays = {path: computed[path] for path in wanted}
            adopted = None if before is None else ReusedShards(before, known, link=True)
            writer.write_block(split, block, arrays, adopted)
        return len(positions)

    def _arrays(
        self, index: SplitIndex, positions: range, fields: Sequence[str]
    ) -> Arrays:
        """Structures, labels and predictions of samples, by path."""
        chosen = self.orders[index.name][positions.start : positions.stop]
        samples = [self.datasets[index.name][int(i)] for i in chosen]
        known = self.known.get(index.name)
        _check_unchanged(
            index,
            positions,
            samples,
            None if known is None else known.sample_hashes[chosen],
        )
        values = _source_arrays(samples)
        if self.teacher is not None:
            labels = self._known_labels(index.name, chosen) if not fields else None
            if labels is None:
                with self._working:
                    labels = self.teacher.predict(samples, fields)
            values |= labels
        return {FIELDS[name].path: array for name, array in values.items()}

    def _known_labels(self, split: str, chosen: IntArray) -> Arrays | None:
        """Return the teacher's labels of samples if generation has kept all of them."""
        dataset = self.datasets[split]
        known = [dataset.known_label(int(i)) for i in chosen]
        found = [label for label in known if label is not None]
        if len(found) < len(known) or not known:
            return None
        return {
            "teacher_energy": np.array([energy for energy, _ in found]),
            "teacher_forces": np.concatenate([forces for _, forces in found]),
        }

    def fields(self, split: str) -> tuple[str, ...]:
        """Fields that the teacher is asked for in ``split``."""
        return tuple(features_of_split(self.spec, self.spec.splits[split]))

    def calibrations(
        self, split: str, before: SplitIndex | None = None
    ) -> dict[str, Calibration]:
        """Encodings for the features of ``split`` that are not stored faithfully.

        Those that the split already had ``before`` stay what they are.
        """
        if self.teacher is None:
            return {}
        wanted = features_of_split(self.spec, self.spec.splits[split])
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


def _header(store: Path) -> dict[str, Any]:
    """What the store says of itself; empty where it is not planned yet."""
    return dict(read_root(LocalBackend(store))[ROOT_KEY]) if not is_free(store) else {}


def planned_paths(store: Path, split: str) -> set[str] | None:
    """Paths of the arrays that the store is planned with; None if it does not say."""
    arrays = _header(store).get("arrays", {}).get(split)
    return None if arrays is None else {str(path) for path, *_ in arrays}


def _left_out(header: Mapping[str, Any]) -> dict[str, list[tuple[str, str]]]:
    """By planned split, id and reason of the samples that it was planned without."""
    bad = header.get("provenance", {}).get("bad_samples", {})
    return {
        name: [(str(sample_id), str(reason)) for sample_id, reason in bad.get(name, [])]
        for name in header.get("splits", {})
    }


def _known_scans(
    header: Mapping[str, Any], sidecar: ScanCache, datasets: Mapping[str, Dataset]
) -> dict[str, Scan]:
    """What is kept of the datasets as they are now and as the store was planned for."""
    planned, statistics = header.get("splits", {}), header.get("label_statistics", {})
    known = {}
    for name in datasets.keys() & planned.keys() & statistics.keys():
        content, virials = planned[name]["content"], planned[name].get("virials")
        found = sidecar.scan(name, content, virials, len(datasets[name]))
        if found is not None:
            labels = Normalizer.from_dict(statistics[name])
            known[name] = Scan(
                found.structure_hashes,
                content,
                found.sample_hashes,
                labels,
                found.contents,
                None,
                virials_sha256=virials,
            )
    return known


def _check_unchanged(
    index: SplitIndex,
    positions: range,
    samples: Sequence[Sample],
    hashes: Hashes | None,
) -> None:
    """Raise unless ``samples`` are those that the store was planned for.

    The store knows ids and structures; ``hashes`` (m,) have labels, too.
    """
    changed = np.zeros(len(samples), np.bool_)
    if hashes is not None:
        changed = np.array([sample_hash(s) for s in samples], np.uint64) != hashes
    for position, sample, differs in zip(positions, samples, changed, strict=True):
        planned = int(index.checksums[position]), str(index.sample_ids[position])
        if differs or planned != (sample.structure.checksum, sample.sample_id):
            raise DataError(
                f"splits.{index.name}: sample {planned[1]!r} has changed since "
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
        "virial": np.stack([sample.virial for sample in samples]),
    }
