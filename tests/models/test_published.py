"""Our published format: one safetensors file that rebuilds the model."""

import json

import pytest
import safetensors.torch
import torch

from pipeline.errors import CheckpointError
from pipeline.models.checkpoint import load_checkpoint, save_model
from pipeline.models.normalizer import Normalizer
from tests.models.conftest import name_of

EXPECTED = Normalizer(-0.75, 2.5, 1.25)


@pytest.fixture
def model(make_model, variant):
    return make_model(variant).float()


def assert_same_weights(loaded, model):
    expected = model.state_dict()
    assert list(loaded.model.state_dict()) == list(expected)
    torch.testing.assert_close(loaded.model.state_dict(), expected, rtol=0, atol=0)


def test_round_trip(tmp_path, model):
    path = tmp_path / "new" / "model.safetensors"
    name = name_of(model)
    normalizer = Normalizer(-1.5, 2.0, 3.0, (0.0, -13.6, *[0.25] * 117))
    provenance = {"strategy": "n2n", "seed": 3}
    save_model(path, name, model, normalizer, provenance)
    loaded = load_checkpoint(path)
    assert_same_weights(loaded, model)
    assert loaded.name == name
    assert loaded.normalizer == normalizer
    assert loaded.provenance == provenance
    assert loaded.model.hyperparameters == model.hyperparameters
    assert not loaded.model.training


def test_same_model_gives_the_same_bytes(tmp_path, model):
    name = name_of(model)
    paths = [tmp_path / f"{i}.safetensors" for i in range(2)]
    for path in paths:
        save_model(path, name, model, EXPECTED, {"b": 1, "a": 2})
    assert load_checkpoint(paths[0]).sha256 == load_checkpoint(paths[1]).sha256


def test_double_precision_is_rounded(tmp_path, make_model):
    model = make_model("schnet")
    save_model(tmp_path / "m.safetensors", "schnet", model, EXPECTED, {})
    assert_same_weights(load_checkpoint(tmp_path / "m.safetensors"), model.float())


@pytest.fixture
def content(tmp_path, make_model):
    path = tmp_path / "good.safetensors"
    save_model(path, "schnet", make_model("schnet"), EXPECTED, {})
    return path.read_bytes()


def test_damaged_files_are_refused(tmp_path, content):
    path = tmp_path / "model.safetensors"
    huge_header = (2**60).to_bytes(8, "little") + content[8:]
    cuts = (
        b"",
        content[:5],
        content[: len(content) // 2],
        content[:-1],
        huge_header,
    )
    for damaged in cuts:
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="not a readable safetensors"):
            load_checkpoint(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, "does not name its model"),
        ("not json", "does not name its model"),
        ("[" * 100_000, "does not name its model"),
        ("[1]", "needs the entries"),
        ({"model": 3}, "needs the entries"),
        ({"provenance": None}, "needs the entries"),
        ({"model": "os.system"}, "No model is called 'os.system'"),
        ({"hyperparameters": {"__class__": 1}}, "no hyperparameter '__class__'"),
        ({"hyperparameters": {"hidden_channels": 10**12}}, "hidden_channels is"),
        ({"normalizer": {"energy_std": 1.0}}, "normaliser cannot be read"),
    ],
)
def test_odd_metadata_is_refused(tmp_path, make_model, change, message):
    model = make_model("schnet").float()
    header = {
        "model": "schnet",
        "hyperparameters": model.hyperparameters,
        "normalizer": EXPECTED.to_dict(),
        "provenance": {},
    }
    text = json.dumps({**header, **change}) if isinstance(change, dict) else change
    metadata = None if change is None else {"kd_train": text}
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors.torch.save(model.state_dict(), metadata=metadata))
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(path)


def test_missing_scale_factor_is_refused(tmp_path, make_model):
    model = make_model("painn").float()
    path = tmp_path / "model.safetensors"
    save_model(path, "painn", model, EXPECTED, {})
    tensors = safetensors.torch.load_file(path)
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    del tensors["upd_out_scalar_scale_1.scale_factor"]
    path.write_bytes(safetensors.torch.save(tensors, metadata=metadata))
    with pytest.raises(CheckpointError, match="lacks 1 entries"):
        load_checkpoint(path)
