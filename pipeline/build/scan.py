"""The pass over the content of a dataset: every sample is read once, in its order."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from pipeline.build.contents import Contents
from pipeline.datasets import Dataset
from pipeline.datasets.base import split_pieces
from pipeline.datasets.label_statistics import FOLD, LabelSums
from pipeline.errors import DataError
from pipeline.graphs.neighbors import check_cell
from pipeline.models.normalizer import Normalizer
from pipeline.parallel.ordered_map import OrderedMap, ignore_items
from pipeline.store.layout import IntArray
from pipeline.structure import Sample, Structure

CountEdges = Callable[[Structure], int]
Hashes = npt.NDArray[np.uint64]


@dataclass(frozen=True, eq=False)
class Scan:
    """What one pass over a dataset tells, all in its own order.

    ``structure_hashes`` (n,) of the structures, ``content_sha256`` over ids,
    structures, energies and forces, ``virials_sha256`` over virials where there are
    some, ``sample_hashes`` (n,) of all of these of each sample, ``labels`` their
    statistics, ``contents`` counts of what the samples have, ``n_edges`` (n,)
    where they were counted.
    """

    structure_hashes: Hashes
    content_sha256: str
    sample_hashes: Hashes
    labels: Normalizer
    contents: Contents
    n_edges: IntArray | None
    # Elements whose reference energies the compositions leave open.
    undetermined: tuple[int, ...] = ()
    virials_sha256: str | None = None


@dataclass(frozen=True, eq=False)
class _ScanPart:
    """What a pass tells of some samples; what is hashed of them, and their virials."""

    content: bytes
    virials: bytes
    structure_hashes: Hashes
    sample_hashes: Hashes
    labels: LabelSums
    contents: Contents
    n_edges: IntArray


def scan_dataset(
    dataset: Dataset,
    reference_energies: str,
    count_edges: CountEdges | None = None,
    run: OrderedMap = map,
    read: Callable[[int], None] = ignore_items,
) -> Scan:
    """Read every sample of ``dataset`` once, in the processes of ``run``.

    The result does not depend on how many these are. ``read`` is told how many more
    samples are.

    Raises
    ------
    DataError
        A sample cannot be read or its edges not be counted; names it.
    """
    # Apart, so that virials can be added to stores of earlier versions.
    content, virials = hashlib.sha256(), hashlib.sha256()
    labels = LabelSums()
    contents = Contents()
    columns: list[tuple[Hashes, Hashes, IntArray]] = []
    if dataset.keeps_samples and count_edges is None:
        run = map  # sending samples takes longer than hashing them
    scan = partial(_scan_part, dataset, count_edges)
    for part in run(scan, split_pieces(range(len(dataset)), FOLD)):
        content.update(part.content)
        virials.update(part.virials)
        labels.merge(part.labels)
        contents += part.contents
        columns.append((part.structure_hashes, part.sample_hashes, part.n_edges))
        read(len(part.structure_hashes))
    structure_hashes, sample_hashes, n_edges = map(
        np.concatenate, zip(*columns, strict=True)
    )
    return Scan(
        structure_hashes,
        content.hexdigest(),
        sample_hashes,
        labels.normalizer(reference_energies),
        contents.named(dataset),
        None if count_edges is None else n_edges,
        labels.undetermined,
        virials.hexdigest() if contents.virial else None,
    )


def sample_hash(sample: Sample) -> int:
    """64-bit hash of all that is stored of ``sample``: id, structure and labels."""
    return _hash(_content(sample, sample.structure.checksum) + _virial(sample))


def _scan_part(
    dataset: Dataset, count_edges: CountEdges | None, indices: range
) -> _ScanPart:
    samples = [dataset[index] for index in indices]
    for sample in samples:
        _require_cell(sample)
    checksums = [sample.structure.checksum for sample in samples]
    contents = [_content(*pair) for pair in zip(samples, checksums, strict=True)]
    virials = [_virial(sample) for sample in samples]
    labels = LabelSums()
    labels.add(samples)
    counts = (
        [] if count_edges is None else [_count_edges(s, count_edges) for s in samples]
    )
    return _ScanPart(
        b"".join(contents),
        b"".join(
            number.to_bytes(8, "little") + virial
            for number, virial in zip(indices, virials, strict=True)
            if virial
        ),
        np.array(checksums, np.uint64),
        np.array(
            [_hash(c + v) for c, v in zip(contents, virials, strict=True)], np.uint64
        ),
        labels,
        Contents.of(samples, indices.start),
        np.array(counts, np.int64),
    )


def _require_cell(sample: Sample) -> None:
    try:
        check_cell(sample.structure)
    except DataError as error:
        raise DataError(f"Sample {sample.sample_id!r}: {error}") from None


def _content(sample: Sample, checksum: int) -> bytes:
    structure = sample.structure
    return b"".join(
        (
            sample.sample_id.encode() + b"\0",
            checksum.to_bytes(8, "little"),
            structure.pbc.tobytes(),
            structure.tags.tobytes(),
            structure.fixed.tobytes(),
            np.float64(sample.energy).tobytes(),
            np.ascontiguousarray(sample.forces).tobytes(),
        )
    )


def _virial(sample: Sample) -> bytes:
    """The label's numbers; nothing if there are none, as in earlier versions."""
    return b"" if np.isnan(sample.virial).any() else sample.virial.tobytes()


def _hash(content: bytes) -> int:
    digest = hashlib.blake2b(content, digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _count_edges(sample: Sample, count_edges: CountEdges) -> int:
    try:
        return count_edges(sample.structure)
    except DataError as error:
        raise DataError(f"Sample {sample.sample_id!r}: {error}") from None
