"""What leaves a finished run: the plain network, and a program that needs no class."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from kd_train.cli.export import export_main
from kd_train.evaluation.export import (
    HEADER,
    compare_program,
    export_student,
    tensor_inputs,
)
from kd_train.evaluation.load_student import load_student, predict_consistently
from pipeline.errors import CheckpointError
from pipeline.graphs.batch import collate
from pipeline.graphs.neighbors import neighbor_edges
from pipeline.models.checkpoint import load_checkpoint, save_model
from pipeline.models.normalizer import Normalizer
from pipeline.models.zoo import PRESETS, build_model
from pipeline.store.reader import FeatureStore
from tests.commands import refusal
from tests.kd_train.runs import make_run
from tests.stores import STUDENTS, TINY_PAINN, save_gemnet, train_config
from tests.teachers.shared_data import made_samples

REFERENCES = tuple(-10.0 * z if z in (1, 6, 8) else 0.0 for z in range(119))
NORMALIZER = Normalizer(-2.5, 3.0, 1.7, REFERENCES)
MODELS = {
    "painn": ("painn", TINY_PAINN | {"max_neighbors": 7}),
    "schnet": ("schnet", STUDENTS["schnet-demo"] | {"max_neighbors": 7}),
}


@pytest.mark.parametrize("preset", ["painn-small", "schnet", "gemnet-oc-small"])
def test_file_has_the_parameters_of_the_plain_network(
    preset: str, tmp_path: Path
) -> None:
    name, hyperparameters = PRESETS[preset]
    model = build_model(name, hyperparameters)
    path = tmp_path / "student.safetensors"
    save_model(path, name, model, NORMALIZER, {"config": {"seed": 3}})
    with torch.device("meta"):
        plain = build_model(name, hyperparameters).state_dict()
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["kd_train"])
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    assert shapes == {key: list(value.shape) for key, value in plain.items()}
    assert header["provenance"] == {"config": {"seed": 3}}


@pytest.mark.parametrize("student", list(STUDENTS))
def test_adapters_of_any_student_stay_behind(
    student: str, small_store: FeatureStore, tmp_path: Path
) -> None:
    config = train_config(student, strategy="n2n", steps=1, eval_every=1, recipe="none")
    run = make_run(small_store, tmp_path, config)
    run.train(resume=False)
    assert len(list(run.learner.adapters.parameters())) == 2
    name, hyperparameters = PRESETS[student]
    plain = build_model(name, hyperparameters | STUDENTS[student])
    loaded = load_checkpoint(tmp_path / "student.safetensors")
    expected = [(key, value.shape) for key, value in plain.named_parameters()]
    found = [(key, value.shape) for key, value in loaded.model.named_parameters()]
    assert found == expected
    written = json.loads(config.model_dump_json())
    # What the defaults are where all samples have labels, and none has a virial.
    written["loss"] |= {"pseudo_label_weight": 0.0, "virial_weight": 0.0}
    assert loaded.provenance["config"] == written


def test_more_than_the_plain_network_is_refused(tmp_path: Path) -> None:
    model = build_model("painn", TINY_PAINN)
    model.add_module("n2n_mapping", torch.nn.Linear(16, 8))
    path = tmp_path / "student.safetensors"
    with pytest.raises(CheckpointError, match=r"n2n_mapping\.bias"):
        save_model(path, "painn", model, NORMALIZER, {})
    assert not path.exists()


@pytest.mark.parametrize("kind", list(MODELS))
def test_a_program_computes_what_the_model_does(kind: str, tmp_path: Path) -> None:
    name, hyperparameters = MODELS[kind]
    torch.manual_seed(8)
    path, program = tmp_path / "m.safetensors", tmp_path / "m.pt2"
    model = build_model(name, hyperparameters)
    save_model(path, name, model, NORMALIZER, {"config": {"seed": 3}})
    student = load_student(path)
    worst = export_student(student, program)
    assert max(worst.values()) < 1e-3
    # A molecule, a chiral one and a crystal: other sizes, and shifts that matter.
    samples = [sample.structure for sample in made_samples()]
    edges = [neighbor_edges(s, student.model.graph_rule) for s in samples]
    batch = collate(samples, edges)
    found, header = _run_elsewhere(program, tensor_inputs(batch), tmp_path)
    expected = predict_consistently(student, batch)
    energy, forces, virial = expected.energy, expected.forces, expected.virial
    assert forces is not None
    assert (virial is not None) == (kind == "schnet") == (len(found) == 3)
    if virial is not None:
        torch.testing.assert_close(found[2], virial, rtol=1e-4, atol=1e-4)
        assert virial.abs().amax(dim=(1, 2)).min() > 1e-3
    assert header["outputs"] == ["energy", "forces", "virial"][: len(found)]
    torch.testing.assert_close(found[0], energy, rtol=0, atol=1e-4)
    torch.testing.assert_close(found[1], forces, rtol=1e-4, atol=1e-5)
    assert float(forces.abs().max()) > 1e-3
    assert header["graph"]["cutoff"] == 5.0
    assert header["normalizer"] == NORMALIZER.to_dict()
    references = NORMALIZER.element_references
    assert header["elements"] == ([z for z, e in enumerate(references) if e] or None)
    # Another model is not taken for this one.
    other = replace(student, normalizer=replace(NORMALIZER, energy_mean=-2.0))
    with pytest.raises(CheckpointError, match=r"its energy deviates by up to 0\.5"):
        compare_program(other, program.read_bytes())


def _run_elsewhere(
    program: Path, inputs: tuple[Tensor, ...], folder: Path
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Results and header of a program, in a process without any class of ours."""
    torch.save(inputs, folder / "inputs.pt")
    code = f"""
import sys, torch
files = {{{HEADER!r}: ""}}
program = torch.export.load({str(program)!r}, extra_files=files)
inputs = torch.load({str(folder / "inputs.pt")!r}, weights_only=True)
torch.save(program.module()(*inputs), {str(folder / "out.pt")!r})
print(files[{HEADER!r}])
ours = ("pipeline", "kd_train", "torch_geometric")
assert not [name for name in sys.modules if name.split(".")[0] in ours]
"""
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = torch.load(folder / "out.pt", weights_only=True)
    return results, json.loads(done.stdout)


def test_gemnet_says_that_it_cannot_be_exported(tmp_path: Path) -> None:
    words = [save_gemnet(tmp_path / "g.safetensors"), "--out", tmp_path / "g.pt2"]
    assert "A gemnet_oc cannot be exported" in refusal(export_main, words)
    assert not (tmp_path / "g.pt2").exists()


def test_shifts_are_those_of_the_cells() -> None:
    samples = [sample.structure for sample in made_samples()]
    rule = build_model("painn", TINY_PAINN).graph_rule
    edges = [neighbor_edges(s, rule) for s in samples]
    *_, shifts, natoms = tensor_inputs(collate(samples, edges))
    wanted = [e.cell_offsets @ s.cell for e, s in zip(edges, samples, strict=True)]
    np.testing.assert_allclose(shifts, np.concatenate(wanted), atol=1e-5)
    assert np.abs(shifts.numpy()).max() > 3
    assert natoms.tolist() == [len(s) for s in samples]


def test_models_of_molecules_are_exported_with_their_elements(tmp_path: Path) -> None:
    """A5 and A8: neither images nor other elements are in the comparison."""
    path, program = tmp_path / "m.safetensors", tmp_path / "m.pt2"
    model = build_model("schnet", STUDENTS["schnet-demo"] | {"use_pbc": False})
    about = {"training_data": {"elements": [1, 8], "undetermined": []}}
    save_model(path, "schnet", model, NORMALIZER, about)
    export_student(load_student(path), program)
    files = {HEADER: ""}
    torch.export.load(program, extra_files=files)
    header = json.loads(files[HEADER])
    assert header["elements"] == [1, 8]
    assert header["graph"]["periodic"] is False
