"""Similarity of layers, against its definition by N×N Gram matrices."""

import csv
import io
import json
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kd_train.cli.train import cka_main, report_main
from kd_train.evaluation.cka import LinearCKA, Similarity, compare_models
from kd_train.loader.data import CachedSamples
from pipeline.models.checkpoint import load_checkpoint, save_model
from pipeline.models.zoo import build_model
from pipeline.store.reader import FeatureStore
from tests.commands import refusal, run_command
from tests.stores import (
    TINY_PAINN,
    build,
    spec_document,
    teacher_normalizer,
    write_spec,
)

CPU = torch.device("cpu")


def dense_cka(x: Any, y: Any) -> float:
    """Biased HSIC of linear kernels, normalised; both Gram matrices double-centred."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    n = len(x)
    centring = np.eye(n) - 1 / n
    k, l = (centring @ (z @ z.T) @ centring for z in (x, y))  # noqa: E741
    return float(np.sum(k * l) / np.sqrt(np.sum(k * k) * np.sum(l * l)))


def streamed(
    first: list[torch.Tensor], second: list[torch.Tensor], sizes: list[int]
) -> Any:
    """CKA of layers whose atoms come in batches of some sizes."""
    sums = LinearCKA()
    parts = zip(
        zip(*(layer.split(sizes) for layer in first), strict=True),
        zip(*(layer.split(sizes) for layer in second), strict=True),
        strict=True,
    )
    for one, other in parts:
        sums.add(one, other)
    return sums.result()


@pytest.fixture
def layers() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Two and three layers of different widths over 60 atoms, related to each other."""
    torch.manual_seed(0)
    base = torch.randn(60, 4, dtype=torch.float64)

    def related(width: int, noise: float) -> torch.Tensor:
        shape = 4, width
        mixed = base @ torch.randn(shape, dtype=torch.float64)
        return mixed + noise * torch.randn_like(mixed) + 5 * torch.randn(width)

    return [related(5, 0.1), related(3, 2.0)], [related(w, 0.5) for w in (7, 4, 1)]


@pytest.mark.parametrize("sizes", [[60], [1, 20, 39], [2] * 30])
def test_equals_the_definition_however_atoms_are_cut(layers, sizes):
    first, second = layers
    found = streamed(first, second, sizes)
    expected = [[dense_cka(x, y) for y in second] for x in first]
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    assert found.shape == (2, 3)
    assert found.max() > found.min() + 0.05


def test_invariant_to_rotations_scale_and_offset_but_not_to_any_map(layers):
    first, second = layers
    x, y = first[0], second[0]
    turn, _ = torch.linalg.qr(torch.randn(7, 7, dtype=torch.float64))
    expected = streamed([x], [y], [20, 40])
    turned = [y @ turn, -300.0 * y, y + torch.arange(7.0), y + 1e6]
    found = streamed([x], turned, [20, 40])
    np.testing.assert_allclose(found[0], np.repeat(expected, 4), rtol=1e-8)
    stretched = y * torch.tensor([30.0, 1, 1, 1, 1, 1, 1])
    assert abs(streamed([x], [stretched], [60]) - expected) > 0.01


def test_a_layer_with_itself_is_one_and_a_constant_one_is_missing(layers):
    first, _ = layers
    constant = torch.full((60, 3), 0.1, dtype=torch.float32)
    found = streamed([*first, constant], [*first, constant], [7, 53])
    np.testing.assert_allclose(np.diag(found)[:2], 1.0, rtol=1e-12)
    np.testing.assert_allclose(found[0, 1], found[1, 0])
    assert np.isnan(found[2]).all()
    assert np.isnan(found[:, 2]).all()


def test_memory_does_not_grow_with_atoms():
    sums, seen, sizes = LinearCKA(), [], set()
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        batch = torch.randn(50, 6, generator=generator)
        other = torch.randn(50, 4, generator=generator)
        sums.add([batch, batch[:, :2]], [other])
        seen += [weakref.ref(batch), weakref.ref(other)]
        del batch, other
        held = [*sums._means, sums._cross, *sums._own[0], *sums._own[1]]
        sizes.add(sum(tensor.untyped_storage().nbytes() for tensor in held))
    assert sums.count == 2000
    assert not any(reference() is not None for reference in seen)
    assert len(sizes) == 1


def batch_of_all(store: FeatureStore, split: str, file: Path) -> tuple[Any, Any]:
    """A model and one batch of a whole split for it."""
    model = load_checkpoint(file).model
    samples = CachedSamples(store.splits[split], model.graph_rule, model.elements)
    return model, samples.batch(np.arange(len(samples)))


def test_student_against_teacher_file_is_the_definition_on_all_atoms(
    small_store, finished, teacher_file
):
    found = compare_models(
        (str(finished), str(teacher_file)), small_store, "val", CPU, batch_atoms=70
    )
    student, batch = batch_of_all(small_store, "val", finished / "student.safetensors")
    teacher, own = batch_of_all(small_store, "val", teacher_file)
    with torch.no_grad():
        expected = [
            [
                dense_cka(
                    student(batch, {"node_features": a}).node_features,
                    teacher(own, {"node_features": b}).node_features,
                )
                for b in teacher.layers
            ]
            for a in student.layers
        ]
    np.testing.assert_allclose(found.matrix, expected, rtol=1e-4)
    assert found.first_layers == student.layers == ("m1", "u1", "m2", "u2")
    assert found.samples == len(small_store.splits["val"])
    assert found.atoms == batch.num_nodes


def test_stored_features_are_the_last_layer_of_their_teacher(small_store, teacher_file):
    found = compare_models((str(teacher_file), "teacher"), small_store, "train", CPU)
    assert found.second_layers == ("node_features",)
    last = found.first_layers.index("u2")
    assert found.matrix[last, 0] == pytest.approx(1.0, abs=1e-9)
    assert found.matrix[0, 0] < 0.999


def test_encoded_features_are_decoded(tmp_path, datasets, teacher_file):
    features = {"node_features": {"profile": "q8"}}
    document = spec_document(datasets, tmp_path / "s.zarr", teacher_file, features)
    store = build(write_spec(tmp_path / "spec.yaml", document))
    found = compare_models((str(teacher_file), "teacher"), store, "train+val", CPU)
    last = found.first_layers.index("u2")
    assert found.matrix[last, 0] == pytest.approx(1.0, abs=1e-3)
    assert found.matrix[last, 0] != 1.0
    assert found.split == "train+val"


def test_command_writes_matrix_map_and_description(
    small_store, finished, small_spec, tmp_path
):
    store, out = small_spec.parent / "small.zarr", tmp_path / "out"
    given = [finished, "teacher", "--data", store, "--split", "val", "--limit", 9]
    done = run_command(cka_main, [*given, "--out", out])
    assert done.exit_code == 0, done.output
    assert sorted(path.name for path in out.iterdir()) == [
        "cka.csv",
        "cka.json",
        "cka.pdf",
        "cka.png",
    ]
    rows = list(csv.reader(io.StringIO((out / "cka.csv").read_text())))
    assert rows[0] == ["layer", "node_features"]
    assert [row[0] for row in rows[1:]] == ["m1", "u1", "m2", "u2"]
    atoms = int(small_store.splits["val"].n_atoms[:9].sum())
    expected = compare_models(
        (str(finished), "teacher"), small_store, "val", CPU, limit=9
    )
    np.testing.assert_array_equal(
        [float(row[1]) for row in rows[1:]], expected.matrix[:, 0]
    )
    assert f"{atoms} atoms" in done.output
    about = json.loads((out / "cka.json").read_text())
    assert (about["samples"], about["atoms"]) == (9, atoms)
    assert about["fingerprint"] == small_store.fingerprint
    with Image.open(out / "cka.png") as image:
        assert image.width > 300
        assert image.height > 200
    report = tmp_path / "report"
    done = run_command(report_main, [finished, "--cka", out, "--out", report])
    assert done.exit_code == 0, done.output
    page = (report / "report.html").read_text()
    assert f"over {atoms} atoms (9 samples of split val)" in page
    assert "kd-report" in page
    (out / "cka.png").write_bytes(b"<svg>")
    said = refusal(report_main, [finished, "--cka", out, "--out", report])
    assert "kd-cka" in said


def test_command_says_what_is_wrong(finished, small_spec, labels_store, tmp_path):
    store = small_spec.parent / "small.zarr"
    given = ("--data", store, "--split", "val", "--out", tmp_path / "out")
    cases = {
        (finished, tmp_path, *given): "has no student.safetensors",
        (finished, tmp_path / "no.pt", *given): "There is no checkpoint file",
        (finished, finished / "config.yaml", *given): "config.yaml",
        (finished, "teacher", *given[:3], "tset", *given[4:]): "no split 'tset'",
    }
    for arguments, message in cases.items():
        assert message in refusal(cka_main, arguments)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="has no node_features of the teacher"):
        compare_models((str(finished), "teacher"), labels_store, "val", CPU)


def test_a_wide_map_has_no_numbers_but_every_layer(tmp_path):
    from kd_train.report.heatmap import write_similarity

    names = tuple(f"layer_{i}" for i in range(20))
    matrix = np.random.default_rng(0).uniform(size=(20, 20))
    matrix[3] = np.nan
    found = Similarity("a", "b", names, names, matrix, "val", 1, 2, "f" * 64)
    text = write_similarity(found, tmp_path)
    assert len(text.splitlines()) == 22
    rows = list(csv.reader(io.StringIO((tmp_path / "cka.csv").read_text())))
    assert rows[4][1:] == [""] * 20
    with Image.open(tmp_path / "cka.png") as image:
        assert 1000 < image.width < 3000


def test_elements_that_a_model_was_not_trained_on_are_refused(
    finished, labels_store, tmp_path
):
    """A8: features of an element that was never seen are noise."""
    path = tmp_path / "hydrocarbons.safetensors"
    model = build_model("painn", TINY_PAINN)
    about = {"training_data": {"elements": [1, 6], "undetermined": []}}
    save_model(path, "painn", model, teacher_normalizer(), about)
    given = ("--data", labels_store.path, "--split", "val", "--out", tmp_path / "out")
    said = refusal(cka_main, (finished, path, *given))
    assert "held no O" in said
    assert "set --any-element to go on" in said
    done = run_command(cka_main, (finished, path, *given, "--any-element"))
    assert done.exit_code == 0
