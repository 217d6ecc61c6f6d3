"""Released layouts made from our own models, and hostile files."""

import io
import json
import os
import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from pipeline.errors import CheckpointError
from pipeline.models.checkpoint import load_checkpoint, save_model
from pipeline.models.normalizer import NUM_REFERENCES, Normalizer
from tests.models.conftest import name_of

MEAN, STD, FORCE_STD = -0.75, 2.5, 1.25
OLD_NORMALIZERS = {
    "target": {"mean": torch.tensor(MEAN), "std": torch.tensor([STD])},
    "grad_target": {"mean": torch.tensor(0.0), "std": torch.tensor(FORCE_STD)},
}
NEW_NORMALIZERS = {
    "energy": {"mean": torch.tensor(MEAN), "rmsd": torch.tensor(STD)},
    "forces": {"mean": torch.tensor(0.0), "rmsd": torch.tensor(FORCE_STD)},
}
EXPECTED = Normalizer(MEAN, STD, FORCE_STD)
SUFFIX = ".scale_factor"


# The variants of a model are alike in files.
@pytest.fixture(params=["gemnet_oc", "painn", "painn-gradient", "schnet"])
def variant(request):
    return request.param


@pytest.fixture
def model(make_model, variant):
    return make_model(variant).float()


def released(model, prefix="", old=True):
    """Checkpoint in the released form: old configuration or new."""
    name = name_of(model)
    attributes = {
        **model.hyperparameters,
        "otf_graph": True,
        "scale_file": "configs/far/away.pt",
        "num_targets": 1,
    }
    config = {"model": name, "model_attributes": attributes}
    if not old:
        config = {"model": {"name": name, **attributes}}
    state = OrderedDict((prefix + k, v.clone()) for k, v in model.state_dict().items())
    normalizers = OLD_NORMALIZERS if old else NEW_NORMALIZERS
    return {"state_dict": state, "config": config, "normalizers": normalizers}


def factors_of(checkpoint):
    """Take the scale factors out of a state dict."""
    state = checkpoint["state_dict"]
    names = [name for name in state if name.endswith(SUFFIX)]
    return {name.removesuffix(SUFFIX): state.pop(name) for name in names}


@pytest.fixture
def load(tmp_path):
    """Loaded form of a checkpoint that is written to disk first."""

    def run(checkpoint, **options):
        path = tmp_path / "model.pt"
        torch.save(checkpoint, path)
        return load_checkpoint(path, **options)

    return run


def assert_same_weights(loaded, model):
    expected = model.state_dict()
    actual = loaded.model.state_dict()
    assert list(actual) == list(expected)
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize(
    "prefix", ["", "module.module.", "_orig_mod.", "module._orig_mod.backbone."]
)
def test_every_prefix_and_configuration(load, model, prefix, old):
    loaded = load(released(model, prefix, old))
    assert_same_weights(loaded, model)
    assert loaded.normalizer == EXPECTED
    assert not loaded.model.training
    assert loaded.model.hyperparameters == model.hyperparameters
    assert len(loaded.sha256) == 64
    json.dumps(loaded.provenance)
    for name, parameter in loaded.model.named_parameters():
        assert parameter.requires_grad != name.endswith(SUFFIX)


def test_compiled_parts_and_their_averages_and_factors(load, model):
    """B5: ``torch.compile`` of a part puts ``_orig_mod`` inside names."""
    checkpoint = released(model)
    state = checkpoint["state_dict"]
    shadow = [v for k, v in state.items() if not k.endswith((SUFFIX, "offset"))]
    checkpoint["ema"] = {"shadow_params": shadow}
    inside = {k.replace(".", "._orig_mod.", 1): v for k, v in state.items()}
    checkpoint["state_dict"] = {f"_orig_mod.module.{k}": v for k, v in inside.items()}
    assert_same_weights(load(checkpoint), model)
    factors = factors_of(checkpoint)
    if factors:
        checkpoint["scale_dict"] = factors
        assert_same_weights(load(checkpoint), model)


@pytest.mark.parametrize("variant", ["painn"], indirect=True)
def test_names_that_are_alike_without_prefixes_are_refused(load, model):
    """B5: which of the two is meant cannot be known."""
    checkpoint = released(model)
    name, value = next(iter(checkpoint["state_dict"].items()))
    checkpoint["state_dict"][f"_orig_mod.{name}"] = value + 1
    with pytest.raises(CheckpointError, match=f"holds {name} twice.*_orig_mod"):
        load(checkpoint)


def test_published_files_may_have_prefixes(model, tmp_path):
    """B5: a file of ours whose tensors were saved from a compiled model."""
    path = tmp_path / "model.safetensors"
    save_model(path, name_of(model), model, EXPECTED, {})
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {f"_orig_mod.{k}": file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    save_file(tensors, path, metadata)
    assert_same_weights(load_checkpoint(path), model)


@pytest.mark.parametrize("variant", ["schnet"], indirect=True)
def test_aliases_and_masses_of_early_schnet_files_are_ignored(load, model):
    checkpoint = released(model, "module.")
    state = checkpoint["state_dict"]
    state["module.atomic_mass"] = torch.ones(119, dtype=torch.float64)
    for key in [k for k in state if ".mlp." in k]:
        state[key.replace(".mlp.", ".conv.nn.")] = state[key]
    checkpoint["config"]["model_attributes"].pop("max_neighbors")
    assert_same_weights(load(checkpoint), model)


@pytest.mark.parametrize("variant", ["schnet"], indirect=True)
@pytest.mark.parametrize(("use_pbc", "limit"), [(True, 50), (False, 32)])
def test_schnet_limit_is_the_one_fixed_in_released_code(load, model, use_pbc, limit):
    checkpoint = released(model)
    checkpoint["config"]["model_attributes"].update(use_pbc=use_pbc, max_neighbors=7)
    rule = load(checkpoint).model.graph_rule
    assert (rule.max_neighbors, rule.periodic) == (limit, use_pbc)


def test_distillation_adapters_are_dropped(load, model):
    checkpoint = released(model)
    adapters = {f"{a}_mapping.weight": torch.ones(2, 2) for a in ("n2n", "v2v", "e2e")}
    checkpoint["state_dict"] = OrderedDict({**adapters, **checkpoint["state_dict"]})
    average = [
        torch.full_like(v, 0.5)
        for k, v in checkpoint["state_dict"].items()
        if not k.endswith((SUFFIX, ".offset"))
    ]
    assert_same_weights(load(checkpoint), model)
    checkpoint["ema"] = {"decay": 0.999, "shadow_params": average}
    for name, value in load(checkpoint).model.named_parameters():
        if not name.endswith(SUFFIX):
            assert (value == 0.5).all(), name


def test_moving_average_is_default_and_optional(load, model):
    checkpoint = released(model, "module.")
    trained = [k for k, v in model.named_parameters() if v.requires_grad]
    # The order of the list is the order of the state dict.
    average = [model.state_dict()[k] + i for i, k in enumerate(trained)]
    checkpoint["ema"] = {"decay": 0.999, "num_updates": 5, "shadow_params": average}
    loaded = load(checkpoint)
    for index, name in enumerate(trained):
        expected = model.state_dict()[name] + index
        assert torch.equal(loaded.model.state_dict()[name], expected)
    assert loaded.provenance["weights"] == "ema"
    raw = load(checkpoint, weights="raw")
    assert_same_weights(raw, model)
    assert raw.provenance["weights"] == "raw"
    assert load(released(model)).provenance["weights"] == "raw"


def test_moving_average_that_does_not_fit_is_refused(load, model):
    checkpoint = released(model)
    average = [v for v in model.parameters() if v.requires_grad]
    for wrong in (average[1:], average[::-1], [*average[:-1], 3], "abc", None):
        checkpoint["ema"] = {"shadow_params": wrong}
        with pytest.raises(CheckpointError, match=r"averaged.*teacher\.weights: raw"):
            load(checkpoint)
        assert_same_weights(load(checkpoint, weights="raw"), model)


class TestNormalizers:
    def test_empty_means_none(self, load, model):
        checkpoint = released(model)
        checkpoint["normalizers"] = {}
        checkpoint["config"]["dataset"] = {"target_mean": 5.0, "target_std": 7.0}
        assert load(checkpoint).normalizer == Normalizer()

    @pytest.mark.parametrize("several", [False, True])
    def test_configured_constants_count_when_labels_are_normalized(
        self, load, model, several
    ):
        checkpoint = released(model)
        checkpoint["normalizers"] = {}
        dataset = {
            "normalize_labels": True,
            "target_mean": 5.0,
            "target_std": 7.0,
            "grad_target_mean": 0.0,
            "grad_target_std": 3.0,
        }
        checkpoint["config"]["dataset"] = [dataset, {}] if several else dataset
        assert load(checkpoint).normalizer == Normalizer(5.0, 7.0, 3.0)

    def test_element_references_are_padded(self, load, model):
        checkpoint = released(model, old=False)
        values = torch.arange(101, dtype=torch.float32) / 4
        checkpoint["elementrefs"] = {"energy": {"element_references": values}}
        references = load(checkpoint).normalizer.element_references
        assert references == tuple(z / 4 for z in range(101)) + (0.0,) * 18
        checkpoint["elementrefs"] = {}
        assert load(checkpoint).normalizer == EXPECTED

    @pytest.mark.parametrize(
        ("entry", "message"),
        [
            ({"forces": {"mean": torch.tensor(0.1)}}, "adds a constant to all forces"),
            ({"energy": {"mean": torch.ones(3)}}, "no number for mean"),
            ({"energy": {"mean": 0.0, "rmsd": "big"}}, "no number for rmsd"),
            ({"energy": {"mean": 0.0, "rmsd": 0.0}}, "must be positive"),
            ({"energy": {"mean": float("nan"), "rmsd": 1.0}}, "not finite"),
        ],
    )
    def test_unusable_ones_are_refused(self, load, model, entry, message):
        checkpoint = released(model)
        checkpoint["normalizers"] = entry
        with pytest.raises(CheckpointError, match=message):
            load(checkpoint)

    @pytest.mark.parametrize(
        "values",
        [torch.ones(NUM_REFERENCES + 1), [1.0], torch.ones(3, dtype=torch.complex64)],
    )
    def test_odd_element_references_are_refused(self, load, model, values):
        checkpoint = released(model)
        checkpoint["elementrefs"] = {"energy": {"element_references": values}}
        with pytest.raises(CheckpointError, match="element references"):
            load(checkpoint)


def width_of(model):
    """Name of the first size of a model."""
    return "emb_size_atom" if name_of(model) == "gemnet_oc" else "hidden_channels"


def broken(checkpoint, how, model):
    state = checkpoint["state_dict"]
    name = next(k for k in state if k.endswith("weight"))
    changes = {
        "missing": lambda: state.pop(name),
        "unexpected": lambda: state.update({"extra.weight": torch.ones(1)}),
        "shape": lambda: state.update({name: torch.ones(3)}),
        "nan": lambda: state[name].fill_(float("nan")),
        "complex": lambda: state.update({name: state[name] * 1j}),
        "sparse": lambda: state.update({name: state[name].to_sparse()}),
        "empty": lambda: state.update({name: state[name].to("meta")}),
        "no state": lambda: checkpoint.pop("state_dict"),
        "not tensors": lambda: state.update({name: 3}),
        "other model": lambda: checkpoint["config"].update(model="dimenet"),
        "no config": lambda: checkpoint.pop("config"),
        "bad size": lambda: checkpoint["config"]["model_attributes"].update(
            {width_of(model): "big"}
        ),
        "huge": lambda: checkpoint["config"]["model_attributes"].update(
            {width_of(model): 10**12}
        ),
    }
    changes[how]()
    return checkpoint


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", r"lacks 1 entries \(\w+"),
        ("unexpected", r"has unknown 1 entries \(extra\.weight"),
        ("shape", r"has shape \(3,\), but this model needs"),
        ("nan", "holds numbers that are not finite"),
        ("complex", "is not a dense array of numbers"),
        ("sparse", "is not a dense array of numbers"),
        ("empty", "is not a dense array of numbers"),
        ("no state", "has no state_dict"),
        ("not tensors", "has no state_dict"),
        ("other model", "'dimenet' .known: gemnet_oc, painn, schnet"),
        ("no config", "None .known: gemnet_oc, painn, schnet"),
        ("bad size", r"\w+ is 'big'"),
        ("huge", r"\w+ is 1000000000000"),
    ],
)
def test_checkpoints_that_do_not_fit_are_refused(load, model, how, message):
    with pytest.raises(CheckpointError, match=message):
        load(broken(released(model), how, model))


def test_numpy_numbers_among_the_metrics_are_harmless(load, model):
    checkpoint = released(model)
    checkpoint["val_metrics"] = {"mae": np.float64(0.1), "n": np.int64(3)}
    checkpoint["best"] = np.float32(0.5)
    assert_same_weights(load(checkpoint), model)


def test_loading_leaves_the_random_numbers_alone(load, model):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    load(released(model))
    assert torch.equal(torch.rand(3), expected)


class _Command:
    """Runs a harmless command when unpickled; nothing may ever unpickle it."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


class _Evaluation:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return eval, (f"open({str(self.target)!r}, 'w').close()",)


class _ObjectScalar:
    """A numpy scalar of type object, which carries a pickle of its own."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        scalar = np.float64(0.0).__reduce__()[0]
        return scalar, (np.dtype("O"), pickle.dumps(_Command(self.target)))


class _Shell:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch '{self.target}'",)


ATTACKS = {
    "in the state": lambda payload, good: {**good, "state_dict": payload},
    "in the metrics": lambda payload, good: {**good, "val_metrics": [payload]},
    "alone": lambda payload, good: payload,
}


@pytest.mark.parametrize("place", ATTACKS)
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "payload", [_Command, _Evaluation, _ObjectScalar, _Shell], ids=lambda p: p.__name__
)
@pytest.mark.parametrize("variant", ["schnet"], indirect=True)
def test_files_with_code_are_refused_and_run_nothing(
    tmp_path, model, payload, zipped, place
):
    target, path = tmp_path / "harm", tmp_path / "model.pt"
    content = ATTACKS[place](payload(target), released(model))
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    assert "could run code" in str(caught.value)
    if payload is _Shell:
        assert f"({os.name}.system)" in str(caught.value)
    assert not target.exists()


@pytest.mark.parametrize("payload", [_Command, _Evaluation, _Shell])
def test_the_attacks_are_armed(tmp_path, payload):
    target = tmp_path / "harm"
    pickle.loads(pickle.dumps(payload(target)))
    assert target.exists()


def test_plain_pickles_are_refused(tmp_path):
    path, target = tmp_path / "model.pt", tmp_path / "harm"
    path.write_bytes(pickle.dumps(_Command(target)))
    with pytest.raises(CheckpointError, match=r"model\.pt"):
        load_checkpoint(path)
    assert not target.exists()


@pytest.mark.parametrize("variant", ["schnet"], indirect=True)
def test_damaged_torch_files_are_refused(tmp_path, model):
    path = tmp_path / "model.pt"
    buffer = io.BytesIO()
    torch.save(released(model), buffer)
    content = buffer.getvalue()
    garbage = np.random.default_rng(0).bytes(5000)
    for cut in (
        b"",
        content[:10],
        content[: len(content) // 2],
        content[:-30],
        garbage,
    ):
        path.write_bytes(cut)
        with pytest.raises(CheckpointError, match=r"model\.pt"):
            load_checkpoint(path)
    path.write_bytes(content)
    assert_same_weights(load_checkpoint(path), model)


def test_missing_files_and_folders_are_named(tmp_path):
    for path in (tmp_path / "none.pt", tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(CheckpointError, match="There is no checkpoint file"):
            load_checkpoint(path)


def test_a_list_is_no_checkpoint(load):
    with pytest.raises(CheckpointError, match="holds a list"):
        load([1, 2])
