"""Choices of released configurations that names and shapes of weights do not show."""

import pytest
import torch

from pipeline.errors import CheckpointError
from pipeline.models.checkpoint import load_checkpoint
from tests.models.test_checkpoint import assert_same_weights, released


@pytest.fixture
def load(tmp_path):
    """Loaded form of a checkpoint that is written to disk first."""

    def run(checkpoint):
        torch.save(checkpoint, tmp_path / "model.pt")
        return load_checkpoint(tmp_path / "model.pt")

    return run


@pytest.fixture(params=["gemnet_oc", "painn"])
def variant(request):
    return request.param


@pytest.fixture
def model(make_model, variant):
    return make_model(variant).float()


def attributes_of(checkpoint):
    return checkpoint["config"]["model_attributes"]


class TestChoicesOfGemNet:
    @pytest.fixture
    def variant(self):
        return "gemnet_oc"

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"scale_basis": True}, r"gemnet_oc\.scale_basis is on"),
            (
                {"rbf_spherical": {"name": "gaussian", "trainable": True}},
                r"gemnet_oc\.rbf_spherical is trainable",
            ),
            # What the released code takes where a configuration does not say.
            ({"sbf": None}, r"gemnet_oc\.sbf is 'spherical_harmonics'"),
        ],
    )
    def test_they_are_refused(self, load, model, change, message):
        checkpoint = released(model)
        attributes_of(checkpoint).update(change)
        with pytest.raises(CheckpointError, match=rf"model\.pt.*{message}"):
            load(checkpoint)

    def test_basis_of_quadruplets_matters_only_with_them(self, load, make_model):
        model = make_model("gemnet_oc-triplets").float()
        checkpoint = released(model)
        del attributes_of(checkpoint)["sbf"]
        assert_same_weights(load(checkpoint), model)

    def test_harmless_ones_are_not(self, load, model):
        checkpoint = released(model)
        attributes_of(checkpoint).update(
            scale_basis=False, rbf_spherical={"name": "gaussian"}
        )
        assert_same_weights(load(checkpoint), model)


def test_scale_factors_of_another_model_in_the_state_are_refused(load, model):
    checkpoint = released(model)
    checkpoint["state_dict"]["basis.scale_rbf.scale_factor"] = torch.tensor(2.0)
    with pytest.raises(CheckpointError, match=r"unknown 1 entries \(basis\.scale_rbf"):
        load(checkpoint)
