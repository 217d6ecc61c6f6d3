"""Passes over datasets: alike in one process and in several, and not made twice."""

import asyncio
import os
import re
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.build import filter_samples as screening
from pipeline.build import inputs as source
from pipeline.build import scan as scanning
from pipeline.build.build import build_store, make_build_plan
from pipeline.build.filter_samples import Demands, find_bad_samples
from pipeline.build.scan import Scan, scan_dataset
from pipeline.build.worker import FillOptions
from pipeline.datasets import (
    Dataset,
    IndexedDataset,
    Listing,
    aselmdb,
    extxyz,
    oc20_lmdb,
    open_dataset,
)
from pipeline.datasets.label_statistics import LabelSums
from pipeline.errors import DataError, SpecError, WorkersError
from pipeline.graphs.neighbors import NeighborSpec, neighbor_edges
from pipeline.parallel import local_cluster as clusters
from pipeline.parallel.ordered_map import OrderedMap, processes
from pipeline.spec.cache_spec import load_spec
from pipeline.spec.sections import TeacherSpec
from pipeline.store.reader import FeatureStore
from pipeline.structure import Structure
from pipeline.teachers.runner import TeacherRunner
from tests.frames import DEMO, collision_frames, frame, write_frames
from tests.pipeline.oc20_files import (
    Slab,
    aselmdb_row,
    packed_json,
    pyg2,
    pyg_fields,
    slabs,
    write_lmdb,
)
from tests.pipeline.tasks import die_at_seven, refuse_seven
from tests.stores import build, spec_document, write_spec

RULE = NeighborSpec(4.0, 12, symmetric=True)


@pytest.fixture(scope="module")
def run() -> Iterator[OrderedMap]:
    """Two processes, which all tests of this module share."""
    with processes(2) as made:
        yield made


def _count(structure: Structure) -> int:
    return len(neighbor_edges(structure, RULE))


def test_results_come_in_order_and_errors_in_their_place(run: OrderedMap) -> None:
    assert list(run(refuse_seven, range(7))) == [n * n for n in range(7)]
    found = run(refuse_seven, range(50))
    assert [next(found) for _ in range(7)] == [n * n for n in range(7)]
    with pytest.raises(DataError, match="Number 7 is refused"):
        next(found)


def test_only_some_items_are_taken_ahead(run: OrderedMap) -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(1000):
            taken.append(number)
            yield number + 8

    found = run(refuse_seven, items())
    next(found)
    found.close()
    assert len(taken) < 10


def test_passes_outlive_a_death(tmp_path: Path) -> None:
    with processes(1) as alone:
        found = alone(partial(die_at_seven, tmp_path, 1), range(18))
        assert list(found) == [n * n for n in range(18)]
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.slow
def test_passes_do_not_outlive_one_death_after_the_other(tmp_path: Path) -> None:
    with processes(1) as alone:
        found = alone(partial(die_at_seven, tmp_path, 99), range(18))
        with pytest.raises(WorkersError, match="fewer --workers$"):
            list(found)
    # An item may also be lost before its process began with it.
    assert 1 <= len(list(tmp_path.iterdir())) <= 4


def test_a_worker_that_is_given_up_is_replaced() -> None:
    """As the cluster gives up, by itself, one that takes long to start again."""
    with clusters.local_workers(1, 1) as client:
        given_up = client.submit(os.getpid, pure=False).result()
        client.sync(_give_up_all, client.cluster)
        assert client.submit(os.getpid, pure=False).result() != given_up


async def _give_up_all(cluster: Any) -> None:
    """What a cluster does with workers that are lost."""
    # A worker takes tasks before the cluster has it in its list.
    while not cluster.workers:
        await asyncio.sleep(0.01)
    while cluster.workers:
        _, nanny = cluster.workers.popitem()
        await nanny.close()


def _write_aselmdb(folder: Path, made: list[Slab]) -> Path:
    """Two files, the ids of whose rows are partly their places."""
    folder.mkdir()
    for name, part in (("a", made[:11]), ("b", made[11:])):
        rows = [aselmdb_row(slab) for slab in part]
        rows[3] |= {"data": {}}
        packed = {str(i + 1): packed_json(row) for i, row in enumerate(rows)}
        write_lmdb(folder / f"{name}.aselmdb", packed)
    return folder


def _write_lmdb(folder: Path, made: list[Slab]) -> Path:
    folder.mkdir()
    for name, part in (("a", made[:9]), ("b", made[9:])):
        values = {str(i): pyg2(pyg_fields(slab)) for i, slab in enumerate(part)}
        write_lmdb(folder / f"{name}.lmdb", values, length=len(part))
    return folder


def _write_texts(folder: Path, made: list[Slab]) -> Path:
    folder.mkdir()
    texts = collision_frames(len(made))
    write_frames(folder / "1.extxyz", texts[:5])
    write_frames(folder / "2.extxyz.xz", texts[5:14])
    write_frames(folder / "10.extxyz.gz", texts[14:])
    return folder


WRITERS: dict[str, Callable[[Path, list[Slab]], Path]] = {
    "aselmdb": _write_aselmdb,
    "oc20_lmdb": _write_lmdb,
    "extxyz": _write_texts,
    "oc20_raw": _write_texts,
}


@pytest.fixture(params=WRITERS)
def files(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    """Format and folder of a dataset of 20 samples in several files."""
    return request.param, WRITERS[request.param](tmp_path / "data", slabs(20))


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces so small that every process gets several of them."""
    for module in (aselmdb, extxyz, oc20_lmdb):
        monkeypatch.setattr(module, "PIECE", 3)
    monkeypatch.setattr(scanning, "FOLD", 3)


def _listed_by(run: OrderedMap) -> Callable[[IndexedDataset], Listing]:
    return lambda dataset: dataset.list_samples(run)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("chosen", [{}, {"offset": 2, "every": 3, "limit": 4}])
def test_processes_list_and_scan_as_one_does(
    files: tuple[str, Path], chosen: dict[str, int], run: OrderedMap
) -> None:
    format, folder = files
    alone = open_dataset(format, str(folder), **chosen)
    shared = open_dataset(format, str(folder), lister=_listed_by(run), **chosen)
    assert list(shared.sample_ids) == list(alone.sample_ids)
    assert shared.n_atoms.tolist() == alone.n_atoms.tolist()
    _assert_alike(
        scan_dataset(shared, "per_element", _count, run),
        scan_dataset(alone, "per_element", _count),
    )
    _assert_alike(scan_dataset(shared, "none", None, run), scan_dataset(alone, "none"))


def _assert_alike(found: Scan, wanted: Scan) -> None:
    assert found.content_sha256 == wanted.content_sha256
    assert found.labels == wanted.labels
    for name in ("structure_hashes", "sample_hashes", "n_edges"):
        assert np.array_equal(getattr(found, name), getattr(wanted, name)), name


def test_every_part_of_a_sample_has_a_say_in_its_hash(
    collisions: Callable[..., Path], tmp_path: Path
) -> None:
    path = collisions(12)
    hashes = scan_dataset(open_dataset("extxyz", str(path)), "none").sample_hashes
    assert len(set(hashes.tolist())) == 12
    text = path.read_text()
    energy = text.split("energy=")[1].split()[0]
    path.write_text(text.replace(f"energy={energy}", "energy=-1.5", 1))
    changed = scan_dataset(open_dataset("extxyz", str(path)), "none").sample_hashes
    assert (changed != hashes).tolist() == [True] + [False] * 11


@pytest.mark.parametrize("sizes", [(30,), (13, 17), (1, 2, 27)])
def test_sums_of_parts_are_those_of_the_whole(
    sizes: tuple[int, ...], collisions: Callable[..., Path]
) -> None:
    dataset = open_dataset("extxyz", str(collisions(30)))
    samples = [dataset[i] for i in range(30)]
    merged = LabelSums()
    for first, size in zip(np.cumsum([0, *sizes]), sizes, strict=False):
        part = LabelSums()
        part.add(samples[first : first + size])
        merged.merge(part)
    found = merged.normalizer("per_element")
    whole = LabelSums()
    whole.add(samples)
    wanted = whole.normalizer("per_element")
    assert found.element_references == pytest.approx(wanted.element_references)
    assert found.force_std == pytest.approx(wanted.force_std)
    assert found.energy_mean == pytest.approx(wanted.energy_mean, abs=1e-9)


def _spec(folder: Path, format: str, data: Path, **more: Any) -> Path:
    split = {"format": format, "path": str(data), **more}
    document = spec_document({"train": split}, folder / "s.zarr")
    return write_spec(folder / "s.yaml", document)


def _never(*args: object, **options: object) -> None:
    raise AssertionError("this pass was made already")


def _refuse_passes(monkeypatch: pytest.MonkeyPatch, dataset: Dataset) -> None:
    """Let nobody list or scan; formats that keep samples in memory must list."""
    monkeypatch.setattr(source, "scan_dataset", _never)
    if not dataset.keeps_samples:
        monkeypatch.setattr(type(dataset), "list_samples", _never)


def test_what_was_found_is_not_sought_again(
    files: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = load_spec(_spec(tmp_path, *files))
    assert not build_store(spec, filling=FillOptions(blocks=(7, 8)))
    job = make_build_plan(spec)
    _refuse_passes(monkeypatch, job.source.datasets["train"])
    again = make_build_plan(spec)
    assert again.attributes == job.attributes
    for index in range(20):
        sample = job.source.datasets["train"][index]
        same = again.source.datasets["train"][index]
        assert same.structure.checksum == sample.structure.checksum
        assert (same.sample_id, same.energy) == (sample.sample_id, sample.energy)
    assert build_store(spec)
    assert len(FeatureStore.open(spec.store.path).splits["train"]) == 20


def test_passes_are_made_again_where_a_file_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = _write_aselmdb(tmp_path / "data", slabs(20))
    path = _spec(tmp_path, "aselmdb", data)
    spec = load_spec(path)
    before = make_build_plan(spec).attributes["fingerprint"]
    build_store(spec, filling=FillOptions(blocks=(7, 8)))
    os.utime(data / "a.aselmdb", (1, 1))
    made: list[str] = []
    monkeypatch.setattr(
        source,
        "scan_dataset",
        lambda *args: made.append("scan") or scan_dataset(*args),
    )
    assert make_build_plan(spec).attributes["fingerprint"] == before
    assert made == ["scan"]
    # Other samples than the store was planned for are refused.
    shutil.rmtree(data)
    _write_aselmdb(data, slabs(20)[::-1])
    with pytest.raises(Exception, match="was planned for another spec"):
        build_store(spec)
    assert made == ["scan"] * 2


@pytest.mark.parametrize("file", ["train.listing.npz", "train.scan.npz"])
@pytest.mark.parametrize("damage", [b"", b"PK nonsense", None])
def test_a_damaged_sidecar_is_made_anew(
    file: str, damage: bytes | None, tmp_path: Path
) -> None:
    data = _write_aselmdb(tmp_path / "data", slabs(20))
    spec = load_spec(_spec(tmp_path, "aselmdb", data))
    build_store(spec, filling=FillOptions(blocks=(7, 8)))
    kept = tmp_path / "s.zarr.scan-cache" / file
    sound = kept.read_bytes()
    if damage is None:
        content = bytearray(sound)
        with np.load(kept) as columns:
            column = columns["hashes" if "scan" in file else "n_atoms"]
        content[sound.index(column.tobytes())] ^= 255
        damage = bytes(content)
    kept.write_bytes(damage)
    assert build_store(spec)
    assert kept.read_bytes() == sound


def test_a_label_that_changes_unseen_is_refused_when_its_block_is_filled(
    tmp_path: Path,
) -> None:
    """Same structures, sizes and times of files: only the hash of samples can tell."""
    made = slabs(20)
    data = tmp_path / "d.aselmdb"

    def write(energy: float) -> None:
        data.unlink(missing_ok=True)
        rows = [aselmdb_row(slab) | {"energy": 1.5} for slab in made]
        rows[4] |= {"energy": energy}
        packed = {str(i + 1): packed_json(row) for i, row in enumerate(rows)}
        write_lmdb(data, packed)
        os.utime(data, (1e9, 1e9))

    write(1.25)
    size = data.stat().st_size
    spec = load_spec(_spec(tmp_path, "aselmdb", data))
    build_store(spec, filling=FillOptions(blocks=(7, 8)))
    write(1.75)
    assert data.stat().st_size == size
    name = f"{made[4].sid}_{made[4].fid}"
    with pytest.raises(DataError, match=f"sample '{name}' has changed since"):
        build_store(spec)
    write(1.25)
    assert build_store(spec)


def test_planning_by_several_processes_gives_the_same_store(
    tmp_path: Path, run: OrderedMap, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = _write_lmdb(tmp_path / "data", slabs(20))
    alone = make_build_plan(load_spec(_spec(tmp_path, "oc20_lmdb", data)))
    monkeypatch.setattr("pipeline.build.build.processes", partial(_given, run))
    shared = make_build_plan(load_spec(_spec(tmp_path, "oc20_lmdb", data)), workers=2)
    assert shared.attributes == alone.attributes


def test_bad_samples_are_found_by_any_number_of_processes(
    tmp_path: Path, run: OrderedMap, teacher_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In order and named alike, with at most four samples looked at in one go."""
    frames = collision_frames(20)
    for place in (3, 9, 17):
        frames.insert(place, frame(f"alone{place}", ["H"], [[0, 0, 0]], energy=-13.0))
    frames.insert(5, frame("heavy", ["U", "H"], [[0, 0, 0], [1, 0, 0]], energy=-13.0))
    data = write_frames(tmp_path / "d.extxyz", frames)
    dataset = open_dataset("extxyz", str(data))
    teacher = TeacherRunner.load(
        TeacherSpec(model="painn", checkpoint=str(teacher_file))
    )
    pieces: list[range] = []

    def counting(function: Callable[..., Any], items: Any) -> Iterator[Any]:
        pieces.extend(items)
        return run(function, items)

    demands = Demands("train", teacher.potential.elements, teacher.potential.graph_rule)
    alone = find_bad_samples(dataset, demands)
    assert [name for name, _ in alone] == ["alone3", "heavy", "alone9", "alone17"]
    for sample_id, reason in alone:
        sample = dataset[dataset.sample_ids.index(sample_id)]
        with pytest.raises(DataError, match=re.escape(reason)):
            teacher.potential.graph(sample)
    monkeypatch.setattr(screening, "_PIECE", 4)
    assert find_bad_samples(dataset, demands, counting) == alone
    assert len(pieces) == 6
    spec = load_spec(_spec(tmp_path, "extxyz", data, on_bad_sample="skip"))
    asked: list[Any] = []
    monkeypatch.setattr("pipeline.build.build.processes", partial(_given, run))
    monkeypatch.setattr(
        "pipeline.build.build.find_bad_samples",
        lambda *given: asked.append(given[2]) or [],
    )
    make_build_plan(spec, workers=2)
    assert asked == [run]


class _given:
    """The processes there are, in place of new ones."""

    def __init__(self, run: OrderedMap, workers: int) -> None:
        self.run = run

    def __enter__(self) -> OrderedMap:
        return self.run

    def __exit__(self, *error: object) -> None:
        pass


def test_content_of_a_dataset_has_the_digest_that_it_always_had() -> None:
    """Else no store that is there could be continued."""
    path = str(DEMO / "collisions_val.extxyz.xz")
    found = scan_dataset(open_dataset("extxyz", path, limit=60), "none").content_sha256
    assert found == "c62b80cb445ef4ada802e9a59d65903f8f46013e5096700255f3b754f7c30eb5"


def test_credentials_in_a_url_are_refused(tmp_path: Path) -> None:
    path = _spec(tmp_path, "extxyz", Path("x"))
    override = "splits.train.path=https://me:secret@host/x.extxyz"
    with pytest.raises(SpecError, match=r"splits\.train\.path has credentials"):
        load_spec(path, [override])
    override = "splits.train.path=https://host/x.extxyz?X-Amz-Signature=123"
    with pytest.raises(SpecError, match=r"splits\.train\.path has a query"):
        load_spec(path, [override])


def test_a_store_of_labels_has_a_sidecar_that_may_be_removed(tmp_path: Path) -> None:
    data = _write_lmdb(tmp_path / "data", slabs(20))
    path = _spec(tmp_path, "oc20_lmdb", data)
    store = build(path)
    shutil.rmtree(tmp_path / "s.zarr.scan-cache")
    assert build(path).fingerprint == store.fingerprint
