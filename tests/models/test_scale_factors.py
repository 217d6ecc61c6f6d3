"""Scale factors are found in all four places, and never guessed."""

import json

import pytest
import torch

from pipeline.errors import CheckpointError
from pipeline.models.checkpoint import load_checkpoint

VALUES = {f"upd_out_scalar_scale_{i}": 0.9 + 0.1 * i for i in range(3)}
ROUNDED = [torch.tensor(value).item() for value in VALUES.values()]


@pytest.fixture
def checkpoint(make_model):
    """Released PaiNN with three layers and no scale factor anywhere."""
    model = make_model("painn").float()
    state = {
        f"module.{name}": value
        for name, value in model.state_dict().items()
        if not name.endswith("scale_factor")
    }
    attributes = {**model.hyperparameters, "scale_file": "configs/painn/factors.json"}
    config = {"model": "painn", "model_attributes": attributes}
    return {"state_dict": state, "config": config, "normalizers": {}}


@pytest.fixture
def load(tmp_path):
    def run(checkpoint, **options):
        torch.save(checkpoint, tmp_path / "model.pt")
        loaded = load_checkpoint(tmp_path / "model.pt", **options)
        state = loaded.model.state_dict()
        return [state[f"{name}.scale_factor"].item() for name in VALUES]

    return run


def in_state(values):
    return {
        f"module.{name}.scale_factor": torch.tensor(value)
        for name, value in values.items()
    }


def test_in_the_state_dict(checkpoint, load):
    checkpoint["state_dict"].update(in_state(VALUES))
    assert load(checkpoint) == ROUNDED


@pytest.mark.parametrize(
    "form", [float, torch.tensor, lambda v: torch.nn.Parameter(torch.tensor([v]))]
)
def test_in_the_scale_dict(checkpoint, load, form):
    checkpoint["scale_dict"] = {name: form(value) for name, value in VALUES.items()}
    assert load(checkpoint) == ROUNDED


@pytest.mark.parametrize("kind", ["json", "pt"])
def test_in_a_named_file(checkpoint, load, tmp_path, kind):
    path = tmp_path / f"factors.{kind}"
    if kind == "json":
        path.write_text(json.dumps({"comment": "fitted on 16 batches", **VALUES}))
    else:
        named = {n: torch.nn.Parameter(torch.tensor(v)) for n, v in VALUES.items()}
        torch.save(named, path)
    # The attributes name factors.json, which here lies beside the checkpoint.
    options = {} if kind == "json" else {"scale_file": path}
    assert load(checkpoint, **options) == ROUNDED
    assert load(checkpoint, scale_file=path) == ROUNDED


def test_missing_ones_name_the_option(checkpoint, load):
    with pytest.raises(CheckpointError, match=r"option teacher\.scale_file"):
        load(checkpoint)
    checkpoint["scale_dict"] = dict(list(VALUES.items())[:2])
    with pytest.raises(CheckpointError, match="lacks 1 scale factors"):
        load(checkpoint)


def test_a_file_for_more_layers_serves(checkpoint, load, tmp_path):
    path = tmp_path / "six.json"
    path.write_text(json.dumps({**VALUES, "upd_out_scalar_scale_5": 7.0}))
    assert load(checkpoint, scale_file=path) == ROUNDED


def test_conflicts_are_refused(checkpoint, load, tmp_path):
    checkpoint["state_dict"].update(in_state(VALUES))
    checkpoint["scale_dict"] = {**VALUES, "upd_out_scalar_scale_1": 1.01}
    with pytest.raises(CheckpointError, match=r"scale_1 .* has different values"):
        load(checkpoint)
    checkpoint["scale_dict"] = VALUES
    assert load(checkpoint) == ROUNDED
    path = tmp_path / "other.json"
    path.write_text(json.dumps({**VALUES, "upd_out_scalar_scale_2": 2.0}))
    with pytest.raises(CheckpointError, match=r"scale_2 .* has different values"):
        load(checkpoint, scale_file=path)


def test_zero_means_unfitted(checkpoint, load):
    checkpoint["state_dict"].update(in_state({name: 0.0 for name in VALUES}))
    assert load(checkpoint) == [1.0, 1.0, 1.0]
    checkpoint["scale_dict"] = VALUES
    assert load(checkpoint) == ROUNDED


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not readable JSON"),
        ("[1, 2]", "not a mapping"),
        ('{"upd_out_scalar_scale_0": "x"}', "is not a number"),
        ('{"upd_out_scalar_scale_0": NaN}', "is nan"),
        ('{"upd_out_scalar_scale_0": true}', "is not a number"),
    ],
)
def test_unreadable_scale_files_are_refused(
    checkpoint, load, tmp_path, content, message
):
    path = tmp_path / "scale.json"
    path.write_text(content)
    with pytest.raises(CheckpointError, match=message):
        load(checkpoint, scale_file=path)


def test_absent_scale_file_is_named(checkpoint, load, tmp_path):
    for name in ("none.json", "none.pt"):
        with pytest.raises(CheckpointError, match=f"There is no .*{name}"):
            load(checkpoint, scale_file=tmp_path / name)


def test_paths_in_the_file_do_not_leave_its_folder(checkpoint, load, tmp_path):
    outside = tmp_path.parent / "factors.json"
    outside.write_text(json.dumps(VALUES))
    for named in (str(outside), "../factors.json"):
        checkpoint["config"]["model_attributes"]["scale_file"] = named
        with pytest.raises(CheckpointError, match="lacks 3 scale factors"):
            load(checkpoint)
