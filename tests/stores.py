"""Specs, teachers and configurations for stores that are built in a second."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from kd_train.config.train_config import TrainConfig
from pipeline.build.build import build_store
from pipeline.models.checkpoint import save_model
from pipeline.models.normalizer import NUM_REFERENCES, Normalizer
from pipeline.models.zoo import build_model
from pipeline.spec.cache_spec import load_spec
from pipeline.store.reader import FeatureStore

TINY_PAINN = {
    "hidden_channels": 16,
    "num_layers": 2,
    "num_rbf": 8,
    "cutoff": 5.0,
    "max_neighbors": 20,
}
TINY_GEMNET = {
    "num_spherical": 4,
    "num_radial": 8,
    "num_blocks": 2,
    "emb_size_atom": 12,
    "emb_size_edge": 10,
    "emb_size_trip_in": 6,
    "emb_size_trip_out": 5,
    "emb_size_quad_in": 4,
    "emb_size_quad_out": 3,
    "emb_size_aint_in": 5,
    "emb_size_aint_out": 4,
    "emb_size_rbf": 4,
    "emb_size_cbf": 3,
    "emb_size_sbf": 5,
    "num_before_skip": 1,
    "num_after_skip": 1,
    "num_atom": 1,
    "num_output_afteratom": 1,
    "num_global_out_layers": 1,
    "cutoff": 5.0,
    "cutoff_qint": 3.0,
    "max_neighbors": 30,
    "max_neighbors_qint": 4,
    "direct_forces": True,
    "quad_interaction": True,
    "atom_edge_interaction": True,
    "edge_atom_interaction": True,
    "atom_interaction": True,
}
STUDENTS: dict[str, dict[str, Any]] = {
    "painn-small-demo": TINY_PAINN | {"hidden_channels": 8},
    "gemnet-oc-demo": TINY_GEMNET,
    "schnet-demo": {
        "hidden_channels": 8,
        "num_filters": 8,
        "num_interactions": 2,
        "num_gaussians": 8,
        "cutoff": 5.0,
        "max_neighbors": 20,
    },
}
FLOAT32 = {"dtype": "float32"}
FEATURES = {
    "node_features": FLOAT32,
    "vector_features": FLOAT32,
    "per_atom_energy": FLOAT32,
}


def teacher_normalizer() -> Normalizer:
    """Numbers near those of the collisions, all different, so that mix-ups show."""
    references = [0.0] * NUM_REFERENCES
    references[1], references[6], references[8] = -16.0, -58.0, -106.0
    return Normalizer(-2.5, 3.0, 1.7, tuple(references))


def save_teacher(path: Path, seed: int = 3, **changes: Any) -> Path:
    """An untrained PaiNN at ``path`` in the published format."""
    torch.manual_seed(seed)
    model = build_model("painn", TINY_PAINN | changes)
    save_model(path, "painn", model, teacher_normalizer(), {"made": "for tests"})
    return path


def save_gemnet(path: Path, seed: int = 5, **changes: Any) -> Path:
    """An untrained GemNet-OC at ``path`` whose scale factors are not one."""
    torch.manual_seed(seed)
    model = build_model("gemnet_oc", TINY_GEMNET | changes)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("scale_factor"):
                value.fill_(0.5 + float(torch.rand(())))
    save_model(path, "gemnet_oc", model, teacher_normalizer(), {"made": "for tests"})
    return path


def spec_document(
    splits: Mapping[str, Path | Mapping[str, Any]],
    store: Path,
    teacher: Path | None = None,
    features: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Plain spec; a split is a dataset's path or a whole section."""
    sections = {
        name: {"format": "extxyz", "path": str(part)}
        if isinstance(part, Path)
        else dict(part)
        for name, part in splits.items()
    }
    document: dict[str, Any] = {
        "splits": sections,
        "store": {"path": str(store), "rows_per_block": 1024},
    }
    if teacher is not None:
        document["teacher"] = {"model": "painn", "checkpoint": str(teacher)}
        document["features"] = dict(FEATURES if features is None else features)
    return document


def write_spec(path: Path, document: Mapping[str, Any]) -> Path:
    """``path`` with ``document`` as YAML."""
    path.write_text(yaml.safe_dump(dict(document)))
    return path


def build(spec: Path) -> FeatureStore:
    """The finished store of ``spec``, open."""
    chosen = load_spec(spec)
    assert build_store(chosen)
    return FeatureStore.open(chosen.store.path)


def train_config(student: str = "painn-small-demo", **changes: Any) -> TrainConfig:
    """Configuration of a run that takes a second; ``changes`` are top-level keys."""
    document = {
        "student": {"preset": student, "hyperparameters": STUDENTS[student]},
        "steps": 12,
        "batch_size": 16,
        "eval_every": 3,
        "schedule": {"kind": "cosine", "warmup_steps": 5},
        "ema_decay": 0.9,
    }
    return TrainConfig.model_validate(document | changes)
