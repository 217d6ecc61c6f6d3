"""Edge features from the teacher into the store and into distillation."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.build.build import make_build_plan
from pipeline.build.plan import plan_split
from pipeline.build.scan import scan_dataset
from pipeline.cli.info import render_description
from pipeline.datasets import Dataset, open_dataset
from pipeline.errors import DataError
from pipeline.graphs.neighbors import neighbor_edges
from pipeline.models.checkpoint import save_model
from pipeline.models.zoo import build_model
from pipeline.spec.cache_spec import CacheSpec, load_spec
from pipeline.store.describe import describe_store
from pipeline.store.reader import FeatureStore
from pipeline.store.verify import verify_store
from pipeline.teachers.runner import TeacherRunner
from tests.stores import build, spec_document, teacher_normalizer, write_spec

TINY_GEMNET: dict[str, Any] = {
    "num_spherical": 3,
    "num_radial": 8,
    "num_blocks": 1,
    **dict.fromkeys(
        [
            *(f"emb_size_{kind}" for kind in ("atom", "edge")),
            *(
                f"emb_size_{k}_{w}"
                for k in ("trip", "quad", "aint")
                for w in ("in", "out")
            ),
            *(f"emb_size_{kind}" for kind in ("rbf", "cbf", "sbf")),
        ],
        8,
    ),
    "num_before_skip": 1,
    "num_after_skip": 1,
    "num_atom": 1,
    "num_output_afteratom": 1,
    "cutoff": 4.0,
    "max_neighbors": 8,
    "direct_forces": True,
    "use_pbc": False,
}
WIDTH = 8
N_TRAIN, N_VAL = 20, 4


@pytest.fixture(scope="module")
def gemnet_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained GemNet-OC with all of its edge states."""
    torch.manual_seed(4)
    model = build_model("gemnet_oc", TINY_GEMNET)
    path = tmp_path_factory.mktemp("gemnet") / "teacher.safetensors"
    save_model(path, "gemnet_oc", model, teacher_normalizer(), {"made": "for tests"})
    return path


def _spec(folder: Path, data: dict[str, Path], teacher: Path) -> CacheSpec:
    splits: dict[str, Any] = {
        "train": {"format": "extxyz", "path": str(data["train"]), "limit": N_TRAIN},
        "val": {
            "format": "extxyz",
            "path": str(data["val"]),
            "limit": N_VAL,
            "features": False,
        },
    }
    features = {"edge_features": {"dtype": "float32"}, "node_features": None}
    document = spec_document(splits, folder / "s.zarr", teacher, features)
    document["teacher"]["model"] = "gemnet_oc"
    return load_spec(write_spec(folder / "s.yaml", document))


@pytest.fixture(scope="module")
def spec(
    tmp_path_factory: pytest.TempPathFactory,
    datasets: dict[str, Path],
    gemnet_file: Path,
) -> CacheSpec:
    return _spec(tmp_path_factory.mktemp("spec"), datasets, gemnet_file)


@pytest.fixture(scope="module")
def train(datasets: dict[str, Path]) -> Dataset:
    return open_dataset("extxyz", str(datasets["train"]), limit=N_TRAIN)


def test_edge_arrays_are_planned_and_their_size_is_told(
    spec: CacheSpec, train: Dataset, caplog: pytest.LogCaptureFixture
) -> None:
    assert spec.teacher is not None
    teacher = TeacherRunner.load(spec.teacher)
    rule = teacher.potential.loaded.model.graph_rule
    scan = scan_dataset(train, "none", lambda s: len(neighbor_edges(s, rule)))
    assert scan.n_edges is not None
    with caplog.at_level(logging.WARNING):
        plan = plan_split(spec, "train", train, scan, teacher)
    edges = {a.path: (a.shape, a.dtype) for a in plan.arrays if a.level == "edge"}
    assert edges == {
        "edges/edge_features": ((WIDTH,), "float32"),
        "edges/edge_index": ((2,), "uint16"),
        "edges/cell_offsets": ((3,), "int8"),
    }
    assert plan.blocks.n_blocks == 1
    total = int(scan.n_edges.sum())
    rows = -(-total // 1024) * 1024
    size = rows * (4 * WIDTH + 2 * 2 + 3) / 1e9
    assert f"splits.train: edge arrays will take {size:.3g} GB, " in caplog.text
    bare = plan_split(spec, "val", train, scan_dataset(train, "none"), teacher)
    assert "edge" not in {a.level for a in bare.arrays}
    assert bare.blocks.edges is None


@pytest.fixture(scope="module")
def store(spec: CacheSpec) -> FeatureStore:
    return build(Path(spec.store.path).with_name("s.yaml"))


def test_stored_edges_are_the_teachers(
    spec: CacheSpec, store: FeatureStore, train: Dataset
) -> None:
    assert verify_store(store.path) == []
    assert spec.teacher is not None
    teacher = TeacherRunner.load(spec.teacher)
    split = store.splits["train"]
    assert split.n_edges.sum() > 200
    for index in range(N_TRAIN):
        sample = train[index]
        position = split.position(sample.sample_id)
        names = ("edge_index", "cell_offsets", "edge_features")
        rows = split.read([position], [f"edges/{name}" for name in names])
        graph = neighbor_edges(
            sample.structure, teacher.potential.loaded.model.graph_rule
        )
        assert teacher.count_edges(sample.structure) == len(graph)
        assert rows["edges/edge_index"].tolist() == graph.edge_index.T.tolist()
        assert rows["edges/cell_offsets"].tolist() == graph.cell_offsets.tolist()
        alone = teacher.predict([sample], ("edge_features",))["edge_features"]
        scale = np.abs(alone).max()
        assert scale > 0
        found = rows["edges/edge_features"]
        np.testing.assert_allclose(found, alone, atol=1e-4 * scale, rtol=0)


def test_splits_without_features_have_no_edges(store: FeatureStore) -> None:
    assert not [p for p in store.splits["val"].arrays if p.startswith("edges/")]
    description = describe_store(store.path)
    edges = int(store.splits["train"].n_edges.sum())
    assert description["splits"]["train"]["edges"] == edges
    assert "edges" not in description["splits"]["val"]
    field = description["splits"]["train"]["fields"]["edges/edge_features"]
    assert field["shape"] == ["E", WIDTH]
    assert field["bytes_per_sample"] == 4 * WIDTH * edges / N_TRAIN
    text = render_description(description)
    assert f"split train: {N_TRAIN} samples, " in text
    assert f" atoms, {edges} edges, 1 of 1 blocks" in text
    assert "(E, 8)" in text


def test_continuing_counts_no_edges_again(
    spec: CacheSpec, store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: TeacherRunner, structure: Any) -> int:
        raise AssertionError("counted")

    monkeypatch.setattr(TeacherRunner, "count_edges", fail)
    assert make_build_plan(spec).attributes["fingerprint"] == store.fingerprint


def _run(store: FeatureStore, folder: Path, student: str, **sizes: Any) -> Any:
    from kd_train.config.train_config import TrainConfig
    from kd_train.trainer.trainer import Trainer

    document = {
        "student": {"preset": student, "hyperparameters": sizes},
        "strategy": "e2e",
        "steps": 3,
        "batch_size": 8,
        "eval_every": 3,
    }
    config = TrainConfig.model_validate(document)
    return Trainer(config, store, folder, torch.device("cpu"))


@pytest.mark.parametrize(
    ("student", "sizes"),
    [
        ("painn-small-demo", {"hidden_channels": 8, "num_layers": 2, "num_rbf": 8}),
        ("gemnet-oc-demo", TINY_GEMNET),
    ],
)
def test_e2e_trains_on_stored_edges(
    student: str, sizes: dict[str, Any], store: FeatureStore, tmp_path: Path
) -> None:
    run = _run(store, tmp_path / "run", student, **sizes)
    losses = run.losses(run.train_samples.batch(np.arange(6)))
    assert losses["e2e"].item() > 0
    run.train(resume=False)
    assert (tmp_path / "run").is_dir()


def test_a_student_with_edge_states_needs_the_teachers_graph(
    store: FeatureStore, tmp_path: Path
) -> None:
    sizes = TINY_GEMNET | {"cutoff": 3.0}
    run = _run(store, tmp_path / "run", "gemnet-oc-demo", **sizes)
    with pytest.raises(DataError, match=r"'gemnet-oc-demo' .* sample '.*' differ; set"):
        run.train(resume=False)
