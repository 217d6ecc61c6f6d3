"""Training with samples that only the teacher labelled, or that lack forces."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from ase.data import chemical_symbols

from kd_train.sweep.cli import main as sweep_main
from kd_train.trainer.labels import has_labels
from kd_train.trainer.setup import store_normalizer
from kd_train.trainer.trainer import Trainer
from pipeline.build.label import label_splits
from pipeline.datasets import open_dataset
from pipeline.errors import SpecError
from pipeline.models.normalizer import Normalizer
from pipeline.spec.cache_spec import load_spec
from pipeline.store.reader import FeatureStore
from tests.commands import refusal, run_command
from tests.frames import collision_frames, frame, write_frames
from tests.kd_train.runs import make_run, metric_rows
from tests.stores import (
    build,
    spec_document,
    teacher_normalizer,
    train_config,
    write_spec,
)

RATTLE = {"copies": 2, "sigma": 0.05}


def _section(path: Path, **changes: Any) -> dict[str, Any]:
    return {"format": "extxyz", "path": str(path)} | changes


def _without_forces(path: Path, to: Path) -> Path:
    source = open_dataset("extxyz", str(path))
    frames = []
    for sample in map(source.__getitem__, range(len(source))):
        symbols = [chemical_symbols[z] for z in sample.structure.atomic_numbers]
        places = sample.structure.positions.tolist()
        name = f"{sample.sample_id}-energy"
        frames.append(frame(name, symbols, places, energy=sample.energy))
    return write_frames(to, frames)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, teacher_file: Path) -> FeatureStore:
    """Labelled samples, samples without labels, copies, and samples without forces."""
    folder = tmp_path_factory.mktemp("unlabelled")
    data = write_frames(folder / "d.extxyz", collision_frames(40))
    few = write_frames(folder / "few.extxyz", collision_frames(8, 40))
    splits = {
        "train": _section(data, limit=12),
        "bare": _section(data, offset=12, limit=20, labels="none"),
        "rattled": _section(data, limit=12, rattle=RATTLE),
        "energies": _section(_without_forces(few, folder / "energies.extxyz")),
        "val": _section(data, offset=32),
    }
    document = spec_document(splits, folder / "s.zarr", teacher_file)
    return build(write_spec(folder / "s.yaml", document))


def _run(store: FeatureStore, folder: Path, split: str, **changes: Any) -> Trainer:
    return make_run(store, folder, train_config(train_split=split, **changes))


def _gradients(run: Trainer, positions: list[int]) -> tuple[float, list[torch.Tensor]]:
    """Loss of a batch, and the gradient of every parameter."""
    run.modules.zero_grad()
    loss = run.losses(run.on_device(run.train_samples.batch(np.array(positions))))
    loss["loss"].backward()
    gradients = [
        torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for p in run.modules.parameters()
    ]
    return float(loss["loss"].detach()), gradients


def test_which_splits_have_labels(store: FeatureStore) -> None:
    assert {name: has_labels(split) for name, split in store.splits.items()} == {
        "train": True,
        "bare": False,
        "rattled": False,
        "energies": True,
        "val": True,
    }


def test_samples_without_labels_do_not_change_l0(
    store: FeatureStore, tmp_path: Path
) -> None:
    loss = {"pseudo_label_weight": 0}
    run = _run(store, tmp_path, "train+bare+rattled", loss=loss)
    alone = _gradients(run, [3, 7])
    mixed = _gradients(run, [20, 3, 40, 7, 31])
    assert mixed[0] == pytest.approx(alone[0], rel=1e-5)
    for first, second in zip(alone[1], mixed[1], strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)
    loss, gradients = _gradients(run, [20, 40])
    assert loss == 0
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize(
    ("split", "weight"),
    [("train", 0.0), ("train+bare", 1.0), ("rattled", 1.0), ("train+energies", 0.0)],
)
def test_splits_that_the_spec_leaves_to_the_teacher_get_its_labels(
    split: str, weight: float, store: FeatureStore, tmp_path: Path
) -> None:
    """Not samples whose labels are missing by accident; a number in the file wins."""
    run = _run(store, tmp_path / "a", split)
    assert run.config.loss.pseudo_label_weight == weight
    assert run.header()["config"]["loss"]["pseudo_label_weight"] == weight
    own = _run(store, tmp_path / "b", split, loss={"pseudo_label_weight": 0.25})
    assert own.config.loss.pseudo_label_weight == 0.25


def test_samples_without_forces_train_the_energy_only(
    store: FeatureStore, tmp_path: Path
) -> None:
    run = _run(store, tmp_path / "a", "energies+train")
    other = _run(store, tmp_path / "b", "energies+train", loss={"force_weight": 0})
    loss, gradients = _gradients(run, [0, 5])
    expected, without_forces = _gradients(other, [0, 5])
    assert loss == pytest.approx(expected, rel=1e-6)
    assert loss > 0
    for first, second in zip(gradients, without_forces, strict=True):
        torch.testing.assert_close(first, second)
    assert _gradients(run, [0, 12])[0] > _gradients(other, [0, 12])[0]


def test_features_of_samples_without_labels_are_learned(
    store: FeatureStore, tmp_path: Path
) -> None:
    run = _run(store, tmp_path, "train+rattled", strategy="n2n+v2v+vanilla2")
    loss, gradients = _gradients(run, [14, 20])
    assert np.isfinite(loss)
    assert loss > 0
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_trains_on_labelled_and_rattled_samples(
    weight: float, store: FeatureStore, tmp_path: Path
) -> None:
    """Batches are so small that some have no labelled sample."""
    run = _run(
        store,
        tmp_path,
        "train+bare+rattled",
        strategy="n2n+v2v",
        batch_size=2,
        loss={"pseudo_label_weight": weight},
    )
    assert run.learner.normalizer == teacher_normalizer()
    summary = run.train(resume=False)
    assert all(np.isfinite(value) for value in summary["metrics"].values())
    for row in metric_rows(tmp_path):
        assert all(np.isfinite(float(value)) for value in row.values() if value)


def test_labels_of_the_teacher_are_those_of_a_file_that_it_labelled(
    teacher_file: Path, tmp_path: Path
) -> None:
    """Two ways to one run: ``loss.pseudo_label_weight``, and ``kd-cache label``."""
    data = write_frames(tmp_path / "d.extxyz", collision_frames(24))
    rattled = _section(data, limit=8, rattle=RATTLE)
    val = _section(data, offset=16)

    def spec(name: str, train: dict[str, Any]) -> Path:
        splits = {"train": train, "val": val}
        document = spec_document(splits, tmp_path / f"{name}.zarr", teacher_file)
        return write_spec(tmp_path / f"{name}.yaml", document)

    completed = spec("completed", rattled)
    (file, _) = label_splits(load_spec(completed), tmp_path / "labels")
    stores = {
        "completed": build(completed),
        "read": build(spec("read", _section(file))),
    }
    ids = [store.splits["train"].sample_ids.tolist() for store in stores.values()]
    assert ids[0] == ids[1]
    assert any("~r1" in name for name in ids[0])
    rows = {}
    for name, store in stores.items():
        weight = {"pseudo_label_weight": 1.0} if name == "completed" else {}
        run = _run(store, tmp_path / name, "train", loss=weight)
        run.train(resume=False)
        rows[name] = metric_rows(tmp_path / name)
    assert len(rows["read"]) == 4
    for found, expected in zip(rows["completed"], rows["read"], strict=True):
        for key in ("train_loss", "val_loss", "val_forces_mae"):
            assert float(found[key]) == pytest.approx(float(expected[key]), rel=1e-3)


def test_units_are_those_of_the_first_split_that_has_labels(
    teacher_file: Path, tmp_path: Path
) -> None:
    """The labels are far from the teacher's energies, so that they decide."""
    texts = [t.replace("energy=-", "energy=-9") for t in collision_frames(8)]
    data = write_frames(tmp_path / "d.extxyz", texts)
    splits = {
        "bare": _section(data, limit=4, labels="none"),
        "train": _section(data, offset=4),
    }
    store = build(
        write_spec(
            tmp_path / "s.yaml",
            spec_document(splits, tmp_path / "s.zarr", teacher_file),
        )
    )
    expected = Normalizer.from_dict(store.attributes["label_statistics"]["train"])
    assert expected != teacher_normalizer()
    for choice in ("train", "bare+train", "train+bare"):
        assert store_normalizer(store, choice) == expected


def test_nothing_to_learn_from_is_refused_and_nothing_to_validate_against_told(
    store: FeatureStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(SpecError, match=r"'bare\+rattled'.*nothing to learn from"):
        _run(store, tmp_path, "bare+rattled", loss={"pseudo_label_weight": 0})
    _run(store, tmp_path, "bare+rattled", strategy="v2v+vanilla1")
    _run(
        store, tmp_path, "bare", loss={"pseudo_label_weight": 1.0}, val_split="energies"
    )
    assert "has no reference labels" not in caplog.text
    _run(store, tmp_path, "train", val_split="bare")
    _run(
        store,
        tmp_path,
        "train",
        val_split="bare",
        export_weights="last",
        monitor="efwt",
    )
    assert "val_split: 'bare' has no reference labels" in caplog.text


def test_a_sweep_with_nothing_to_learn_from_is_refused_before_it_starts(
    store: FeatureStore, tmp_path: Path
) -> None:
    document = {
        "store": str(store.path),
        "out": "out",
        "students": ["painn-small-demo"],
        "strategies": ["vanilla1"],
        "settings": {"train_split": "bare", "loss.pseudo_label_weight": 0},
    }
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(document))
    assert run_command(sweep_main, ["list", path]).exit_code == 0
    path.write_text(yaml.safe_dump(document | {"strategies": ["vanilla1", "none"]}))
    sentence = refusal(sweep_main, ["list", path])
    assert "run painn-small-demo-none-s0: train_split: 'bare' has no ref" in sentence


METRICS = ("loss", "energy_mae", "forces_mae", "forces_cos", "efwt")


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("split", ["bare", "energies", "val", "bare+val"])
def test_metrics_that_are_never_a_number_cannot_be_gone_by(
    metric: str, split: str, store: FeatureStore, tmp_path: Path
) -> None:
    """What is refused is what the validation gives as NaN."""

    def run(**changes: Any) -> Trainer:
        wish = {"monitor": metric} | changes
        return _run(store, tmp_path, "train", val_split=split, **wish)

    free = run(export_weights="last")
    result = free.validator(free.averaged_student)
    value = result.loss if metric == "loss" else result.metrics[metric]
    if np.isfinite(value):
        run(patience=2)
        run(export_weights="best")
        return
    message = rf"val_split: '{split}' has no labels for monitor={metric}, which "
    with pytest.raises(SpecError, match=message + "patience=2 needs"):
        run(patience=2)
    with pytest.raises(SpecError, match=message + "export_weights=best needs"):
        run(export_weights="best")
