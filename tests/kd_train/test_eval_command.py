"""``kd-eval`` as it is typed, against the run's own results and plain numpy."""

import json
import operator
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kd_train.cli.evaluate import eval_main
from kd_train.evaluation.load_student import load_student
from kd_train.evaluation.throughput import _has_levelled_off, unbatch_structures
from kd_train.loader.data import CachedSamples
from kd_train.loader.datafiles import DatasetSamples, guess_format
from kd_train.loader.subset import SubsetSplit
from pipeline.datasets import open_dataset
from pipeline.errors import SpecError
from pipeline.models.checkpoint import save_model
from pipeline.models.normalizer import Normalizer
from pipeline.models.zoo import build_model
from pipeline.store.reader import FeatureStore
from tests.commands import refusal, run_command
from tests.frames import DEMO, collision_frames, frame, write_frames
from tests.stores import TINY_PAINN, save_teacher, teacher_normalizer

METHANE = [[0, 0, 0], [0.6, 0.6, 0.6], [-0.6, -0.6, 0.6], [0.6, -0.6, -0.6]]


def evaluated(run: Path, data: object, *more: object) -> dict[str, Any]:
    """What ``kd-eval --json`` prints."""
    words = [run, "--data", data, "--device", "cpu", "--json", *more]
    done = run_command(eval_main, words)
    assert done.exit_code == 0, done.output
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def plain_metrics(found: dict[str, np.ndarray]) -> dict[str, float]:
    """The four metrics of predictions, written down once more, sample by sample."""
    ends = np.cumsum(found["n_atoms"])
    within = []
    free = found["fixed"] == 0
    for k, (begin, end) in enumerate(zip(ends - found["n_atoms"], ends, strict=True)):
        off = (found["forces"] - found["forces_label"])[begin:end][free[begin:end]]
        energy_off = abs(found["energy"][k] - found["energy_label"][k])
        within.append(energy_off < 0.02 and np.abs(off).max() < 0.03)
    a, b = (
        found["forces"][free].astype(float),
        found["forces_label"][free].astype(float),
    )
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    return {
        "energy_mae": 1e3 * np.abs(found["energy"] - found["energy_label"]).mean(),
        "forces_mae": 1e3 * np.abs(a - b).mean(),
        "forces_cos": cosine.mean(),
        "efwt": 100 * np.mean(within),
    }


def test_agrees_with_the_run_and_with_plain_numpy(
    finished: Path, small_store: FeatureStore, tmp_path: Path
) -> None:
    out = tmp_path / "scores"
    card = evaluated(
        finished, small_store.path, "--split", "val", "--out", out, "--batch-size", 5
    )
    own = json.loads((finished / "metrics.json").read_text())
    assert list(card["splits"]) == ["val"]
    found = card["splits"]["val"]
    assert found["metrics"] == pytest.approx(own["metrics"], rel=1e-4)
    assert found["teacher_metrics"] == pytest.approx(own["teacher_metrics"])
    assert found["samples"] == len(small_store.splits["val"])
    assert json.loads((out / "metrics.json").read_text()) == card
    with np.load(out / "predictions.npz") as file:
        saved = dict(file)
    assert saved["sample_ids"].tolist() == small_store.splits["val"].sample_ids.tolist()
    assert set(saved["split"]) == {"val"}
    assert found["metrics"] == pytest.approx(plain_metrics(saved), rel=1e-5)
    assert card["model"]["strategy"] == "n2n+v2v"
    assert card["model"]["trained_on"] == card["data"]["fingerprint"]


def test_a_file_gives_what_the_store_of_it_gives(
    finished: Path,
    small_store: FeatureStore,
    datasets: dict[str, Path],
    tmp_path: Path,
) -> None:
    student = finished / "student.safetensors"
    stored = evaluated(
        finished, small_store.path, "--split", "val", "--out", tmp_path / "store"
    )
    read = evaluated(
        student, datasets["val"], "--batch-atoms", 60, "--out", tmp_path / "file"
    )
    assert read["data"]["format"] == "extxyz"
    name = datasets["val"].name
    assert read["splits"][name]["teacher_metrics"] is None
    assert read["splits"][name]["metrics"] == pytest.approx(
        stored["splits"]["val"]["metrics"], rel=1e-4
    )
    energies = []
    for folder in ("store", "file"):
        with np.load(tmp_path / folder / "predictions.npz") as file:
            energies.append(dict(zip(file["sample_ids"], file["energy"], strict=True)))
    assert energies[0] == pytest.approx(energies[1], abs=1e-4)


def test_batches_of_a_file_are_those_of_the_store(
    finished: Path, small_store: FeatureStore, datasets: dict[str, Path]
) -> None:
    model = load_student(finished).model
    split = small_store.splits["val"]
    dataset = open_dataset("extxyz", str(datasets["val"]))
    places = [list(dataset.sample_ids).index(str(i)) for i in split.sample_ids[:4]]
    rules = model.graph_rule, model.elements
    stored = CachedSamples(split, *rules).batch(np.arange(4))
    read = DatasetSamples(dataset, *rules).batch(np.array(places))
    for key in set(read.keys()) - {"num_nodes", "num_graphs"}:
        same = torch.equal if torch.is_tensor(read[key]) else operator.eq
        assert same(read[key], stored[key]), key
    assert (read.num_nodes, read.num_graphs) == (stored.num_nodes, stored.num_graphs)


def test_rows_of_all_splits_and_their_plain_mean(
    finished: Path, small_store: FeatureStore
) -> None:
    card = evaluated(finished, small_store.path)
    assert list(card["splits"]) == list(small_store.splits)
    for kind in ("metrics", "teacher_metrics"):
        rows = [part[kind] for part in card["splits"].values()]
        for name, value in card["mean"][kind].items():
            assert value == pytest.approx(np.mean([row[name] for row in rows]))
    words = [finished, "--data", small_store.path, "--device", "cpu"]
    lines = run_command(eval_main, words).stdout.splitlines()
    assert len(lines) == 2 + 2 * len(small_store.splits) + 2
    train = card["splits"]["train"]["metrics"]
    assert lines[2].split()[:4] == ["train", "student", "160", _one(train)]
    assert lines[-2].split()[:2] == ["mean", "student"]


def _one(metrics: dict[str, float]) -> str:
    return f"{metrics['energy_mae']:.1f}"


def test_compositions_outside_the_span_are_told(tmp_path: Path) -> None:
    """A14: in kd-eval as in the calculator."""
    about = {"elements": [1, 8], "undetermined": [{"1": -0.4472136, "8": 0.8944272}]}
    path = tmp_path / "water.safetensors"
    model = build_model("painn", TINY_PAINN)
    normalizer = teacher_normalizer()
    save_model(path, "painn", model, normalizer, {"training_data": about})
    water = frame("w", ["O", "H", "H"], [[0, 0, 0], [1, 0, 0], [0, 1, 0]], energy=-9)
    pair = frame("h", ["H", "H"], [[0, 0, 0], [1, 0, 0]], energy=-9)
    told = "do not determine the reference energies of H,"
    for frames, expected in (([water], False), ([water, pair], True)):
        data = write_frames(tmp_path / f"{len(frames)}.extxyz", frames)
        done = run_command(eval_main, [path, "--data", data, "--device", "cpu"])
        assert done.exit_code == 0
        assert (told in done.stderr) is expected


def test_limits_choose_the_same_samples_for_student_and_teacher(
    finished: Path, small_store: FeatureStore, tmp_path: Path
) -> None:
    more = ("--split", "train", "--every", 3, "--limit", 20, "--out", tmp_path)
    card = evaluated(finished, small_store.path, *more)
    split = small_store.splits["train"]
    chosen = np.arange(0, 60, 3)
    with np.load(tmp_path / "predictions.npz") as file:
        assert file["sample_ids"].tolist() == split.sample_ids[chosen].tolist()
    paths = ("labels/energy", "teacher/energy")
    values = split.read(chosen, paths)
    error = 1e3 * np.abs(values[paths[0]] - values[paths[1]]).mean()
    found = card["splits"]["train"]["teacher_metrics"]["energy_mae"]
    assert found == pytest.approx(error)


def test_a_selection_reads_what_the_split_has_there(small_store: FeatureStore) -> None:
    split = small_store.splits["train"]
    chosen = np.array([7, 2, 90])
    some = SubsetSplit(split, chosen)
    path = "structures/positions"
    for read in ("read", "read_stored"):
        found = getattr(some, read)([2, 0], [path])[path]
        assert np.array_equal(found, getattr(split, read)([90, 7], [path])[path])
    assert some.n_atoms.tolist() == split.n_atoms[chosen].tolist()
    assert (len(some), some.n_blocks, some.block_positions(0)) == (3, 1, range(3))


def test_other_energies_and_unknown_elements_are_told(
    finished: Path, tmp_path: Path
) -> None:
    words = ["--device", "cpu", "--json"]
    shifted = tmp_path / "shifted.extxyz"
    frames = collision_frames(6)
    write_frames(shifted, [text.replace("energy=-", "energy=-9") for text in frames])
    done = run_command(eval_main, [finished, "--data", shifted, *words])
    assert "another kind" in done.stderr
    assert json.loads(done.stdout)["warnings"]
    other = tmp_path / "other.extxyz"
    write_frames(other, [frame("si", ["Si", "H", "H", "H"], METHANE, energy=-3.0)])
    told = refusal(eval_main, [finished, "--data", other, *words])
    assert told.startswith("Sample 'si' holds Si; the data that this model was trained")
    assert "set --any-element to go on" in told
    words.append("--any-element")
    done = run_command(eval_main, [finished, "--data", other, *words])
    assert "has no Si" in done.stderr
    assert "has no Si" in json.loads(done.stdout)["warnings"][0]
    right = tmp_path / "right.extxyz"
    write_frames(right, frames)
    trained = DEMO / "painn_teacher.safetensors"
    assert not run_command(eval_main, [trained, "--data", right, *words]).stderr


def test_files_that_do_not_list_elements_are_told(tmp_path: Path) -> None:
    """A8: without references either; nothing is refused."""
    bare = tmp_path / "bare.safetensors"
    model = build_model("painn", TINY_PAINN)
    save_model(bare, "painn", model, Normalizer(), {})
    data = write_frames(tmp_path / "some.extxyz", collision_frames(3))
    done = run_command(eval_main, [bare, "--data", data, "--device", "cpu"])
    assert done.exit_code == 0
    told = "some.extxyz: the model file does not list the elements of its training"
    assert f"Warning: {told}" in done.stderr


def test_periodic_samples_and_limits_are_told(tmp_path: Path) -> None:
    """A5 and A11: images are not ignored, and the share of atoms is told."""
    lattice = 'pbc="T T T" Lattice="2.8 0 0 0 2.8 0 0 0 2.8"'
    places = [[0, 0, 0], [1.4, 1.4, 1.4]]
    crystal = frame("cell", ["C", "C"], places, energy=-100.0, header=lattice)
    apart = frame("pair", ["C", "C"], [[0, 0, 0], [0, 0, 1.4]], energy=-100.0)
    data = write_frames(tmp_path / "cells.extxyz", [crystal, apart])
    words = ["--data", data, "--device", "cpu"]
    blind = save_teacher(tmp_path / "blind.safetensors", use_pbc=False)
    told = refusal(eval_main, [blind, *words])
    assert told.startswith("Sample 'cell': pbc is T T T, but the graphs of the model")
    sound = save_teacher(tmp_path / "sound.safetensors")
    done = run_command(eval_main, [sound, *words])
    assert "Warning: cells.extxyz: 50 % of 4 atoms have more than 20" in done.stderr


def test_samples_without_labels_get_predictions(finished: Path, tmp_path: Path) -> None:
    path = tmp_path / "bare.extxyz"
    write_frames(path, [frame("a", ["C", "H", "H", "H"], METHANE)])
    card = evaluated(finished, path, "--out", tmp_path / "out")
    assert set(card["splits"]["bare.extxyz"]["metrics"].values()) == {None}
    assert "no sample has a reference energy" in card["warnings"][0]
    with np.load(tmp_path / "out" / "predictions.npz") as file:
        assert np.isfinite(file["energy"]).all()
        assert np.isfinite(file["forces"]).all()


def test_throughput_goes_to_the_run(
    finished: Path, datasets: dict[str, Path], tmp_path: Path, monkeypatch: Any
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    monkeypatch.setattr("kd_train.cli.evaluate.MEASURED_SECONDS", 0.01)
    card = evaluated(run, datasets["val"], "--throughput", "--limit", 9)
    told = json.loads((run / "throughput.json").read_text())
    assert {key: told[key] for key in card["throughput"]} == card["throughput"]
    dataset = open_dataset("extxyz", str(datasets["val"]), limit=9)
    assert told["mean_atoms"] == pytest.approx(dataset.n_atoms.mean())
    assert told["samples"] == 9
    assert str(told["batch_size"]) in told["tried"]
    assert told["samples_per_second"] == max(told["tried"].values())
    assert told["samples_per_second_with_graphs"] > 0
    assert (told["device"], told["threads"]) == ("cpu", torch.get_num_threads())
    # A model file alone has no folder to write to.
    lone = tmp_path / "lone" / "model.safetensors"
    lone.parent.mkdir()
    shutil.copy(run / "student.safetensors", lone)
    evaluated(lone, datasets["val"], "--throughput", "--limit", 2)
    assert [path.name for path in lone.parent.iterdir()] == [lone.name]


def test_growth_ends_where_two_larger_batches_gain_nothing() -> None:
    assert not _has_levelled_off([100.0])
    assert not _has_levelled_off([100.0, 90.0])
    assert _has_levelled_off([100.0, 90.0, 102.0])
    assert not _has_levelled_off([100.0, 90.0, 110.0])
    assert _has_levelled_off([50.0, 100.0, 110.0, 112.0, 111.0])


def test_structures_come_back_out_of_a_batch(
    finished: Path, datasets: dict[str, Path]
) -> None:
    model = load_student(finished).model
    dataset = open_dataset("extxyz", str(datasets["val"]), limit=3)
    batch = DatasetSamples(dataset, model.graph_rule, model.elements).batch(
        np.arange(3)
    )
    for k, structure in enumerate(unbatch_structures(batch)):
        wanted = dataset[k].structure
        for name in ("atomic_numbers", "pbc", "tags", "fixed"):
            assert np.array_equal(getattr(structure, name), getattr(wanted, name))
        np.testing.assert_allclose(structure.positions, wanted.positions, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("a.extxyz", "extxyz"),
        ("a.xyz.gz", "extxyz"),
        ("a.extxyz.xz", "extxyz"),
        ("a.lmdb", "oc20_lmdb"),
        ("a.aselmdb", "aselmdb"),
        ("a.db", "ase_db"),
        ("a.traj", "traj"),
        ("rmd17_ethanol.npz", "npz"),
        ("SPICE-2.0.1.hdf5", "hdf5"),
        ("ani1x-release.h5", "hdf5"),
    ],
)
def test_suffixes_tell_formats(tmp_path: Path, name: str, format: str) -> None:
    (tmp_path / name).touch()
    assert guess_format(tmp_path / name) == format


@pytest.mark.parametrize(
    ("names", "format"),
    [
        (["data.0000.lmdb", "data.0001.lmdb", "data.0000.lmdb-lock"], "oc20_lmdb"),
        (["a.aselmdb", "metadata.npz"], "aselmdb"),
        (["data.mdb", "lock.mdb"], "oc20_lmdb"),
        (["a.traj", "b.traj", "README.md"], "traj"),
        (["a.h5", "b.hdf5"], "hdf5"),
        (["a.npz"], "npz"),
    ],
)
def test_files_of_a_folder_tell_its_format(
    tmp_path: Path, names: list[str], format: str
) -> None:
    for name in names:
        (tmp_path / name).touch()
    assert guess_format(tmp_path) == format
    (tmp_path / "b.lmdb").touch()
    (tmp_path / "b.aselmdb").touch()
    if "data.mdb" not in names:
        with pytest.raises(SpecError, match="--format"):
            guess_format(tmp_path)


def test_formats_that_suffixes_do_not_tell(tmp_path: Path) -> None:
    (tmp_path / "0.extxyz.xz").touch()
    (tmp_path / "0.txt.xz").touch()
    for path in (tmp_path, tmp_path / "0.extxyz.xz", tmp_path / "0.txt.xz"):
        with pytest.raises(SpecError, match="--format"):
            guess_format(path)


def test_labels_of_other_names_and_units(
    finished: Path, datasets: dict[str, Path], tmp_path: Path
) -> None:
    """A2, C: a warning names what looks like a label; options take it."""
    frames = collision_frames(4)
    plain = write_frames(tmp_path / "plain.extxyz", frames)
    other = tmp_path / "other.extxyz"
    write_frames(other, [text.replace("energy=", "REF_energy=") for text in frames])
    done = run_command(eval_main, [finished, "--data", other, "--json"])
    assert (
        f"Warning: --data {other}: 4 of 4 samples have no energy; the first is "
        in done.stderr
    )
    assert "and has 'REF_energy'" in done.stderr
    read = evaluated(finished, other, "--energy-key", "REF_energy")
    right = evaluated(finished, plain)["splits"][plain.name]["metrics"]
    assert read["splits"][other.name]["metrics"] == right
    assert read["data"]["energy_key"] == "REF_energy"
    scaled = evaluated(finished, plain, "--units", "forces=meV/Å")
    found = scaled["splits"][plain.name]["metrics"]
    assert found["energy_mae"] == right["energy_mae"]
    assert found["forces_mae"] != pytest.approx(right["forces_mae"])


def test_refusals(
    finished: Path, small_store: FeatureStore, datasets: dict[str, Path], tmp_path: Path
) -> None:
    val, store = datasets["val"], small_store.path
    alone = frame("x", ["H"], [[0, 0, 0]], energy=-1.0, forces=[[0, 0, 0]])
    (tmp_path / "lone.extxyz").write_text(alone)
    cases: list[tuple[list[object], str]] = [
        ([finished, "--data", tmp_path / "absent.xyz"], "does not exist"),
        (
            [tmp_path / "absent", "--data", val],
            "does not exist; name a run folder or a model file",
        ),
        ([tmp_path, "--data", val], "has no student.safetensors"),
        ([finished, "--data", store, "--split", "tets"], "'tets'"),
        ([finished, "--data", val, "--split", "val"], "--split"),
        ([finished, "--data", val, "--energy", "total"], "oc20_raw"),
        ([finished, "--data", val, "--out", finished], "is a run folder"),
        ([finished, "--data", val, "--energy-key", "E"], "no sample has 'E'"),
        ([finished, "--data", val, "--units", "energy=cal"], "energy 'cal' (known"),
        ([finished, "--data", val, "--units", "Ha"], "must be energy="),
        ([finished, "--data", store, "--units", "energy=eV"], "is for datasets"),
        ([finished, "--data", tmp_path / "*.zzz"], "matches no file"),
        ([finished, "--data", tmp_path / "lone.extxyz"], "'x' has no neighbours"),
        ([finished, "--data", val, "--device", "cuda:99"], "cuda:99"),
    ]
    for words, part in cases:
        assert part in refusal(eval_main, words)
