"""The field force_jacobian: against automatic differentiation, and in the store."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.build.build import build_store
from pipeline.build.extend import extend_store
from pipeline.build.recompute import spot_check
from pipeline.cli.main import main
from pipeline.datasets import open_dataset
from pipeline.errors import ContractError, DamagedStoreError, SpecError, StoreError
from pipeline.graphs.batch import collate
from pipeline.spec.cache_spec import load_spec
from pipeline.spec.sections import TeacherSpec
from pipeline.store import index
from pipeline.store.reader import FeatureStore
from pipeline.store.verify import verify_store
from pipeline.structure import Sample
from pipeline.teachers.builtin import BuiltinPotential
from pipeline.teachers.checks import Subject, check_displacement
from pipeline.teachers.jacobian import ColumnSpec, choose_columns
from pipeline.teachers.potential import SampleGraph
from pipeline.teachers.runner import TeacherRunner
from tests.commands import run_command
from tests.frames import collision_frames, frame, write_frames
from tests.stores import build, save_gemnet, save_teacher, spec_document, write_spec

COLUMNS = {"force_jacobian": {"columns": 5}}
PATH, COLUMN = "teacher/force_jacobian", "teacher/force_jacobian_column"


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    path = write_frames(tmp_path / "d.extxyz", collision_frames(4))
    dataset = open_dataset("extxyz", str(path))
    return [dataset[k] for k in range(4)]


def _teacher(folder: Path, columns: ColumnSpec, **changes: object) -> TeacherRunner:
    file = save_teacher(folder / "t.safetensors", **changes)
    spec = TeacherSpec(model="painn", checkpoint=str(file))
    return TeacherRunner.load(spec, columns=columns)


def _exact_jacobian(teacher: TeacherRunner, sample: Sample) -> np.ndarray:
    """∂F/∂x (N, 3, N, 3) in eV/Å² of our network in double precision, by autograd."""
    potential = teacher.potential
    assert isinstance(potential, BuiltinPotential)
    model = potential.loaded.model.double().train()
    graph = potential.graph(sample)
    batch = collate([graph.structure], [graph.edges], torch.float64)

    def forces(positions: torch.Tensor) -> torch.Tensor:
        moved = batch.clone()
        moved.positions = positions
        return model(moved).forces * potential.normalizer.force_std

    def energy(positions: torch.Tensor) -> torch.Tensor:
        return model._energy(batch, positions, {})[0].sum()

    if model.hyperparameters["direct_forces"]:
        found = torch.autograd.functional.jacobian(forces, batch.positions)
    else:
        found = -torch.autograd.functional.hessian(energy, batch.positions)
        found *= potential.normalizer.force_std
    model.float().eval()
    return found.numpy()


@pytest.mark.parametrize("direct", [False, True], ids=["gradient", "direct"])
def test_columns_are_those_of_automatic_differentiation(
    tmp_path: Path, samples: list[Sample], direct: bool
) -> None:
    teacher = _teacher(tmp_path, ColumnSpec(6, 0.01), direct_forces=direct)
    found = teacher.predict(samples, ("force_jacobian",))
    starts = np.cumsum([0, *(len(s.structure) for s in samples)])
    asymmetry = 0.0
    for k, sample in enumerate(samples):
        n = len(sample.structure)
        exact = _exact_jacobian(teacher, sample).reshape(n, 3, 3 * n)
        got = found["force_jacobian"][starts[k] : starts[k + 1]]
        for slot, column in enumerate(found["force_jacobian_column"][k]):
            wanted = exact[:, :, column]
            scale = np.abs(exact).max()
            assert np.abs(got[:, slot] - wanted).max() < 5e-3 * scale
        square = exact.reshape(3 * n, 3 * n)
        off = np.abs(square - square.T).max() / np.abs(square).max()
        asymmetry = max(asymmetry, float(off))
    # Rows are columns of forces that are a gradient, and of no others.
    assert bool(asymmetry > 0.05) is direct


def test_displaced_passes_keep_the_graph(tmp_path: Path, samples: list[Sample]) -> None:
    """With a limit of neighbours a new graph would make forces jump."""
    teacher = _teacher(tmp_path, ColumnSpec(6, 0.01), max_neighbors=3)
    (sample, *_) = samples
    exact = _exact_jacobian(teacher, sample)
    n = len(sample.structure)
    found = teacher.predict([sample], ("force_jacobian",))
    for slot, column in enumerate(found["force_jacobian_column"][0]):
        wanted = exact.reshape(n, 3, 3 * n)[:, :, column]
        assert np.abs(found["force_jacobian"][:, slot] - wanted).max() < 5e-3 * max(
            np.abs(exact).max(), 1e-3
        )


def test_columns_are_of_free_atoms_and_nested(samples: list[Sample]) -> None:
    (sample, *_) = samples
    many = choose_columns(sample, 3 * len(sample.structure))
    assert sorted(many) == list(range(3 * len(sample.structure)))
    assert np.array_equal(choose_columns(sample, 4), many[:4])
    other = replace(sample, sample_id="another")
    assert not np.array_equal(choose_columns(other, len(many)), many)
    held = sample.structure.fixed.copy()
    held[1:] = True
    structure = replace(sample.structure, fixed=held)
    few = choose_columns(replace(sample, structure=structure), 5)
    assert sorted(few) == [-1, -1, 0, 1, 2]


def _spec(folder: Path, features: dict[str, object], teacher: Path) -> Path:
    data = write_frames(folder / "d.extxyz", collision_frames(12))
    document = spec_document({"train": data}, folder / "s.zarr", teacher, features)
    return write_spec(folder / "s.yaml", document)


def test_a_store_keeps_columns_and_coordinates(
    tmp_path: Path, teacher_file: Path
) -> None:
    store = build(_spec(tmp_path, COLUMNS, teacher_file))
    split = store.splits["train"]
    assert store.attributes["format_version"] == 4
    rows = split.read([3], [PATH, COLUMN])
    assert rows[PATH].shape == (split.n_atoms[3], 5, 3)
    assert rows[COLUMN].shape == (1, 5)
    assert rows[COLUMN].dtype == np.int32
    passes = store.attributes["provenance"]["teacher_passes"]["train"]
    assert passes == {"labels": 12, "generation": 0, "force_jacobian": 120}
    assert not verify_store(store.path)
    found, compared = spot_check(store.path, 4)
    assert found == []
    assert compared == 12
    told = run_command(main, ["info", store.path]).stdout
    assert "teacher/force_jacobian " in told
    shard = store.path / "train" / PATH / "c" / "0" / "0" / "0"
    content = bytearray(shard.read_bytes())
    content[40] ^= 1
    shard.write_bytes(content)
    problems = verify_store(store.path)
    assert {(p.split, p.block) for p in problems} == {("train", 0)}
    with pytest.raises(DamagedStoreError, match=PATH):
        FeatureStore.open(store.path).splits["train"].read(np.arange(12), [PATH])


def test_programs_of_an_older_format_refuse_the_store_by_its_version(
    tmp_path: Path, teacher_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(_spec(tmp_path, COLUMNS, teacher_file))
    plain = tmp_path / "plain"
    plain.mkdir()
    build(_spec(plain, {"node_features": {}}, teacher_file))
    from pipeline.store import metadata

    monkeypatch.setattr(metadata, "FORMAT_VERSION", 3)
    with pytest.raises(StoreError, match="format version 4, .* up to 3"):
        FeatureStore.open(tmp_path / "s.zarr")
    assert FeatureStore.open(plain / "s.zarr").attributes["format_version"] == 3
    assert index.version_for(["labels/energy"]) == 3


def test_the_field_is_added_to_a_store(tmp_path: Path, teacher_file: Path) -> None:
    spec = _spec(tmp_path, {"node_features": {}}, teacher_file)
    build_store(load_spec(spec))
    wider = [f"features.force_jacobian={json.dumps({'columns': 5})}"]
    added = extend_store(load_spec(spec, wider))
    assert sorted(added) == [f"train/{PATH}", f"train/{COLUMN}"]
    store = FeatureStore.open(tmp_path / "s.zarr")
    assert store.attributes["format_version"] == 4
    assert spot_check(store.path, 3)[0] == []
    with pytest.raises(SpecError, match="force_jacobian"):
        extend_store(
            load_spec(spec, ["features.force_jacobian={columns: 5, step: 0.02}"])
        )


@pytest.mark.parametrize(
    ("features", "words"),
    [
        ({"force_jacobian": {"profile": "q8"}}, "profile q8 is for features with"),
        ({"force_jacobian": {"layer": "u1"}}, "layer: .* comes from forces"),
        ({"node_features": {"columns": 3}}, "columns is for force_jacobian"),
        ({"force_jacobian": {"columns": 0}}, "columns"),
        ({"force_jacobian": {"step": 0}}, "step"),
        ({"force_jacobians": {}}, "unknown field 'force_jacobians'.*force_jacobian"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    tmp_path: Path, teacher_file: Path, features: dict[str, object], words: str
) -> None:
    with pytest.raises(SpecError, match=words):
        load_spec(_spec(tmp_path, features, teacher_file))


def test_gemnet_has_columns_too(tmp_path: Path) -> None:
    """Its side graphs are kept as well."""
    file = save_gemnet(tmp_path / "g.safetensors")
    spec = TeacherSpec(model="gemnet_oc", checkpoint=str(file))
    teacher = TeacherRunner.load(spec, columns=ColumnSpec(2, 0.01))
    places = [[0, 0, 0], [0.96, 0, 0], [-0.3, 0.9, 0], [0, 0, 1.5]]
    path = write_frames(tmp_path / "w.extxyz", [frame("w", list("OHHC"), places)])
    sample = open_dataset("extxyz", str(path))[0]
    found = teacher.predict([sample], ("force_jacobian",))
    exact = _exact_jacobian(teacher, sample).reshape(4, 3, 12)
    for slot, column in enumerate(found["force_jacobian_column"][0]):
        difference = found["force_jacobian"][:, slot] - exact[:, :, column]
        assert np.abs(difference).max() < 1e-2 * np.abs(exact).max()


class _Forgetful(BuiltinPotential):
    """A plug-in that does not compute again what depends on positions."""

    def with_positions(self, graph: SampleGraph, positions: np.ndarray) -> SampleGraph:
        return graph


def test_the_contract_covers_displaced_passes(
    tmp_path: Path, samples: list[Sample]
) -> None:
    teacher = _teacher(tmp_path, ColumnSpec())
    potential = teacher.potential
    assert isinstance(potential, BuiltinPotential)
    assert check_displacement(Subject(potential, samples)) < 1e-3
    broken = _Forgetful(potential.loaded, "ema", None)
    with pytest.raises(ContractError, match="with_positions"):
        check_displacement(Subject(broken, samples))
