"""Small models of the original implementation, stored in this repository.

``benchmarks/make_reference.py`` writes the files. Every model must predict what its
original does, with its weights given directly and through every layout of a checkpoint.
"""

import re

import pytest
import torch

from pipeline.models.checkpoint import load_checkpoint
from pipeline.models.normalizer import Normalizer
from pipeline.models.zoo import MODELS, build_model, known_hyperparameters
from tests.models.references import FIXTURES, Original

NAMES = ("gemnet_oc", "gemnet_oc_gradient", "painn", "schnet")
EXPECTED = Normalizer(-0.75, 2.5, 1.25)
FACTOR = ".scale_factor"
# Entries that are stored but not trained, as documented for released files.
CONSTANT = re.compile(rf".*\{FACTOR}|.*offset|atomic_mass")
# Where a file of a year keeps its factors, how it names its parts, its prefix.
LAYOUTS = {
    "2020 release": ("scale_dict", "old", "module.module."),
    "2022 release": ("scale_dict", "old", "module.module."),
    "2022 release, factors in a file": ("file", "old", "module.module."),
    "2023 release": ("state_dict", "old", "module."),
    "fairchem-core, parallel": ("state_dict", "new", "module."),
    "fairchem-core, one process": ("state_dict", "new", ""),
    "fairchem-core, backbone and heads": ("state_dict", "hydra", ""),
}


@pytest.fixture(params=NAMES)
def original(request):
    return Original(request.param)


def test_fixtures_are_small():
    assert {path.stem for path in FIXTURES.glob("*.npz")} == set(NAMES)
    assert all(path.stat().st_size < 150_000 for path in FIXTURES.glob("*.npz"))


def test_own_model_with_their_weights_predicts_the_same(original):
    kind = MODELS[original.model]
    attributes = kind.from_released(original.attributes)
    model = build_model(
        original.model, known_hyperparameters(original.model, attributes)
    )
    state = original.full_state()
    kept = {k: v for k, v in state.items() if not re.fullmatch(kind.ignored_entries, k)}
    assert (len(kept) < len(state)) == (original.model != "painn")
    model.load_state_dict(kept)
    original.assert_predicted_by(model.eval())


def normalizers(generation):
    names = ("target", "grad_target") if generation == "old" else ("energy", "forces")
    spread = "std" if generation == "old" else "rmsd"
    constants = ((EXPECTED.energy_mean, EXPECTED.energy_std), (0.0, EXPECTED.force_std))
    return {
        name: {"mean": torch.tensor(mean), spread: torch.tensor(width)}
        for name, (mean, width) in zip(names, constants, strict=True)
    }


def config(original, generation):
    attributes = {
        **original.attributes,
        "otf_graph": True,
        "scale_file": "configs/elsewhere/factors.pt",
        "num_targets": 1,
    }
    if generation == "old":
        return {"model": original.model, "model_attributes": attributes}
    if generation == "new":
        return {"model": {"name": original.model, **attributes}}
    backbone = {"model": f"{original.model}_backbone", **attributes}
    # The depth of the output layers is that of the heads, whatever the backbone says.
    depth = {"num_global_out_layers": attributes.get("num_global_out_layers", 2)}
    backbone["num_global_out_layers"] = 9
    heads = {"energy": depth, "forces": depth}
    return {"model": {"name": "hydra", "backbone": backbone, "heads": heads}}


def renamed(key, generation, prefix):
    """Name of an entry in a file: wrapped, or sorted under a backbone and heads."""
    if generation != "hydra":
        return prefix + key
    heads = {"out_mlp_E": "energy", "out_energy": "energy"}
    heads |= {"out_mlp_F": "forces", "out_forces": "forces"}
    head = heads.get(key.split(".")[0])
    return f"backbone.{key}" if head is None else f"output_heads.{head}.{key}"


def write(original, layout, folder, average=None):
    """A checkpoint of ``original`` in one layout."""
    factors_in, generation, prefix = LAYOUTS[layout]
    state = original.full_state()
    if original.model == "schnet" and generation == "old":
        state["atomic_mass"] = torch.ones(119, dtype=torch.float64)
    factors = {k: v for k, v in state.items() if k.endswith(FACTOR)}
    content = {"normalizers": normalizers(generation), "val_metrics": None}
    content["config"] = config(original, generation)
    if factors_in != "state_dict":
        state = {k: v for k, v in state.items() if k not in factors}
        plain = {k.removesuffix(FACTOR): v for k, v in factors.items()}
        if factors_in == "scale_dict":
            content["scale_dict"] = plain
        else:
            torch.save(plain, folder / "factors.pt")
    content["state_dict"] = {
        renamed(k, generation, prefix): v for k, v in state.items()
    }
    if average is not None:
        content["ema"] = {"decay": 0.999, "num_updates": 7, "shadow_params": average}
    torch.save(content, folder / "model.pt")
    return folder / "model.pt"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_checkpoints_in_every_layout_predict_the_same(original, layout, tmp_path):
    loaded = load_checkpoint(write(original, layout, tmp_path))
    assert loaded.name == original.model
    assert loaded.normalizer == EXPECTED
    original.assert_predicted_by(loaded.model)


@pytest.mark.parametrize("layout", ["2022 release", "fairchem-core, one process"])
def test_average_is_listed_in_the_order_of_the_weights(original, layout, tmp_path):
    trained = [k for k in original.state if not CONSTANT.fullmatch(k)]
    average = [original.state[k].clone() for k in trained]
    for key in trained:
        original.state[key] = torch.zeros_like(original.state[key])
    path = write(original, layout, tmp_path, average)
    original.assert_predicted_by(load_checkpoint(path).model)
    raw = load_checkpoint(path, weights="raw").model
    assert not any(v.any() for k, v in raw.named_parameters() if k in trained)
