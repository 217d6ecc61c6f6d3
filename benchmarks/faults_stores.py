"""Small real stores for the fault tests: teachers, data, specs and what is in a folder.

Everything is drawn from fixed seeds. Stores record the path they are built at, so two
of them have the same bytes only when they were built at the same place.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.models.checkpoint import save_model
from pipeline.models.normalizer import NUM_REFERENCES, Normalizer
from pipeline.models.zoo import build_model
from pipeline.spec.cache_spec import CacheSpec, resolve

FLOAT32 = {"dtype": "float32"}
Q8 = {"profile": "q8"}
COMPACT = {"profile": "compact"}
# Of every split: samples and seed. Blocks have 1 024 rows, so that is 3, 2 and 1.
SPLITS = {"train": (90, 1), "val": (50, 2), "extra": (20, 3)}
_PAINN = {
    "hidden_channels": 8,
    "num_layers": 1,
    "num_rbf": 4,
    "cutoff": 4.0,
    "max_neighbors": 12,
}
_GEMNET = {
    "num_spherical": 3,
    "num_radial": 4,
    "num_blocks": 1,
    "emb_size_atom": 6,
    "emb_size_edge": 6,
    "emb_size_trip_in": 4,
    "emb_size_trip_out": 4,
    "emb_size_quad_in": 4,
    "emb_size_quad_out": 4,
    "emb_size_aint_in": 4,
    "emb_size_aint_out": 4,
    "emb_size_rbf": 4,
    "emb_size_cbf": 4,
    "emb_size_sbf": 4,
    "num_before_skip": 1,
    "num_after_skip": 1,
    "num_atom": 1,
    "num_output_afteratom": 1,
    "num_global_out_layers": 1,
    "cutoff": 4.0,
    "cutoff_qint": 3.0,
    "max_neighbors": 6,
    "max_neighbors_qint": 3,
    "direct_forces": True,
    "quad_interaction": False,
    "atom_edge_interaction": False,
    "edge_atom_interaction": False,
    "atom_interaction": False,
}
_MODELS = {"painn": _PAINN, "gemnet_oc": _GEMNET}


def make_materials(folder: Path) -> None:
    """Two untrained teachers and the files of all splits, in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    references = [0.0] * NUM_REFERENCES
    normalizer = Normalizer(-2.5, 3.0, 1.7, tuple(references))
    for name, options in _MODELS.items():
        torch.manual_seed(3)
        model = build_model(name, options)
        save_model(folder / f"{name}.safetensors", name, model, normalizer, {})
    for name, (count, seed) in SPLITS.items():
        (folder / f"{name}.extxyz").write_text(_frames(name, count, seed))


def _frames(name: str, count: int, seed: int) -> str:
    """Bent chains of 10 to 50 atoms as extended XYZ, with energies and forces."""
    rng = np.random.default_rng(seed)
    lines = []
    for number in range(count):
        n_atoms = int(rng.integers(10, 51))
        positions = np.cumsum(rng.uniform(0.5, 1.1, (n_atoms, 3)), axis=0)
        forces = rng.standard_normal((n_atoms, 3))
        symbols = rng.choice(["H", "C", "O"], n_atoms)
        lines.append(f"{n_atoms}")
        lines.append(
            'Properties=species:S:1:pos:R:3:forces:R:3 pbc="F F F" '
            f"energy={rng.normal(-3.0 * n_atoms, 1.0):.6f} sample_id={name}{number}"
        )
        lines += [
            symbol + "".join(f" {x:.6f}" for x in (*position, *force))
            for symbol, position, force in zip(symbols, positions, forces, strict=True)
        ]
    return "\n".join(lines) + "\n"


def spec_of(
    materials: Path,
    store: Path,
    features: Mapping[str, Mapping[str, Any]],
    splits: tuple[str, ...] = ("train", "val"),
    teacher: str = "painn",
) -> CacheSpec:
    """Spec of a store at ``store``, with absolute paths."""
    document = {
        "teacher": {
            "model": teacher,
            "checkpoint": str(materials / f"{teacher}.safetensors"),
        },
        "splits": {
            name: {"format": "extxyz", "path": str(materials / f"{name}.extxyz")}
            for name in splits
        },
        "features": {name: dict(part) for name, part in features.items()},
        "store": {"path": str(store), "rows_per_block": 1024},
    }
    return resolve(CacheSpec.model_validate(document), materials)


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file below ``folder`` with its bytes, and every folder; hidden ones too."""
    return {
        str(entry.relative_to(folder)): entry.read_bytes() if entry.is_file() else None
        for entry in sorted(folder.rglob("*"))
    }


def differing(left: Mapping[str, Any], right: Mapping[str, Any]) -> list[str]:
    """Names of the files that only one of two folders has, or that differ."""
    return sorted(n for n in left | right if left.get(n, 0) != right.get(n, 0))
