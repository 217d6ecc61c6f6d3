"""Writes what the models of fairchem-core 1.x compute, as small files for our tests.

    PYTHON make_reference.py [FOLDER]

PYTHON is an interpreter with fairchem-core 1.10; the script imports nothing of this
project. Each model gets random weights, then predicts a few small structures in double
precision. FOLDER (tests/fixtures if unsaid) gets one ``NAME.npz`` per model: ``meta``
is JSON text with the model's name, attributes and second names of weights, ``in/*``
are the structures, ``state/*`` the weights, ``graph/*`` the edges of GemNet-OC in the
order of its edge features (``cell_offset`` is minus ours), all other arrays outputs.
"""

import importlib
import itertools
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch_geometric.data import Batch, Data

_GEMNET = {
    "rbf": {"name": "gaussian"},
    "envelope": {"name": "polynomial", "exponent": 5},
    "cbf": {"name": "spherical_harmonics"},
    "sbf": {"name": "legendre_outer"},
    "quad_interaction": True,
    "atom_edge_interaction": True,
    "edge_atom_interaction": True,
    "atom_interaction": True,
    "num_elements": 30,
}
# Every pair of sizes is distinct, so that nothing fits where it does not belong.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemnet_oc": (
        "gemnet_oc",
        {
            **_GEMNET,
            "direct_forces": True,
            "num_spherical": 4,
            "num_radial": 12,
            "num_blocks": 2,
            "emb_size_atom": 11,
            "emb_size_edge": 15,
            "emb_size_trip_in": 6,
            "emb_size_trip_out": 7,
            "emb_size_quad_in": 3,
            "emb_size_quad_out": 8,
            "emb_size_aint_in": 9,
            "emb_size_aint_out": 10,
            "emb_size_rbf": 5,
            "emb_size_cbf": 13,
            "emb_size_sbf": 2,
            "num_before_skip": 1,
            "num_after_skip": 2,
            "num_concat": 1,
            "num_atom": 2,
            "num_output_afteratom": 1,
            "num_atom_emb_layers": 1,
            "num_global_out_layers": 1,
            "cutoff": 5.0,
            "cutoff_qint": 5.0,
            "cutoff_aeaint": 5.0,
            "cutoff_aint": 5.0,
            "max_neighbors": 12,
            "max_neighbors_qint": 4,
            "max_neighbors_aeaint": 7,
            "max_neighbors_aint": 1000,
            "qint_tags": [1, 2],
        },
    ),
    "gemnet_oc_gradient": (
        "gemnet_oc",
        {
            **_GEMNET,
            "direct_forces": False,
            "num_spherical": 3,
            "num_radial": 10,
            "num_blocks": 1,
            "emb_size_atom": 12,
            "emb_size_edge": 12,
            "emb_size_trip_in": 5,
            "emb_size_trip_out": 6,
            "emb_size_quad_in": 7,
            "emb_size_quad_out": 4,
            "emb_size_aint_in": 8,
            "emb_size_aint_out": 5,
            "emb_size_rbf": 9,
            "emb_size_cbf": 4,
            "emb_size_sbf": 6,
            "num_before_skip": 0,
            "num_after_skip": 1,
            "num_concat": 2,
            "num_atom": 1,
            "num_output_afteratom": 0,
            "num_atom_emb_layers": 0,
            "num_global_out_layers": 2,
            "cutoff": 4.5,
            "cutoff_qint": 3.5,
            "cutoff_aeaint": 4.0,
            "cutoff_aint": 6.0,
            "max_neighbors": 9,
            "max_neighbors_qint": 3,
            "max_neighbors_aeaint": 5,
            "max_neighbors_aint": 20,
            "qint_tags": [1, 2],
        },
    ),
    "painn": (
        "painn",
        {
            "hidden_channels": 18,
            "num_layers": 2,
            "num_rbf": 13,
            "cutoff": 5.0,
            "max_neighbors": 12,
            "num_elements": 30,
        },
    ),
    "schnet": (
        "schnet",
        {
            "hidden_channels": 18,
            "num_filters": 14,
            "num_interactions": 2,
            "num_gaussians": 11,
            "cutoff": 4.5,
            "readout": "sum",
        },
    ),
}
CLASSES = {
    "gemnet_oc": ("fairchem.core.models.gemnet_oc.gemnet_oc", "GemNetOC"),
    "painn": ("fairchem.core.models.painn.painn", "PaiNN"),
    "schnet": ("fairchem.core.models.schnet", "SchNetWrap"),
}
# Nothing may be closer than this to a cutoff or to the choice at a limit (Å).
MARGIN = 2e-4

Arrays = dict[str, npt.NDArray[Any]]


def structures() -> list[Arrays]:
    """A molecule, a slab with an adsorbate and a strained cell of two atoms."""
    rng = np.random.default_rng(20)
    methanol = [
        [0.00, 0.00, 0.00],  # C
        [1.42, 0.05, 0.00],  # O
        [1.75, -0.85, 0.20],
        [-0.37, 1.02, 0.10],
        [-0.39, -0.50, 0.91],
        [-0.36, -0.53, -0.88],
    ]
    side, layer = 2.55, 2.08
    rows = itertools.product(range(2), range(2), range(2))
    slab = [
        [side * (i + j / 2) + k * side / 2, side * (0.866 * j + 0.289 * k), layer * k]
        for k, j, i in rows
    ]
    top = [1.3, 0.8, 2 * layer - 0.2]
    slab += [top, [top[0] + 0.2, top[1] + 0.1, top[2] + 1.15]]
    cell = [[2 * side, 0, 0], [side, 2 * 0.866 * side, 0], [0, 0, 18.0]]
    strained = [[3.3, 0.1, 0.0], [0.0, 3.5, 0.2], [0.15, 0.0, 3.7]]
    return [
        _structure(rng, [6, 8, 1, 1, 1, 1], methanol, 18 * np.eye(3), (0, 0, 0), [2]),
        _structure(rng, [29] * 8 + [6, 8], slab, cell, (1, 1, 0), "0000111122"),
        _structure(rng, [11, 17], [[0, 0, 0], [1.6, 1.5, 1.9]], strained, (1, 1, 1)),
    ]


def _structure(
    rng: np.random.Generator,
    numbers: list[int],
    positions: Any,
    cell: Any,
    pbc: tuple[int, int, int],
    tags: Any = (0, 1),
) -> Arrays:
    """One structure, its positions shaken by 0.05 Å."""
    positions = np.asarray(positions, float)
    return {
        "atomic_numbers": np.array(numbers),
        "pos": positions + rng.normal(scale=0.05, size=positions.shape),
        "cell": np.asarray(cell, float),
        "pbc": np.array(pbc, bool),
        "tags": np.resize([int(tag) for tag in tags], len(numbers)),
    }


def check_choices(structure: Arrays, attributes: dict[str, Any]) -> None:
    """Stop if the neighbours of ``structure`` depend on the last digits."""
    steps = [range(-4 * p, 4 * p + 1) for p in structure["pbc"]]
    shifts = np.array(list(itertools.product(*steps))) @ structure["cell"]
    sources = (structure["pos"][:, None] + shifts).reshape(-1, 3)
    cutoffs = {k: v for k, v in attributes.items() if k.startswith("cutoff")}
    for position in structure["pos"]:
        distance = np.sort(np.linalg.norm(sources - position, axis=1))[1:]
        for key, cutoff in cutoffs.items():
            within = distance[distance <= cutoff]
            limit = attributes.get(key.replace("cutoff", "max_neighbors"), 50)
            gaps = [np.abs(distance - cutoff).min()]
            if len(within) > limit:
                gaps.append(within[limit] - within[limit - 1])
            if min(gaps) < MARGIN:
                sys.exit(f"{key} = {cutoff} Å and limit {limit} leave a choice")


def randomised(name: str, attributes: dict[str, Any]) -> nn.Module:
    """The original with random weights, biases and scale factors, in single."""
    module, kind = CLASSES[name]
    torch.manual_seed(7)
    model = getattr(importlib.import_module(module), kind)(**attributes, otf_graph=True)
    with torch.no_grad():
        for key, value in model.named_parameters():
            if key.endswith("scale_factor"):
                value.copy_(0.6 + torch.rand(()))
            elif value.ndim == 1:
                value.normal_(std=0.3)
            # Fewer digits make smaller files.
            value.copy_(value.to(torch.bfloat16))
    return model.eval()


def predicted(
    model: nn.Module, found: dict[str, Tensor], structure: Arrays
) -> dict[str, Tensor]:
    """All outputs of one structure, with what the watched model leaves in ``found``."""
    data = {k: torch.from_numpy(structure[k]) for k in ("atomic_numbers", "pos")}
    tags, cell, pbc = (torch.from_numpy(structure[k]) for k in ("tags", "cell", "pbc"))
    sample = Data(
        **data, tags=tags, cell=cell[None], pbc=pbc[None], natoms=len(data["pos"])
    )
    # The code asks for single precision here and there; all must stay in double.
    with (
        patch.object(torch, "float", torch.float64),
        patch.object(torch.Tensor, "float", torch.Tensor.double),
    ):
        output = model(Batch.from_data_list([sample]))
    found["energy"] = output["energy"].flatten()
    found["forces"] = output["forces"]
    return {key: value.detach().clone() for key, value in found.items()}


def watched(model: nn.Module) -> dict[str, Tensor]:
    """Where every pass will leave its intermediate values, by their names in code."""
    found: dict[str, Tensor] = {}

    def keep_output(key: str) -> Any:
        return lambda _, inputs, output: found.update({key: output})

    def keep_inputs(*keys: str) -> Any:
        return lambda _, inputs: found.update(zip(keys, inputs, strict=True))

    if hasattr(model, "int_blocks"):
        model.out_energy.register_forward_hook(keep_output("energy_atom"))
        model.out_mlp_E.register_forward_hook(keep_output("x_E"))
        if model.direct_forces:
            model.out_mlp_F.register_forward_hook(keep_output("x_F"))
        make = type(model).get_graphs_and_indices

        def make_and_keep(data: Any) -> Any:
            graphs = make(model, data)
            found["graph/edge_index"] = graphs[0]["edge_index"]
            found["graph/cell_offset"] = graphs[0]["cell_offset"]
            return graphs

        model.get_graphs_and_indices = make_and_keep
    elif hasattr(model, "update_layers"):
        model.out_energy.register_forward_hook(keep_output("energy_atom"))
        model.out_forces.register_forward_pre_hook(keep_inputs("x", "vec"))
    else:
        model.lin1.register_forward_pre_hook(keep_inputs("h"))
        model.lin2.register_forward_hook(keep_output("energy_atom"))
    return found


def reference(name: str, attributes: dict[str, Any]) -> Arrays:
    """Content of one file."""
    torch.set_default_dtype(torch.float32)
    model = randomised(name, attributes)
    names: dict[int, str] = {}
    aliases = {}
    for key, value in model.state_dict().items():
        first = names.setdefault(value.data_ptr(), key)
        if first != key:
            aliases[key] = first
    state = {k: v for k, v in model.state_dict().items() if k not in aliases}
    arrays = {f"state/{k}": v.numpy().copy() for k, v in state.items()}
    samples = structures()
    for sample in samples:
        check_choices(sample, attributes)
    torch.set_default_dtype(torch.float64)
    found = watched(model.double())
    outputs = [predicted(model, found, sample) for sample in samples]
    natoms = np.array([len(sample["pos"]) for sample in samples])
    for key in outputs[0]:
        values = [output[key].numpy() for output in outputs]
        if key == "graph/edge_index":
            firsts = np.cumsum(natoms) - natoms
            values = [(v + first).T for v, first in zip(values, firsts, strict=True)]
        arrays[key] = np.concatenate(values)
    for key in samples[0]:
        joined = np.stack if key in ("cell", "pbc") else np.concatenate
        arrays[f"in/{key}"] = joined([sample[key] for sample in samples])
    meta = {
        "model": name,
        "attributes": attributes,
        "aliases": aliases,
        "fairchem-core": version("fairchem-core"),
        "torch": torch.__version__,
    }
    return {**arrays, "in/natoms": natoms, "meta": np.array(json.dumps(meta))}


def main() -> None:
    default = Path(__file__).parents[1] / "tests" / "fixtures"
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else default
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for file, (name, attributes) in MODELS.items():
        arrays = reference(name, attributes)
        np.savez_compressed(folder / f"{file}.npz", **arrays)
        size = (folder / f"{file}.npz").stat().st_size
        print(f"{file}: {size} bytes, energies {arrays['energy']}")


if __name__ == "__main__":
    main()
