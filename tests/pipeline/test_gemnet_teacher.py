"""GemNet-OC as a teacher: edge fields, layers, precision, batches, first look."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.build.preflight import preview
from pipeline.cli.info import render_description
from pipeline.datasets import open_dataset
from pipeline.errors import SpecError
from pipeline.graphs.batch import collate
from pipeline.graphs.neighbors import neighbor_edges
from pipeline.models.checkpoint import load_checkpoint
from pipeline.spec.cache_spec import load_spec
from pipeline.spec.sections import TeacherSpec
from pipeline.store.describe import describe_store
from pipeline.structure import Sample
from pipeline.teachers.runner import TeacherRunner
from tests.frames import collision_frames, write_frames
from tests.stores import build, save_gemnet, spec_document, write_spec

EDGE_FIELDS = ("edge_features", "edge_to_node_features", "vector_features")


@pytest.fixture(scope="module")
def gemnet_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_gemnet(tmp_path_factory.mktemp("t") / "gemnet.safetensors")


@pytest.fixture(scope="module")
def gradient_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("t") / "gradient.safetensors"
    return save_gemnet(path, direct_forces=False)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    path = tmp_path_factory.mktemp("d") / "d.extxyz"
    dataset = open_dataset("extxyz", str(write_frames(path, collision_frames(6))))
    return [dataset[i] for i in range(6)]


def _spec(path: Path, **changes: object) -> TeacherSpec:
    document = {"model": "gemnet_oc", "checkpoint": str(path)} | changes
    return TeacherSpec.model_validate(document)


def test_edge_fields_name_their_edges_and_sum_to_the_node_fields(
    gemnet_file: Path, samples: list[Sample]
) -> None:
    teacher = TeacherRunner.load(_spec(gemnet_file, batch_atoms=30))
    found = teacher.predict(samples, EDGE_FIELDS)
    row = edge = 0
    for sample in samples:
        count = teacher.count_edges(sample.structure)
        ends = found["edge_index"][edge : edge + count]
        features = found["edge_features"][edge : edge + count].astype(float)
        positions = sample.structure.positions
        assert set(map(tuple, ends)) == {
            (j, i)
            for i in range(len(positions))
            for j in range(len(positions))
            if i != j and np.linalg.norm(positions[i] - positions[j]) <= 5.0
        }
        for atom in range(len(positions)):
            into = ends[:, 1] == atom
            unit = positions[ends[into, 0]] - positions[atom]
            unit /= np.linalg.norm(unit, axis=1, keepdims=True)
            total = features[into].sum(axis=0)
            vectors = np.einsum("ex,ec->xc", unit, features[into])
            scale = np.abs(features).max()
            np.testing.assert_allclose(
                found["edge_to_node_features"][row + atom], total, atol=1e-4 * scale
            )
            np.testing.assert_allclose(
                found["vector_features"][row + atom], vectors, atol=1e-4 * scale
            )
        row, edge = row + len(positions), edge + count
    assert edge == len(found["edge_features"]) == len(found["cell_offsets"])
    assert not found["cell_offsets"].any()


def test_layers_are_those_of_the_network(
    gemnet_file: Path, samples: list[Sample]
) -> None:
    layers = {"node_features": "regular_1", "edge_to_node_features": "X_0"}
    teacher = TeacherRunner.load(_spec(gemnet_file), layers=layers)
    found = teacher.predict(samples, (*layers, "vector_features"))
    model = load_checkpoint(gemnet_file).model
    structures = [sample.structure for sample in samples]
    edges = [neighbor_edges(s, model.graph_rule) for s in structures]
    with torch.no_grad():
        final = model(collate(structures, edges))
        output = model(collate(structures, edges), layers)
    for name, expected in (
        ("node_features", output.node_features),
        ("edge_to_node_features", output.edge_to_node_features),
        ("vector_features", final.vector_features),
    ):
        np.testing.assert_allclose(found[name], expected.numpy(), atol=1e-5)
    moved = (output.node_features - final.node_features).abs().max()
    assert moved > 1e-2
    assert teacher.widths["node_features"] == model.widths["node_features"]
    assert teacher.identity != TeacherRunner.load(_spec(gemnet_file)).identity


def test_gradient_forces_offer_edges_at_inner_layers_only(
    gradient_file: Path, samples: list[Sample]
) -> None:
    plain = TeacherRunner.load(_spec(gradient_file))
    with pytest.raises(SpecError, match=r"no 'edge_features'.*layer: regular_0"):
        plain.check_fields(("edge_features",))
    layers = {"edge_features": "regular_2"}
    teacher = TeacherRunner.load(_spec(gradient_file), layers=layers)
    teacher.check_fields(("edge_features",))
    found = teacher.predict(samples[:2], ("edge_features",))
    assert found["edge_features"].shape[1] == teacher.widths["edge_features"]
    with pytest.raises(SpecError, match=r"edge_features.layer is 'X_1'.*regular_0"):
        TeacherRunner.load(_spec(gradient_file), layers={"edge_features": "X_1"})


@pytest.mark.parametrize("layer", ["U6", "regular_9", ""])
def test_unknown_layer_is_refused_with_the_known_ones(
    layer: str, gemnet_file: Path
) -> None:
    with pytest.raises(SpecError, match=r"node_features.layer.*concatmlp.*X_0"):
        TeacherRunner.load(_spec(gemnet_file), layers={"node_features": layer})


def test_painn_layers(teacher_file: Path, samples: list[Sample]) -> None:
    fields = ("node_features", "vector_features")
    spec = TeacherSpec(model="painn", checkpoint=str(teacher_file))
    final = TeacherRunner.load(spec).predict(samples, fields)
    last = TeacherRunner.load(spec, layers={"node_features": "u2"}).predict(
        samples, fields
    )
    np.testing.assert_array_equal(last["node_features"], final["node_features"])
    inner = TeacherRunner.load(spec, layers=dict.fromkeys(fields, "m2"))
    found = inner.predict(samples, fields)
    for name in fields:
        assert np.abs(found[name] - final[name]).max() > 1e-3


@pytest.mark.parametrize("change", [{"max_batch_gib": 1e-9}, {"batch_atoms": 1}, {}])
def test_budgets_decide_the_passes_and_not_the_numbers(
    change: dict[str, object], gemnet_file: Path, samples: list[Sample]
) -> None:
    teacher = TeacherRunner.load(_spec(gemnet_file, **change))
    sizes: list[int] = []
    teacher.potential.loaded.model.register_forward_pre_hook(
        lambda _, inputs: sizes.append(inputs[0].num_graphs)
    )
    found = teacher.predict(samples, EDGE_FIELDS)
    assert sizes == ([1] * len(samples) if change else [len(samples)])
    expected = TeacherRunner.load(_spec(gemnet_file)).predict(samples, EDGE_FIELDS)
    for name, values in expected.items():
        scale = np.abs(values).max() + 1e-9
        np.testing.assert_allclose(found[name] / scale, values / scale, atol=2e-5)


def test_reduced_precision_is_measured_and_told(
    gemnet_file: Path, samples: list[Sample], caplog: pytest.LogCaptureFixture
) -> None:
    teacher = TeacherRunner.load(_spec(gemnet_file, precision="bfloat16"))
    errors = teacher.precision_error(samples, EDGE_FIELDS)
    exact = TeacherRunner.load(_spec(gemnet_file)).predict(samples, EDGE_FIELDS)
    rough = teacher.predict(samples, EDGE_FIELDS)
    for name in EDGE_FIELDS:
        difference = rough[name].astype(float) - exact[name]
        relative = np.sqrt(np.mean(difference**2) / np.mean(exact[name] ** 2.0))
        assert errors[name] == pytest.approx(relative, rel=1e-6)
        assert 1e-4 < errors[name] < 0.05
    dataset = _Listed(samples)
    with caplog.at_level(logging.WARNING):
        told = preview("train", dataset, teacher, EDGE_FIELDS)
    assert told["precision_error"].keys() == errors.keys()
    assert "edge_features by" in caplog.text


class _Listed(list[Sample]):
    """Samples in memory, indexable like a dataset."""


def test_other_kind_of_energies_is_told(
    gemnet_file: Path, samples: list[Sample], caplog: pytest.LogCaptureFixture
) -> None:
    teacher = TeacherRunner.load(_spec(gemnet_file))
    energies = teacher.predict(samples, ())["teacher_energy"]

    def labelled(shift: float) -> _Listed:
        return _Listed(
            Sample(
                s.sample_id, s.structure, float(e) + shift * len(s.structure), s.forces
            )
            for s, e in zip(samples, energies, strict=True)
        )

    with caplog.at_level(logging.WARNING):
        near = preview("train", labelled(0.5), teacher, ())
        assert near["energy_difference"] == pytest.approx(0.5, abs=1e-3)
        assert "different kinds" not in caplog.text
        far = preview("train", labelled(-4.0), teacher, ())
    assert far["energy_difference"] == pytest.approx(4.0, abs=1e-3)
    assert "different kinds" in caplog.text


def test_store_keeps_what_layers_and_precision_changed(
    gemnet_file: Path, datasets: dict[str, Path], tmp_path: Path
) -> None:
    split = {"format": "extxyz", "path": str(datasets["val"]), "limit": 4}
    features = {"node_features": {"layer": "X_1"}, "edge_to_node_features": {}}
    document = spec_document(
        {"train": split}, tmp_path / "s.zarr", gemnet_file, features
    )
    document["teacher"] |= {"model": "gemnet_oc", "precision": "bfloat16"}
    store = build(write_spec(tmp_path / "s.yaml", document))
    assert store.attributes["teacher"]["layers"] == {"node_features": "X_1"}
    assert store.attributes["teacher"]["precision"] == "bfloat16"
    told = store.attributes["provenance"]["preview"]["train"]["precision_error"]
    assert 0 < told["node_features"] < 0.05
    text = render_description(describe_store(store.path))
    assert "node_features from X_1" in text
    assert f"node_features {told['node_features']:.1e}" in text


def test_all_missing_files_are_named_at_once(tmp_path: Path) -> None:
    document = spec_document(
        {
            "train": {
                "format": "oc20_lmdb",
                "path": "a.lmdb",
                "source": "https://o.org",
            },
            "val": {"format": "extxyz", "path": "$KD_NOWHERE/b.xyz"},
        },
        tmp_path / "s.zarr",
        tmp_path / "absent.pt",
    )
    path = write_spec(tmp_path / "s.yaml", document)
    with pytest.raises(SpecError) as caught:
        load_spec(path)
    text = str(caught.value)
    for part in (
        "teacher.checkpoint=PATH",
        "splits.train.path=PATH (published at https://o.org)",
        "KD_NOWHERE is not set",
    ):
        assert part in text
    (tmp_path / "absent.pt").touch()
    (tmp_path / "a.lmdb").touch()
    assert set(load_spec(path, ["splits.val=null"]).splits) == {"train"}
