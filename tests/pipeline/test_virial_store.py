"""Virials in stores: where they are kept, their numbers, and stores without them."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write

from pipeline.build import plan
from pipeline.build.build import build_store
from pipeline.build.convert import convert_store, make_conversion
from pipeline.build.label import label_splits
from pipeline.build.recompute import spot_check
from pipeline.cli.main import main
from pipeline.datasets import open_dataset
from pipeline.models.checkpoint import save_model
from pipeline.models.normalizer import NUM_REFERENCES, Normalizer
from pipeline.models.zoo import build_model
from pipeline.spec.cache_spec import load_spec
from pipeline.store.reader import FeatureStore
from pipeline.store.verify import verify_store
from pipeline.structure import Sample
from pipeline.teachers.runner import TeacherRunner
from tests.commands import refusal, run_command
from tests.pipeline.test_profiles import files_of
from tests.stores import STUDENTS, spec_document, write_spec


def save_gradient_teacher(path: Path, seed: int = 1) -> Path:
    """An untrained SchNet with gradient forces and one scale, of any element."""
    torch.manual_seed(seed)
    model = build_model("schnet", STUDENTS["schnet-demo"])
    references = tuple(0.1 * z for z in range(NUM_REFERENCES))
    save_model(path, "schnet", model, Normalizer(-1.0, 3.0, 3.0, references), {})
    return path


def write_crystals(path: Path, count: int, molecules: int = 0) -> Path:
    """Strained copper of four atoms with EMT's stress, and molecules without any."""
    frames = []
    random = np.random.default_rng(5)
    for number in range(count + molecules):
        atoms = bulk("Cu", cubic=True)
        strain = 0.05 * random.normal(size=(3, 3))
        atoms.set_cell(atoms.cell @ (np.eye(3) + strain + strain.T), scale_atoms=True)
        atoms.rattle(0.1, rng=random)
        if number >= count:
            atoms.set_cell(np.zeros((3, 3)))
            atoms.pbc = False
        atoms.calc = EMT()
        results = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces()}
        if number < count:
            results["stress"] = atoms.get_stress()
        atoms.calc = SinglePointCalculator(atoms, **results)
        atoms.info["sample_id"] = f"cu{number}"
        frames.append(atoms)
    write(path, frames, format="extxyz")
    return path


def crystal_document(folder: Path, **split: Any) -> dict[str, Any]:
    """A spec of crystals and molecules with a teacher that has virials."""
    path = write_crystals(folder / "cu.extxyz", 5, molecules=3)
    section = {"format": "extxyz", "path": str(path)} | split
    teacher = save_gradient_teacher(folder / "teacher.safetensors")
    document = spec_document({"train": section}, folder / "s.zarr", teacher)
    document["features"] = {"node_features": {}}
    document["teacher"]["model"] = "schnet"
    return document


def _build(folder: Path, document: dict[str, Any]) -> FeatureStore:
    spec = load_spec(write_spec(folder / "spec.yaml", document))
    assert build_store(spec)
    return FeatureStore.open(spec.store.path)


def _read(store: FeatureStore, *paths: str) -> dict[str, np.ndarray]:
    split = store.splits["train"]
    order = np.argsort(split.sample_ids)
    return split.read(order, paths)


def _energy(teacher: TeacherRunner, sample: Sample, strain: np.ndarray) -> float:
    old = sample.structure
    moved = old.positions @ strain, old.cell @ strain
    changed = replace(old, positions=moved[0], cell=moved[1])
    found = teacher.predict([replace(sample, structure=changed)], ())
    return float(found["teacher_energy"][0])


def test_labels_and_teacher_are_stored_as_minus_the_slope(tmp_path: Path) -> None:
    document = crystal_document(tmp_path)
    store = _build(tmp_path, document)
    assert store.attributes["format_version"] == 3
    assert verify_store(tmp_path / "s.zarr") == []
    found = _read(store, "labels/virial", "teacher/virial")
    assert {a.dtype for a in found.values()} == {np.dtype("float64")}
    assert {a.shape for a in found.values()} == {(8, 3, 3)}
    dataset = open_dataset("extxyz", str(tmp_path / "cu.extxyz"))
    samples = [dataset[i] for i in range(8)]
    labels = np.stack([sample.virial for sample in samples])
    assert np.array_equal(found["labels/virial"], labels, equal_nan=True)
    assert np.isnan(labels).all(axis=(1, 2)).sum() == 3
    spec = load_spec(tmp_path / "spec.yaml")
    assert spec.teacher is not None
    teacher = TeacherRunner.load(spec.teacher)
    for sample, virial in zip(samples, found["teacher/virial"], strict=True):
        strain = np.array([[0.4, 0.2, -0.1], [0.2, -0.3, 0.5], [-0.1, 0.5, 0.7]])
        energies = [
            _energy(teacher, sample, np.eye(3) + step * strain)
            for step in (2e-3, -2e-3)
        ]
        slope = (energies[0] - energies[1]) / 4e-3
        assert slope == pytest.approx(-(virial * strain).sum(), abs=2e-3, rel=1e-3)


def test_stores_without_virials_have_no_arrays_and_say_nothing(
    tmp_path: Path, collisions: Callable[..., Path]
) -> None:
    document = crystal_document(tmp_path, virial_key="none")
    document["splits"]["molecules"] = {"format": "extxyz", "path": str(collisions(4))}
    document["splits"]["molecules"]["check_energy_kind"] = False
    store = _build(tmp_path, document)
    assert "labels/virial" not in store.splits["train"].arrays
    assert "teacher/virial" in store.splits["train"].arrays
    # The virial of a molecule is the sum of positions times forces.
    assert "teacher/virial" not in store.splits["molecules"].arrays
    provenance = store.attributes["provenance"]
    for part in (provenance["labelled"], provenance["contents"]):
        assert all("virial" not in found for found in part.values())
    assert all("virials" not in s for s in store.attributes["splits"].values())


def test_info_counts_virials(tmp_path: Path) -> None:
    _build(tmp_path, crystal_document(tmp_path))
    said = run_command(main, ["info", tmp_path / "s.zarr"]).stdout
    assert "8 samples have energies, 8 have forces, 5 have virials" in said
    assert "split  frames  energy  forces  virial  periodic" in said
    assert "train       8       8       8       5  5 of 8" in said


def test_a_store_of_before_continues_and_gains_virials(tmp_path: Path) -> None:
    """As the version before planned it: without virials of labels and teacher."""
    document = crystal_document(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "_virial_fields", lambda *args: [])
        store = _build(tmp_path, document)
    assert not any("virial" in path for path in store.splits["train"].arrays)
    before = files_of(tmp_path / "s.zarr")
    spec = tmp_path / "spec.yaml"
    done = run_command(main, ["build", spec, "--device", "cpu"])
    assert done.exit_code == 0, done.output
    assert files_of(tmp_path / "s.zarr") == before
    done = run_command(main, ["add-field", spec, "--device", "cpu"])
    assert done.exit_code == 0, done.output
    assert "train/labels/virial, train/teacher/virial" in done.stdout
    extended = files_of(tmp_path / "s.zarr")
    assert verify_store(tmp_path / "s.zarr") == []
    fresh = dict(document, store={**document["store"], "path": str(tmp_path / "t")})
    _build(tmp_path, fresh)
    new = files_of(tmp_path / "t")
    folders = ("train/labels", "train/teacher", "train/structures", "train/features")
    shards = [name for name in extended if name.startswith(folders)]
    assert any("virial" in name for name in shards)
    assert all(new[name] == extended[name] for name in shards)


def test_changed_virials_are_noticed(tmp_path: Path) -> None:
    document = crystal_document(tmp_path)
    _build(tmp_path, document)
    text = (tmp_path / "cu.extxyz").read_text()
    place = text.index('stress="') + len('stress="')
    first = text[place:].split()[0]
    changed = text[:place] + repr(float(first) + 1e-3) + text[place + len(first) :]
    (tmp_path / "cu.extxyz").write_text(changed)
    said = refusal(main, ["build", tmp_path / "spec.yaml", "--device", "cpu"])
    assert "was planned for another spec" in said


def test_a_named_virial_that_no_sample_has_is_refused(tmp_path: Path) -> None:
    document = crystal_document(tmp_path, virial_key="W")
    write_spec(tmp_path / "spec.yaml", document)
    said = refusal(main, ["plan", tmp_path / "spec.yaml", "--device", "cpu"])
    assert "no sample has the virial under 'W', which splits.train.virial_key" in said
    assert "'stress'" in said


def test_the_teacher_is_asked_again_and_copies_keep_virials(tmp_path: Path) -> None:
    store = _build(tmp_path, crystal_document(tmp_path))
    differences, compared = spot_check(tmp_path / "s.zarr", 8)
    assert differences == []
    assert compared == 8 * 4
    convert_store(tmp_path / "s.zarr", tmp_path / "q8.zarr", make_conversion("q8"))
    copy = FeatureStore.open(tmp_path / "q8.zarr")
    for path in ("labels/virial", "teacher/virial"):
        one, other = _read(store, path)[path], _read(copy, path)[path]
        assert np.array_equal(one, other, equal_nan=True)


@pytest.mark.parametrize("sign", [1, -1])
def test_planning_warns_of_the_opposite_sign(
    tmp_path: Path, sign: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Labels of the teacher itself, once with the sign of compression."""
    document = crystal_document(tmp_path)
    spec = load_spec(write_spec(tmp_path / "spec.yaml", document))
    (file,) = label_splits(spec, tmp_path)
    dataset = open_dataset("extxyz", str(file))
    header = iter([sign * dataset[i].virial for i in range(len(dataset))])
    lines = [
        re.sub(r'(virial|stress)="[^"]*" ', "", line).replace(
            "energy=",
            f'virial="{" ".join(map(str, next(header).ravel()))}" energy=',
        )
        if "Lattice" in line
        else line
        for line in file.read_text().splitlines()
    ]
    file.write_text("\n".join(lines) + "\n")
    document["splits"]["train"]["path"] = str(file)
    _build(tmp_path, document)
    warned = "virials of labels and teacher have cosine -1.00 on 8 samples"
    assert (warned in caplog.text) == (sign < 0)


def test_generated_copies_have_the_teachers_virial(tmp_path: Path) -> None:
    document = crystal_document(tmp_path)
    document["splits"]["train"] |= {"where": {"sample_id": ["cu0", "cu1"]}}
    document["splits"]["copies"] = document["splits"]["train"] | {
        "labels": "none",
        "features": False,
        "generate": {"method": "rattle", "copies": 2, "sigma": 0.02},
    }
    document["splits"]["copies"]["generate"]["cell_sigma"] = 0.02
    store = _build(tmp_path, document)
    split = store.splits["copies"]
    assert "labels/virial" not in split.arrays
    path = "teacher/virial"
    virials = split.read(np.arange(4), [path])[path]
    assert np.isfinite(virials).all()
    assert len(np.unique(virials[:, 0, 0])) == 4
    passes = store.attributes["provenance"]["teacher_passes"]
    assert passes["copies"]["labels"] == 4
    differences, _ = spot_check(tmp_path / "s.zarr", 4)
    assert differences == []


def test_label_writes_virial_and_stress(tmp_path: Path) -> None:
    document = crystal_document(tmp_path)
    spec = write_spec(tmp_path / "spec.yaml", document)
    out = tmp_path / "out"
    done = run_command(main, ["label", spec, "--out", out, "--device", "cpu"])
    assert done.exit_code == 0, done.output
    store = _build(tmp_path, document)
    virials = _read(store, "teacher/virial")["teacher/virial"]
    dataset = open_dataset("extxyz", str(out / "train.extxyz"))
    found = np.stack([dataset[i].virial for i in range(len(dataset))])
    assert np.allclose(found, virials, rtol=1e-5, atol=1e-5)
    text = (out / "train.extxyz").read_text()
    assert (text.count(" virial="), text.count(" stress=")) == (8, 5)
