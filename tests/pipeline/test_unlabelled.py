"""Splits without reference labels: what is left out, and how copies are rattled."""

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase.geometry import get_distances

from pipeline.build.build import build_store, make_build_plan
from pipeline.cli.main import main
from pipeline.datasets import Dataset, open_dataset, open_split
from pipeline.datasets.rattled import CLOSEST_PAIR
from pipeline.errors import DataError, SpecError
from pipeline.spec.cache_spec import load_spec
from pipeline.spec.sections import SplitSpec
from pipeline.store.reader import FeatureStore
from pipeline.store.verify import verify_store
from pipeline.structure import Sample
from pipeline.teachers.runner import TeacherRunner
from tests.commands import run_command
from tests.frames import collision_frames, frame, write_frames
from tests.stores import build, spec_document, write_spec

RATTLE = {"copies": 3, "sigma": 0.1, "seed": 5}
BEFORE = "e2d6f524935adc14db845cfc6332e7e22f0a376a83283e45f83097443b66328a"
FOSSIL = [
    [-0.012393295764923096, -0.03655445575714111, 0.05768001079559326],
    [0.064816415309906, 0.13575780391693115, 0.9844439029693604],
]


def _split(path: Path, **changes: Any) -> SplitSpec:
    section = {"format": "extxyz", "path": str(path)} | changes
    return SplitSpec.model_validate(section)


def _rattled(path: Path, **changes: Any) -> Dataset:
    return open_split(_split(path, rattle=RATTLE, **changes))


def _same(first: Sample, second: Sample) -> bool:
    return (
        first.sample_id == second.sample_id
        and first.structure.checksum == second.structure.checksum
    )


@pytest.fixture
def slab(tmp_path: Path) -> Path:
    """A periodic frame whose first two of five atoms are fixed, and one that is not."""
    places = [[0, 0, 0], [2, 0, 0], [1, 1.5, 0.5], [1, 1, 2], [0, 0, 2.5]]
    columns = {"fixed": ("I", [1, 1, 0, 0, 0]), "tags": ("I", [0, 0, 1, 2, 2])}
    header = 'pbc="T T F" Lattice="4 0 0 0 4 0 0 0 9"'
    symbols = ["C", "C", "O", "H", "H"]
    frames = [
        frame("s", symbols, places, header=header, columns=columns, energy=-3.0),
        *collision_frames(2),
    ]
    return write_frames(tmp_path / "slab.extxyz", frames)


def test_labels_of_the_source_are_left_out(collisions: Callable[..., Path]) -> None:
    path = collisions(4)
    source, found = open_dataset("extxyz", str(path)), open_split(_split(path))
    bare = open_split(_split(path, labels="none"))
    assert list(bare.sample_ids) == list(source.sample_ids)
    assert np.array_equal(bare.n_atoms, source.n_atoms)
    for index in range(4):
        assert _same(bare[index], source[index])
        assert np.isfinite(found[index].energy)
        assert np.isnan(bare[index].energy)
        assert bare[index].forces.shape == source[index].forces.shape
        assert np.isnan(bare[index].forces).all()


def test_copies_move_free_atoms_only(slab: Path) -> None:
    source, copies = open_dataset("extxyz", str(slab)), _rattled(slab)
    assert len(copies) == 9
    assert copies.sample_ids[:4] == [
        "s~r0",
        "s~r1",
        "s~r2",
        f"{source.sample_ids[1]}~r0",
    ]
    assert copies.n_atoms.tolist() == np.repeat(source.n_atoms, 3).tolist()
    for index in range(9):
        before, copy = source[index // 3].structure, copies[index]
        after = copy.structure
        assert copy.sample_id == copies.sample_ids[index]
        moved = (after.positions != before.positions).any(axis=1)
        assert np.array_equal(moved, ~before.fixed)
        for name in ("atomic_numbers", "cell", "pbc", "tags", "fixed"):
            assert np.array_equal(getattr(after, name), getattr(before, name)), name
        assert np.isnan(copy.energy)
        assert np.isnan(copy.forces).all()


def test_displacements_are_gaussians_of_the_given_width(
    collisions: Callable[..., Path],
) -> None:
    path = collisions(12)
    source = open_dataset("extxyz", str(path))
    copies = open_split(_split(path, rattle={"copies": 30, "sigma": 0.02}))
    found = np.concatenate(
        [
            (copies[i].structure.positions - source[i // 30].structure.positions)
            for i in range(len(copies))
        ]
    ).ravel()
    assert abs(found.mean()) < 5 * 0.02 / np.sqrt(len(found))
    assert found.std() == pytest.approx(0.02, rel=0.03)
    within = [np.mean(abs(found) < k * 0.02) for k in (1, 2, 3)]
    assert within == pytest.approx([0.6827, 0.9545, 0.9973], abs=0.01)


def test_copies_depend_on_seed_sample_and_number_alone(
    collisions: Callable[..., Path],
) -> None:
    """Not on order, thread, process, or which other samples there are."""
    path = collisions(6)
    copies = _rattled(path)
    forwards = [copies[index] for index in range(18)]
    backwards = [pickle.loads(pickle.dumps(copies))[i] for i in reversed(range(18))]
    with ThreadPoolExecutor(4) as pool:
        threaded = list(pool.map(copies.__getitem__, range(18)))
    for other in (backwards[::-1], threaded):
        assert all(map(_same, forwards, other))
    assert _same(copies[-1], forwards[-1])
    chosen = _rattled(path, offset=1, every=2, limit=2)
    assert [s.split("~")[0] for s in chosen.sample_ids[::3]] == [
        copies.sample_ids[k].split("~")[0] for k in (3, 9)
    ]
    assert all(_same(chosen[k], forwards[3 + k]) for k in range(3))
    more = open_split(_split(path, rattle=RATTLE | {"copies": 5}))
    assert all(_same(more[5 + k], forwards[3 + k]) for k in range(3))
    checksums = {sample.structure.checksum for sample in forwards}
    assert len(checksums) == 18
    other = open_split(_split(path, rattle=RATTLE | {"seed": 6}))
    assert checksums.isdisjoint(other[k].structure.checksum for k in range(18))


def test_copies_are_the_same_in_every_version(tmp_path: Path) -> None:
    """Positions written down when the format began; stores are extended by them."""
    path = write_frames(
        tmp_path / "d.extxyz", [frame("w", list("OH"), [[0, 0, 0], [0, 0, 1]])]
    )
    found = _rattled(path)[1].structure.positions
    assert found.tolist() == FOSSIL


def test_no_copy_has_atoms_on_top_of_each_other(tmp_path: Path) -> None:
    """Two atoms 0.55 Å apart across the boundary of the cell collide in most draws."""
    places = [[0.1, 2, 2], [3.55, 2, 2]]
    header = 'pbc="T T T" Lattice="4 0 0 0 4 0 0 0 4"'
    path = write_frames(
        tmp_path / "d.extxyz", [frame("x", ["H", "H"], places, header=header)]
    )
    copies = open_split(_split(path, rattle={"copies": 40, "sigma": 0.2}))
    nearest = []
    for index in range(40):
        structure = copies[index].structure
        _, distances = get_distances(
            structure.positions, cell=structure.cell, pbc=structure.pbc
        )
        nearest.append(distances[0, 1])
    assert min(nearest) > CLOSEST_PAIR
    assert min(nearest) < 0.6


def test_samples_that_cannot_be_rattled_are_named(tmp_path: Path) -> None:
    columns = {"fixed": ("I", [1, 1])}
    near = frame("near", ["H", "H"], [[0, 0, 0], [0, 0, 0.3]], columns=columns)
    held = frame("held", ["H", "O"], [[0, 0, 0], [0, 0, 1]], columns=columns)
    third = frame(
        "third",
        list("HHO"),
        [[0, 0, 0], [0, 0, 0.3], [0, 2, 0]],
        columns={"fixed": ("I", [1, 1, 0])},
    )
    path = write_frames(tmp_path / "d.extxyz", [near, held, third])
    copies = _rattled(path)
    with pytest.raises(DataError, match=r"'held~r0' has fixed atoms only"):
        copies[3]
    with pytest.raises(DataError, match=r"d\.extxyz: sample 'third~r2'.*rattle\.sigma"):
        copies[8]
    with pytest.raises(IndexError):
        copies[9]


REFUSED = [
    ({"rattle": RATTLE, "labels": "all"}, True, "splits.more: labels.*rattled"),
    ({"rattle": RATTLE}, False, "splits.more has neither.*teacher"),
    ({"labels": "none"}, False, "splits.more has neither.*teacher"),
    ({"labels": "some"}, True, "splits.more.labels"),
    ({"rattle": {"copies": 0, "sigma": 0.1}}, True, "rattle.copies"),
    ({"rattle": {"copies": 1, "sigma": 0}}, True, "rattle.sigma"),
    ({"rattle": {"copies": 1, "sigma": ".nan"}}, True, "rattle.sigma"),
    ({"rattle": {"copies": 1}}, True, "rattle.sigma"),
    ({"rattle": RATTLE | {"sed": 1}}, True, "'sed'|rattle.sed"),
]


@pytest.mark.parametrize(("changes", "teacher", "words"), REFUSED)
def test_contradictions_are_refused_when_the_spec_is_read(
    changes: dict[str, Any],
    teacher: bool,
    words: str,
    tmp_path: Path,
    collisions: Callable[..., Path],
    teacher_file: Path,
) -> None:
    more = {"format": "extxyz", "path": str(collisions(2))} | changes
    splits = {"train": collisions(4), "more": more}
    given = teacher_file if teacher else None
    document = spec_document(splits, tmp_path / "s.zarr", given)
    with pytest.raises(SpecError, match=words) as error:
        load_spec(write_spec(tmp_path / "s.yaml", document))
    assert "\n" not in str(error.value)


def _document(
    folder: Path, data: Path, teacher: Path, **splits: dict[str, Any]
) -> dict[str, Any]:
    sections = {
        name: {"format": "extxyz", "path": str(data)} | part
        for name, part in splits.items()
    }
    return spec_document(sections, folder / "s.zarr", teacher)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, teacher_file: Path) -> FeatureStore:
    """Labelled samples, some without labels, and copies in several blocks."""
    folder = tmp_path_factory.mktemp("unlabelled")
    data = write_frames(folder / "d.extxyz", collision_frames(40))
    document = _document(
        folder,
        data,
        teacher_file,
        train={"limit": 12},
        bare={"offset": 12, "labels": "none"},
        rattled={"rattle": {"copies": 5, "sigma": 0.05}},
    )
    return build(write_spec(folder / "s.yaml", document))


def test_a_store_has_the_teachers_predictions_of_every_copy(
    store: FeatureStore, teacher_file: Path
) -> None:
    split = store.splits["rattled"]
    assert split.n_blocks > 1
    assert not verify_store(store.path)
    spec = load_spec(store.path.with_name("s.yaml"))
    copies = open_split(spec.splits["rattled"])
    assert spec.teacher is not None
    teacher = TeacherRunner.load(spec.teacher)
    places = {name: k for k, name in enumerate(copies.sample_ids)}
    paths = ["structures/positions", "teacher/energy", "teacher/forces"]
    for position in (0, 57, 199):
        copy = copies[places[str(split.sample_ids[position])]]
        expected = teacher.predict([copy], ())
        found = split.read([position], [*paths, "labels/energy", "labels/forces"])
        assert np.array_equal(found[paths[0]], copy.structure.positions)
        assert found[paths[1]] == pytest.approx(expected["teacher_energy"], rel=1e-6)
        assert found[paths[2]] == pytest.approx(expected["teacher_forces"], abs=1e-4)
        assert np.isnan(found["labels/energy"]).all()
        assert np.isnan(found["labels/forces"]).all()


def test_blocks_of_another_process_and_order_are_the_same(
    store: FeatureStore, tmp_path: Path
) -> None:
    """The last blocks first, by a process of their own."""
    other = tmp_path / "other.zarr"
    spec = store.path.with_name("s.yaml")
    program = "from pipeline.cli.main import main; main()"
    arguments = ["build", str(spec), "--out", str(other), "--blocks", "1:99"]
    subprocess.run([sys.executable, "-c", program, *arguments], check=True)
    assert build_store(load_spec(spec, [f"store.path={other}"]))
    found = FeatureStore.open(other)
    assert found.fingerprint == store.fingerprint
    split, same = store.splits["rattled"], found.splits["rattled"]
    paths = ["structures/positions", "labels/forces"]
    positions = np.arange(len(split))
    first, second = split.read(positions, paths), same.read(positions, paths)
    for path in paths:
        assert np.array_equal(first[path], second[path], equal_nan=True)


def test_info_counts_the_samples_with_labels(
    store: FeatureStore, tmp_path: Path
) -> None:
    told = json.loads(run_command(main, ["info", store.path, "--json"]).stdout)
    assert {name: split["labelled"] for name, split in told["splits"].items()} == {
        "train": {"energy": 12, "forces": 12},
        "bare": {"energy": 0, "forces": 0},
        "rattled": {"energy": 0, "forces": 0},
    }
    lines = run_command(main, ["info", store.path]).stdout.splitlines()
    bare, _, train = [line for line in lines if "blocks; " in line]
    assert train.startswith("split train: 12 samples, ")
    assert train.endswith("; 12 samples have energies, 12 have forces")
    assert bare.endswith("; the source has no labels")


def test_info_counts_samples_with_energies_only(tmp_path: Path) -> None:
    places = [[0, 0, 0], [0, 0, 1]]
    frames = [
        frame("both", list("OH"), places, energy=-3.0, forces=places),
        frame("energy", list("OH"), places, energy=-3.1),
        frame("nothing", list("OH"), places),
    ]
    data = write_frames(tmp_path / "d.extxyz", frames)
    document = spec_document({"train": data}, tmp_path / "s.zarr")
    found = build(write_spec(tmp_path / "s.yaml", document))
    told = json.loads(run_command(main, ["info", found.path, "--json"]).stdout)
    assert told["splits"]["train"]["labelled"] == {"energy": 2, "forces": 1}


def test_energies_that_are_left_out_are_not_compared(
    tmp_path: Path, teacher_file: Path
) -> None:
    """The source of the second split has energies of another kind."""
    texts = collision_frames(8)
    train = write_frames(tmp_path / "a.extxyz", texts[:4])
    other = [text.replace("energy=-", "energy=-9") for text in texts[4:]]
    more = {"format": "extxyz", "path": str(write_frames(tmp_path / "b.extxyz", other))}
    document = spec_document(
        {"train": train, "more": more}, tmp_path / "s.zarr", teacher_file
    )
    spec = write_spec(tmp_path / "s.yaml", document)
    with pytest.raises(DataError, match="different kinds"):
        make_build_plan(load_spec(spec))
    for change in (
        "splits.more.labels=none",
        "splits.more.rattle={copies: 1, sigma: 0.1}",
    ):
        attributes = make_build_plan(load_spec(spec, [change])).attributes
        statistics = attributes["label_statistics"]
        assert statistics["more"]["force_std"] == 1.0
        assert statistics["train"]["force_std"] != 1.0


def test_fingerprints_know_what_is_left_out_and_how_copies_are_made(
    tmp_path: Path, collisions: Callable[..., Path], teacher_file: Path
) -> None:
    document = spec_document(
        {"train": collisions(4)}, tmp_path / "s.zarr", teacher_file
    )
    spec = write_spec(tmp_path / "s.yaml", document)

    def fingerprint(*changes: str) -> str:
        return str(make_build_plan(load_spec(spec, changes)).attributes["fingerprint"])

    rattle = "splits.train.rattle="
    found = {
        fingerprint(change)
        for change in (
            "store.seed=0",
            "splits.train.labels=none",
            f"{rattle}{{copies: 1, sigma: 0.1}}",
            f"{rattle}{{copies: 2, sigma: 0.1}}",
            f"{rattle}{{copies: 1, sigma: 0.11}}",
            f"{rattle}{{copies: 1, sigma: 0.1, seed: 1}}",
        )
    }
    assert len(found) == 6
    assert fingerprint("splits.train.labels=all") == fingerprint()
    same = f"{rattle}{{copies: 1, sigma: 0.1, seed: 0}}"
    assert fingerprint(same, "splits.train.labels=none") in found


def test_specs_without_these_keys_keep_their_fingerprints(
    tmp_path: Path, collisions: Callable[..., Path]
) -> None:
    """Written down before the keys were there."""
    document = spec_document({"train": collisions(4)}, tmp_path / "s.zarr")
    spec = load_spec(write_spec(tmp_path / "s.yaml", document))
    assert make_build_plan(spec).attributes["fingerprint"] == BEFORE


def test_copies_are_added_to_a_finished_store(
    tmp_path: Path, teacher_file: Path
) -> None:
    data = write_frames(tmp_path / "d.extxyz", collision_frames(6))
    document = spec_document({"train": data}, tmp_path / "s.zarr", teacher_file)
    spec = write_spec(tmp_path / "s.yaml", document)
    before = build(spec).splits["train"].read([0], ["labels/energy"])
    rattle = "rattle: {copies: 2, sigma: 0.1}"
    change = f"splits.more={{format: extxyz, path: {data}, {rattle}}}"
    done = run_command(main, ["add-field", spec, "--device", "cpu", "--set", change])
    assert done.exit_code == 0, done.output
    store = FeatureStore.open(tmp_path / "s.zarr")
    assert len(store.splits["more"]) == 12
    assert store.splits["train"].read([0], ["labels/energy"]) == before
    assert build_store(load_spec(spec, [change]))
