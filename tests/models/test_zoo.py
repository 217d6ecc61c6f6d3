"""Building by name, initial weights, known sizes."""

import math

import pytest
import torch

from pipeline.errors import DataError, SpecError
from pipeline.models.checkpoint import load_checkpoint, save_model
from pipeline.models.elements import check_elements
from pipeline.models.normalizer import Normalizer
from pipeline.models.scale_factors import SUFFIX
from pipeline.models.zoo import PRESETS, build_model

GEMNET = {
    "num_blocks": 1,
    "num_radial": 12,
    "num_spherical": 3,
    "emb_size_cbf": 7,
    "emb_size_atom": 24,
    "emb_size_edge": 32,
    "quad_interaction": True,
    "atom_edge_interaction": True,
    "edge_atom_interaction": True,
    "atom_interaction": True,
}
# Trainable parameters as published for these sizes, with 128 radial functions.
PUBLISHED = {
    "gemnet-oc-oc20": 38_864_384,
    "painn-big": 5_334_531,
    "painn-small": 1_029_635,
    "schnet": 455_809,
    "painn-big-oc20": 20_073_475,
    "painn-small-oc20": 3_689_475,
    "schnet-oc20": 9_088_513,
}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_presets_have_the_published_sizes(preset):
    with torch.device("meta"):
        model = build_model(*PRESETS[preset])
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == PUBLISHED[preset]


def test_painn_has_one_fixed_scale_factor_per_layer():
    model = build_model("painn", {"hidden_channels": 8, "num_layers": 3})
    fixed = {n: p for n, p in model.named_parameters() if not p.requires_grad}
    assert list(fixed) == [f"upd_out_scalar_scale_{i}.scale_factor" for i in range(3)]
    assert all(p.shape == () and p == 1 for p in fixed.values())


# The file of factors of the authors' PaiNN on OC20; on COLL they have none.
OC20_FACTORS = [1.03644, 0.89514, 0.89348, 0.88993, 0.88861, 0.88223]


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("painn-big-oc20", OC20_FACTORS),
        ("painn-small-oc20", OC20_FACTORS[:4]),
        ("painn-big", [1.0] * 6),
        ("painn-small", [1.0] * 4),
    ],
)
def test_fresh_painn_begins_with_the_factors_of_the_paper(preset, expected):
    name, sizes = PRESETS[preset]
    model = build_model(name, sizes | {"hidden_channels": 8})
    factors = [p.item() for p in model.parameters() if not p.requires_grad]
    assert factors == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize(
    ("given", "expected"), [([0.5], [0.5, 1]), ([2.0] * 3, [2, 2])]
)
def test_layers_without_a_factor_have_one(given, expected):
    sizes = {"hidden_channels": 8, "num_layers": 2, "scale_factors": given}
    model = build_model("painn", sizes)
    assert [p.item() for p in model.parameters() if not p.requires_grad] == expected
    with pytest.raises(
        SpecError, match="scale_factors is 'a', but a list of floats is"
    ):
        build_model("painn", sizes | {"scale_factors": "a"})


def test_factors_of_a_file_beat_those_of_the_preset(tmp_path):
    """Factors are state, so what a file says about the model does not name them."""
    name, sizes = PRESETS["painn-small-oc20"]
    model = build_model(name, sizes | {"hidden_channels": 8})
    fixed = [p for p in model.parameters() if not p.requires_grad]
    for number, factor in enumerate(fixed, 2):
        factor.data.fill_(number)
    assert "scale_factors" not in model.hyperparameters
    save_model(tmp_path / "m.safetensors", name, model, Normalizer(), {})
    loaded = load_checkpoint(tmp_path / "m.safetensors").model
    found = [v.item() for k, v in loaded.state_dict().items() if k.endswith(SUFFIX)]
    assert found == [2, 3, 4, 5]
    assert loaded.hyperparameters == model.hyperparameters


@pytest.mark.parametrize("name", ["painn", "schnet"])
def test_initial_weights_are_xavier_and_biases_zero(name):
    torch.manual_seed(0)
    model = build_model(name, {"hidden_channels": 64})
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear):
            bound = math.sqrt(6 / (layer.in_features + layer.out_features))
            weight = layer.weight.detach()
            assert weight.abs().max() <= bound
            if weight.numel() > 1000:
                assert weight.abs().max() > 0.98 * bound
                assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
            assert layer.bias is None or not layer.bias.any()


def test_initial_weights_of_gemnet_are_standardised():
    """Every row has mean 0 and the variance 1 / fan-in."""
    torch.manual_seed(0)
    model = build_model("gemnet_oc", {**GEMNET, "direct_forces": True})
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert len(layers) > 30
    for layer in layers:
        assert layer.bias is None
        row = layer.weight.detach()
        torch.testing.assert_close(row.mean(dim=1), torch.zeros(len(row)))
        expected = torch.full((len(row),), 1 / row.shape[1])
        torch.testing.assert_close(row.var(dim=1), expected, rtol=1e-2, atol=0)
    for name in ("tint", "qint"):
        basis = getattr(model, f"mlp_cbf_{name}").weight.detach()
        flat = basis.flatten(0, 1)
        assert flat.shape == (12 * 3, 7)
        torch.testing.assert_close(flat.mean(dim=0), torch.zeros(7))
        expected = torch.full((7,), 1 / 36)
        torch.testing.assert_close(flat.var(dim=0), expected, rtol=1e-2, atol=0)


def test_gemnet_has_fixed_scale_factors_of_one():
    model = build_model("gemnet_oc", {**GEMNET, "direct_forces": True})
    fixed = {n: p for n, p in model.named_parameters() if not p.requires_grad}
    # 11 in the block (2 + 3 + 2 + 2 + 1 + 1), 2 in each output block.
    assert len(fixed) == 11 + 2 * 2
    assert all(n.endswith(".scale_factor") and p == 1 for n, p in fixed.items())


def test_initial_embeddings():
    torch.manual_seed(0)
    painn = build_model("painn", {}).atom_emb.embeddings.weight.detach()
    assert painn.shape == (83, 512)
    assert painn.abs().max().item() == pytest.approx(3**0.5, rel=1e-2)
    assert painn.std().item() == pytest.approx(1, rel=1e-2)
    schnet = build_model("schnet", {"hidden_channels": 512}).embedding.weight.detach()
    assert schnet.shape == (100, 512)
    assert schnet.std().item() == pytest.approx(1, rel=1e-2)
    assert schnet.abs().max() > 3.5


@pytest.mark.parametrize(
    ("name", "hyperparameters", "message"),
    [
        (
            "gemnet",
            {},
            "No model is called 'gemnet'; known are gemnet_oc, painn, schnet",
        ),
        ("painn", {"hidden_chanels": 8}, "nearest known one is 'hidden_channels'"),
        ("schnet", {"num_rbf": 8}, "schnet has no hyperparameter 'num_rbf'"),
        ("painn", {"hidden_channels": "8"}, "painn.hidden_channels is '8'"),
        ("painn", {"hidden_channels": 8.5}, "positive int is needed"),
        ("painn", {"hidden_channels": True}, "positive int is needed"),
        ("painn", {"num_layers": 0}, "painn.num_layers is 0"),
        ("painn", {"num_layers": 10**9}, "painn.num_layers is 1000000000"),
        ("painn", {"cutoff": -1}, "positive float is needed"),
        ("painn", {"cutoff": float("nan")}, "positive float is needed"),
        ("painn", {"direct_forces": 1}, "bool is needed"),
        ("painn", {"rbf": {"name": "bernstein"}}, "use gaussian"),
        ("painn", {"envelope": {"name": "exponential"}}, "is not supported"),
        ("painn", {"num_rbf": 1}, "at least 2 functions"),
        ("schnet", {"readout": "max"}, "is not add, sum or mean"),
    ],
)
def test_wrong_hyperparameters_are_named(name, hyperparameters, message):
    with pytest.raises(SpecError, match=message):
        build_model(name, hyperparameters)


def test_whole_numbers_serve_as_lengths():
    assert build_model("schnet", {"cutoff": 6}).graph_rule.cutoff == 6


def test_first_unknown_element_is_named_with_its_sample():
    painn = build_model("painn", {"hidden_channels": 8})
    check_elements([1, 83], painn.elements)
    with pytest.raises(DataError, match=r"Sample 'c' holds .* atomic number 92"):
        check_elements([1, 6, 92, 94], painn.elements, list("abcd"))
    with pytest.raises(DataError, match=r"Sample holds .* atomic number 0"):
        check_elements([0, 1], build_model("schnet", {}).elements)


@pytest.mark.parametrize(
    ("name", "last"), [("gemnet_oc", 83), ("painn", 83), ("schnet", 99)]
)
def test_every_listed_element_has_a_row(name, last):
    size = GEMNET if name == "gemnet_oc" else {"hidden_channels": 8}
    model = build_model(name, size)
    assert (min(model.elements), max(model.elements)) == (1, last)
    numbers = torch.tensor(list(model.elements))
    rows = model.embedding(numbers) if name == "schnet" else model.atom_emb(numbers)
    assert len(rows.unique(dim=0)) == last
