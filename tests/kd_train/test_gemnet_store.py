"""Students of a GemNet-OC, and GemNet-OC as a student."""

import re
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
from ase.build import fcc111

from kd_train.config.train_config import TrainConfig
from kd_train.trainer.setup import resolve_config
from kd_train.trainer.trainer import Trainer
from pipeline.errors import DataError
from pipeline.models.gemnet.fitting import Scale
from pipeline.models.zoo import PRESETS
from pipeline.spec.cache_spec import load_spec
from pipeline.store.reader import FeatureStore
from pipeline.structure import Sample
from pipeline.teachers.runner import TeacherRunner
from tests.kd_train.live import assert_trains_alike, samples_by_id
from tests.stores import (
    FLOAT32,
    TINY_GEMNET,
    build,
    save_gemnet,
    spec_document,
    train_config,
    write_spec,
)

FIELDS = (
    "node_features",
    "edge_to_node_features",
    "vector_features",
    "edge_features",
    "per_atom_energy",
)
CASES = [
    ("painn-small-demo", "e2n"),
    ("painn-small-demo", "e2e"),
    ("painn-small-demo", "n2n+v2v"),
    ("painn-small-demo", "e2n+v2v+vanilla2"),
    ("schnet-demo", "n2n+e2n"),
    ("gemnet-oc-demo", "none"),
    ("gemnet-oc-demo", "n2n+v2v"),
    ("gemnet-oc-demo", "e2n"),
    ("gemnet-oc-demo", "e2e"),
]
STEPS = 6


@pytest.fixture(scope="module")
def spec_path(
    tmp_path_factory: pytest.TempPathFactory, datasets: dict[str, Path]
) -> Path:
    folder = tmp_path_factory.mktemp("gemnet")
    teacher = save_gemnet(folder / "teacher.safetensors")
    split = {"format": "extxyz", "path": str(datasets["train"]), "limit": 60}
    features = dict.fromkeys(FIELDS, FLOAT32)
    document = spec_document(
        {"train": split, "val": datasets["val"]},
        folder / "s.zarr",
        teacher,
        features,
    )
    document["teacher"]["model"] = "gemnet_oc"
    return write_spec(folder / "s.yaml", document)


@pytest.fixture(scope="module")
def store(spec_path: Path) -> FeatureStore:
    return build(spec_path)


@pytest.fixture(scope="module")
def sources(datasets: dict[str, Path]) -> dict[str, Sample]:
    return samples_by_id(datasets["train"])


@pytest.mark.parametrize(("student", "strategy"), CASES)
def test_cached_and_live_teacher_train_alike(
    student: str,
    strategy: str,
    store: FeatureStore,
    spec_path: Path,
    sources: dict[str, Sample],
    tmp_path: Path,
) -> None:
    spec = load_spec(spec_path).teacher
    assert spec is not None
    teacher = TeacherRunner.load(spec)
    config = train_config(student, strategy=strategy, steps=STEPS)
    assert_trains_alike(config, store, teacher, sources, FIELDS, tmp_path, 2e-5)


def test_student_with_another_graph_cannot_match_edges(
    store: FeatureStore, tmp_path: Path
) -> None:
    config = train_config("gemnet-oc-demo", strategy="e2e")
    config.student.hyperparameters["cutoff"] = 4.0
    config.student.hyperparameters["cutoff_aint"] = 5.0
    run = Trainer(config, store, tmp_path / "run", torch.device("cpu"))
    with pytest.raises(DataError, match="edge by edge.*their graphs"):
        run.step(run.on_device(run.train_samples.batch(np.arange(8))))


def test_fresh_student_fits_its_scale_factors_alike_for_every_strategy(
    store: FeatureStore, tmp_path: Path
) -> None:
    def factors(strategy: str) -> list[float]:
        config = train_config("gemnet-oc-demo", strategy=strategy)
        run = Trainer(config, store, tmp_path / strategy, torch.device("cpu"))
        modules = run.learner.student.modules()
        return [float(m.scale_factor) for m in modules if isinstance(m, Scale)]

    plain = factors("none")
    assert plain == factors("e2n")
    per_block = 11
    assert len(plain) == TINY_GEMNET["num_blocks"] * (per_block + 2) + 2
    assert all(value > 0 for value in plain)
    assert len(set(plain)) > len(plain) // 2


def test_student_of_the_paper_is_taken_where_none_is_named(
    store: FeatureStore, labels_store: FeatureStore
) -> None:
    unnamed = TrainConfig()
    assert resolve_config(unnamed, store).student.preset == "painn-big"
    assert resolve_config(unnamed, labels_store).student.preset == "painn-small"
    named = train_config("schnet-demo")
    assert resolve_config(named, store).student == named.student


def test_periodic_structures_take_the_sizes_for_oc20(
    tmp_path: Path, labels_store: FeatureStore, caplog: pytest.LogCaptureFixture
) -> None:
    slab = fcc111("Cu", (2, 2, 2), vacuum=6.0)
    slab.pbc = True
    slab.info.clear()
    ase.io.write(tmp_path / "d.extxyz", [slab], format="extxyz")
    document = {
        "splits": {"train": {"format": "extxyz", "path": str(tmp_path / "d.extxyz")}},
        "store": {"path": str(tmp_path / "s.zarr")},
    }
    store = build(write_spec(tmp_path / "s.yaml", document))
    caplog.clear()  # planning warns that there are no labels
    assert resolve_config(TrainConfig(), store).student.preset == "painn-small-oc20"
    assert resolve_config(TrainConfig(), labels_store).student.preset == "painn-small"
    assert caplog.text == ""
    # The recipe goes by the student; that it is not of such data is told.
    for wrong, other, words in (
        ("schnet-oc20", labels_store, "recipe oc20, but .* 'train' are not periodic"),
        ("schnet", store, "recipe coll, but .* 'train' are periodic"),
    ):
        config = TrainConfig.model_validate({"student": {"preset": wrong}})
        resolve_config(config, other)
        assert re.search(words, caplog.text)
        caplog.clear()
        named = resolve_config(config, other).recipe
        caplog.clear()
        resolve_config(config.model_copy(update={"recipe": named}), other)
        assert caplog.text == ""


def test_sizes_of_the_paper_without_a_recipe_are_told(
    labels_store: FeatureStore, caplog: pytest.LogCaptureFixture
) -> None:
    told = {}
    for preset in PRESETS:
        caplog.clear()
        config = TrainConfig.model_validate({"student": {"preset": preset}})
        resolve_config(config, labels_store)
        told[preset] = f"no recipe contains the student {preset}" in caplog.text
    assert {preset for preset, is_told in told.items() if is_told} == {
        "gemnet-oc-small",
        "gemnet-oc-oc20",
        "gemnet-oc-small-oc20",
        "painn-md",
        "painn-small-md",
        "painn-small-demo-md",
        "schnet-md",
        "schnet-demo-md",
    }
