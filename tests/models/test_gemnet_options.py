"""Hyperparameters of GemNet-OC: what is refused, and which graphs follow."""

import pytest
import torch

from pipeline.errors import SpecError
from pipeline.graphs.neighbors import ExtraGraph
from pipeline.models.zoo import build_model
from tests.models.conftest import VARIANTS

SMALL = VARIANTS["gemnet_oc-triplets"][1]
COUNTS = (
    *("num_before_skip", "num_after_skip", "num_concat", "num_atom"),
    *("num_output_afteratom", "num_atom_emb_layers", "num_global_out_layers"),
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rbf": {"name": "bernstein"}}, r"gemnet_oc\.rbf is 'bernstein'"),
        ({"cbf": {"name": "gaussian"}}, r"gemnet_oc\.cbf is 'gaussian'"),
        ({"sbf": {"name": "spherical_harmonics"}}, r"gemnet_oc\.sbf is 'spherical"),
        ({"sbf": {}}, r"gemnet_oc\.sbf is None; supported is legendre_outer"),
        ({"activation": "siqu"}, r"gemnet_oc\.activation is 'siqu'"),
        ({"envelope": {"name": "exponential"}}, "Envelope .* is not supported"),
        (
            {"envelope": {"name": "polynomial", "exponent": 0}},
            "Envelope .* is not supported",
        ),
        ({"num_radial": 1}, "at least 2 functions"),
        ({"num_before_skip": -1}, r"gemnet_oc\.num_before_skip is -1"),
        ({"num_atom": 1.5}, r"gemnet_oc\.num_atom is 1\.5"),
        ({"num_blocks": 0}, r"gemnet_oc\.num_blocks is 0"),
        ({"num_elements": 0}, r"gemnet_oc\.num_elements is 0"),
        ({"cutoff_aint": 0.0}, r"gemnet_oc\.cutoff_aint is 0\.0"),
        ({"cutoff_qint": "far"}, r"gemnet_oc\.cutoff_qint is 'far'"),
        ({"max_neighbors_qint": 2.5}, r"gemnet_oc\.max_neighbors_qint is 2\.5"),
        ({"qint_tags": "12"}, r"gemnet_oc\.qint_tags is '12'"),
        ({"qint_tags": [1, "2"]}, r"gemnet_oc\.qint_tags is"),
        ({"quad_interaction": 1}, r"gemnet_oc\.quad_interaction is 1"),
        ({"emb_size_trip": 8}, "nearest known one is 'emb_size_trip_"),
        (
            {"atom_interaction": True, "cutoff_aint": 3.0},
            r"gemnet_oc\.cutoff is 4\.0 Å, more than cutoff_aint = 3\.0 Å",
        ),
        (
            {
                "atom_interaction": True,
                "quad_interaction": True,
                "cutoff_aint": 5.0,
                "cutoff_qint": 5.5,
            },
            r"gemnet_oc\.cutoff_qint is 5\.5 Å, more than cutoff_aint",
        ),
        (
            {"quad_interaction": True, "cutoff_qint": 4.5},
            r"gemnet_oc\.cutoff_qint is 4\.5 Å, more than cutoff = 4\.0 Å",
        ),
    ],
)
def test_bad_choices_are_refused_with_their_key(change, message):
    with pytest.raises(SpecError, match=message):
        build_model("gemnet_oc", {**SMALL, **change})


def test_layer_counts_may_be_zero(molecules, batch_of):
    name, hyperparameters = VARIANTS["gemnet_oc"]
    model = build_model(name, {**hyperparameters, **dict.fromkeys(COUNTS, 0)}).double()
    output = model(batch_of(molecules, model.graph_rule))
    assert output.energy.isfinite().all()
    assert output.forces.abs().max() > 0
    assert not any("dense_mlp" in key for key in model.state_dict())


def rule_of(**change):
    return build_model("gemnet_oc", {**SMALL, **change}).graph_rule


def test_graphs_of_interactions_that_are_off_are_not_made():
    rule = rule_of(cutoff_qint=9.0, cutoff_aint=10.0, max_neighbors_aeaint=3)
    assert (rule.cutoff, rule.max_neighbors) == (4.0, 50)
    assert rule.symmetric
    assert rule.base is None
    assert rule.extra_graphs == ()


def test_side_graphs_follow_the_main_graph_where_nothing_is_said():
    switches = dict.fromkeys(
        ("quad_interaction", "edge_atom_interaction", "atom_interaction"), True
    )
    rule = rule_of(**switches, max_neighbors=7, cutoff_qint=None)
    assert rule.base == (4.0, 7)
    assert rule.extra_graphs == (
        ExtraGraph("ae", 4.0, 7),
        ExtraGraph("quad", 4.0, 7, (0, 1, 2)),
        ExtraGraph("aa", 4.0, 7),
    )


def test_the_base_graph_is_the_largest_of_all():
    sides = {"cutoff_aeaint": 6.0, "max_neighbors_aeaint": 60}
    rule = rule_of(**sides, atom_edge_interaction=True, cutoff_aint=9.0)
    # No pair interaction, so its own cutoff does not count.
    assert rule.base == (6.0, 60)
    assert [side.name for side in rule.extra_graphs] == ["ae"]
    rule = rule_of(**sides, atom_edge_interaction=True, atom_interaction=True)
    assert rule.base == (6.0, 60)
    assert rule.extra_graphs[-1] == ExtraGraph("aa", 6.0, 60)
    rule = rule_of(**sides, atom_interaction=True, max_neighbors_aint=1000)
    # No atom-edge interaction, so the keys of its graph do not count.
    assert rule.base == (4.0, 1000)


def test_without_a_limit_no_graph_has_any():
    switches = dict.fromkeys(
        ("quad_interaction", "edge_atom_interaction", "atom_interaction"), True
    )
    rule = rule_of(**switches, max_neighbors=None, cutoff_aint=9.0)
    assert (rule.max_neighbors, rule.base) == (None, (9.0, None))
    assert {graph.max_neighbors for graph in rule.extra_graphs} == {None}
    with pytest.raises(SpecError, match=r"max_neighbors_aint is 1000, but max_neigh"):
        rule_of(**switches, max_neighbors=None, max_neighbors_aint=1000)


def test_quadruplets_alone_are_cut_out_of_the_main_graph():
    rule = rule_of(quad_interaction=True, cutoff_qint=3.0, qint_tags=[2])
    assert rule.base is None
    assert rule.extra_graphs == (ExtraGraph("quad", 3.0, 50, (2,)),)
    rule = rule_of(enforce_max_neighbors_strictly=False, use_pbc=False)
    assert (rule.strict, rule.periodic) == (False, False)


def test_energy_only_models_keep_their_force_layers(molecules, batch_of) -> None:
    """Released files of such models hold them, and edges have features."""
    full = build_model("gemnet_oc", SMALL | {"direct_forces": True})
    without = build_model(
        "gemnet_oc", SMALL | {"direct_forces": True, "regress_forces": False}
    )
    without.load_state_dict(full.state_dict())
    batch = batch_of(molecules, full.graph_rule, torch.float32)
    expected, found = full(batch), without(batch)
    assert found.forces is None
    torch.testing.assert_close(found.energy, expected.energy)
    torch.testing.assert_close(found.edge_features, expected.edge_features)
