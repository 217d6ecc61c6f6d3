import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.graphs.batch import collate
from pipeline.graphs.neighbors import NeighborSpec, neighbor_edges
from pipeline.models.zoo import MODELS, build_model
from pipeline.structure import Structure

_GEMNET = {
    "num_spherical": 3,
    "num_radial": 8,
    "num_blocks": 2,
    "emb_size_atom": 10,
    "emb_size_edge": 12,
    "emb_size_trip_in": 6,
    "emb_size_trip_out": 7,
    "emb_size_quad_in": 5,
    "emb_size_quad_out": 4,
    "emb_size_aint_in": 8,
    "emb_size_aint_out": 9,
    "emb_size_rbf": 3,
    "emb_size_cbf": 5,
    "emb_size_sbf": 2,
    "num_before_skip": 1,
    "num_after_skip": 1,
    "num_atom": 1,
    "num_output_afteratom": 1,
    "num_atom_emb_layers": 1,
    "num_global_out_layers": 1,
    "cutoff": 4.0,
}
# The middle edges of quadruplets are shorter than any cell, so that no path through
# the images of one atom is straight: its dihedral angle would be rounding noise.
_ALL_INTERACTIONS = {
    "quad_interaction": True,
    "atom_edge_interaction": True,
    "edge_atom_interaction": True,
    "atom_interaction": True,
    "cutoff_qint": 3.0,
    "cutoff_aeaint": 3.5,
    "cutoff_aint": 5.0,
    "max_neighbors_aint": 1000,
    "qint_tags": [1, 2],
}

# Small sizes of each variant; the limit does not bind in the structures below.
VARIANTS = {
    "gemnet_oc": (
        "gemnet_oc",
        {**_GEMNET, **_ALL_INTERACTIONS, "direct_forces": True},
    ),
    "gemnet_oc-gradient": (
        "gemnet_oc",
        {**_GEMNET, **_ALL_INTERACTIONS, "num_blocks": 1, "cutoff_aint": 4.5},
    ),
    "gemnet_oc-triplets": ("gemnet_oc", {**_GEMNET, "direct_forces": True}),
    "painn": (
        "painn",
        {"hidden_channels": 16, "num_layers": 3, "num_rbf": 12, "cutoff": 4.0},
    ),
    "painn-gradient": (
        "painn",
        {
            "hidden_channels": 16,
            "num_layers": 2,
            "num_rbf": 12,
            "cutoff": 4.0,
            "direct_forces": False,
        },
    ),
    "painn-smooth": (
        "painn",
        {
            "hidden_channels": 14,
            "num_layers": 2,
            "num_rbf": 11,
            "cutoff": 4.0,
            "direct_forces": False,
            "smooth": True,
        },
    ),
    "schnet": (
        "schnet",
        {
            "hidden_channels": 16,
            "num_filters": 12,
            "num_interactions": 2,
            "num_gaussians": 10,
            "cutoff": 4.0,
        },
    ),
}


DIRECT = ("gemnet_oc", "gemnet_oc-triplets", "painn")


def name_of(model):
    """Name under which a model is built."""
    return next(n for n, kind in MODELS.items() if type(model) is kind.network)


def structure_of(positions, numbers, cell=None, pbc=(False, False, False), tags=(2,)):
    n = len(numbers)
    return Structure(
        np.asarray(numbers, np.uint8),
        np.asarray(positions, float).reshape(n, 3),
        np.zeros((3, 3)) if cell is None else np.asarray(cell, float),
        np.asarray(pbc, bool),
        np.resize(np.array(tags, np.int8), n),
        np.zeros(n, bool),
    )


@pytest.fixture
def molecules():
    """A molecule, a slab-like cell and a bulk cell smaller than the cutoff."""
    rng = np.random.default_rng(5)
    grid = np.array([[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)])
    molecule = 1.5 * grid[:6] + rng.uniform(-0.2, 0.2, (6, 3))
    slab = 2.2 * grid[:5] + rng.uniform(-0.2, 0.2, (5, 3))
    cell = [[4.4, 0, 0], [0.7, 4.5, 0], [0, 0, 30]]
    bulk = [[0.1, 0, 0], [1.6, 1.7, 1.5]]
    return [
        structure_of(molecule, [6, 1, 8, 1, 7, 6]),
        structure_of(
            slab, [29, 29, 29, 6, 8], cell, [True, True, False], [0, 0, 1, 2, 2]
        ),
        structure_of(bulk, [55, 17], 3.2 * np.eye(3) + 0.1, [True] * 3, [1]),
    ]


@pytest.fixture
def atom():
    """One atom without neighbours."""
    return structure_of([[0.3, 0.2, 0.1]], [8])


@pytest.fixture
def batch_of():
    """Batch of structures with edges of a rule, in double precision unless told."""

    def make(structures: Sequence[Structure], rule: NeighborSpec, dtype=torch.float64):
        return collate(structures, [neighbor_edges(s, rule) for s in structures], dtype)

    return make


@pytest.fixture
def make_model():
    """Model of a variant in double precision, the same for every call.

    Biases and scale factors are drawn too: at their initial values they hide mistakes.
    """

    def make(variant: str):
        torch.manual_seed(3)
        name, hyperparameters = VARIANTS[variant]
        model = build_model(name, hyperparameters).double()
        with torch.no_grad():
            for key, value in model.named_parameters():
                if value.ndim <= 1:
                    value.add_(0.3 * torch.randn_like(value))
                if key.endswith("scale_factor"):
                    value.abs_()
        return model.eval()

    return make


@pytest.fixture(params=list(VARIANTS))
def variant(request):
    return request.param


@pytest.fixture(scope="session")
def parity_folder():
    """Folder of the reference outputs; tests that need it are skipped without."""
    beside = Path(__file__).resolve().parents[3] / "shared" / "parity"
    folder = Path(os.environ.get("KD_PARITY", beside))
    if not (folder / "painn.io.npz").is_file():
        pytest.skip("needs the reference outputs; set KD_PARITY to their folder")
    return folder
