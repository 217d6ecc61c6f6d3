"""A whole run: what it starts from, what it writes, and that it resumes bit for bit."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor
from torch_geometric.data import Data

from kd_train.config.train_config import TrainConfig
from kd_train.evaluation.metrics import MetricSums
from kd_train.loader.data import CachedSamples
from kd_train.trainer.setup import make_learner, store_normalizer, weights_digest
from pipeline.errors import (
    DamagedStoreError,
    DataError,
    PipelineError,
    SpecError,
)
from pipeline.models.checkpoint import load_checkpoint
from pipeline.models.normalizer import Normalizer
from pipeline.models.zoo import PRESETS, build_model
from pipeline.store.reader import FeatureStore
from tests.frames import collision_frames, frame, write_frames
from tests.kd_train.runs import distilling, make_run, metric_rows
from tests.stores import (
    STUDENTS,
    build,
    save_teacher,
    spec_document,
    teacher_normalizer,
    train_config,
    write_spec,
)


def _plain_student(config: TrainConfig) -> torch.nn.Module:
    name, hyperparameters = PRESETS[config.student.preset]
    return build_model(name, hyperparameters | config.student.hyperparameters)


@pytest.mark.parametrize("student", list(STUDENTS))
def test_baseline_and_distilled_students_start_alike(
    student: str, small_store: FeatureStore
) -> None:
    strategies = ["none", "n2n", "vanilla1", "n2n+vanilla2"]
    strategies += ["v2v", "v2v+n2n"] if student.startswith("painn") else []
    learners = [
        make_learner(train_config(student, strategy=s, seed=9), small_store)
        for s in strategies
    ]
    states = [learner.student.state_dict() for learner in learners]
    for state in states[1:]:
        assert all(torch.equal(state[key], states[0][key]) for key in states[0])
    assert len({learner.initial_digest for learner in learners}) == 1
    other = make_learner(train_config(student, seed=10), small_store)
    assert other.initial_digest != learners[0].initial_digest


def test_baseline_and_distilled_runs_see_the_same_first_loss(
    small_store: FeatureStore, tmp_path: Path
) -> None:
    runs = [
        make_run(small_store, tmp_path, train_config(strategy=strategy))
        for strategy in ("none", "n2n+v2v")
    ]
    positions = np.arange(8)
    first = [
        run.step(run.on_device(run.train_samples.batch(positions))) for run in runs
    ]
    assert first[0]["l0"].item() == first[1]["l0"].item()
    assert first[0]["loss"].item() == first[0]["l0"].item()
    expected = first[1]["l0"] + 100 * first[1]["n2n"] + 10000 * first[1]["v2v"]
    assert first[1]["loss"].item() == pytest.approx(expected.item(), rel=1e-6)
    # The distillation terms reach the student: the second step differs.
    second = [
        run.step(run.on_device(run.train_samples.batch(positions + 8))) for run in runs
    ]
    assert second[0]["l0"].item() != second[1]["l0"].item()


def test_weights_of_terms_come_from_the_configuration(
    small_store: FeatureStore, tmp_path: Path
) -> None:
    config = train_config(
        strategy="n2n+vanilla2",
        distill={"n2n": 0.5, "vanilla2": 2.0},
        loss={"energy_weight": 0.0, "force_weight": 0.0},
    )
    run = make_run(small_store, tmp_path, config)
    losses = run.losses(run.on_device(run.train_samples.batch(np.arange(4))))
    assert losses["l0"].item() == 0
    expected = 0.5 * losses["n2n"].item() + 2.0 * losses["vanilla2"].item()
    assert losses["loss"].item() == pytest.approx(expected)


def test_adapters_get_gradients_are_trained_and_averaged(
    small_store: FeatureStore, tmp_path: Path
) -> None:
    run = make_run(small_store, tmp_path)
    adapters = run.learner.adapters
    before = {name: p.detach().clone() for name, p in adapters.named_parameters()}
    assert set(before) == {"n2n.weight", "n2n.bias", "v2v.weight"}
    for number in range(3):
        run.step(run.on_device(run.train_samples.batch(np.arange(8) + number)))
    for name, parameter in adapters.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0
        assert not torch.equal(parameter, before[name])
    averaged = dict(run.average.module["adapters"].named_parameters())
    for name, parameter in adapters.named_parameters():
        assert not torch.equal(averaged[name], before[name])
        assert not torch.equal(averaged[name], parameter)


def test_average_is_the_exponential_mean_of_the_steps(
    small_store: FeatureStore, tmp_path: Path
) -> None:
    run = make_run(small_store, tmp_path, train_config(ema_decay=0.75))
    expected: dict[str, Tensor] = {}
    for number in range(4):
        run.step(run.on_device(run.train_samples.batch(np.arange(6) + 6 * number)))
        for name, tensor in run.learner.student.state_dict().items():
            value = tensor.detach().double().clone()
            old = expected.get(name)
            expected[name] = value if old is None else 0.75 * old + 0.25 * value
    for name, tensor in run.average.module["student"].state_dict().items():
        assert torch.allclose(tensor.double(), expected[name], atol=1e-6), name


def _resolved(**changes: Any) -> dict[str, Any]:
    """Return the configuration that a run writes: with the defaults of its splits."""
    document: dict[str, Any] = distilling(**changes).model_dump(mode="json")
    # No split of the store lacks labels, and none has virials.
    automatic = {"pseudo_label_weight": 0.0, "virial_weight": 0.0}
    document["loss"] |= automatic
    return document


def test_export_has_exactly_the_plain_architecture(finished: Path) -> None:
    plain = _plain_student(distilling()).state_dict()
    exported = load_file(finished / "student.safetensors")
    assert {k: v.shape for k, v in exported.items()} == {
        k: v.shape for k, v in plain.items()
    }
    loaded = load_checkpoint(finished / "student.safetensors")
    assert loaded.name == "painn"
    assert loaded.normalizer == teacher_normalizer()
    assert loaded.provenance["config"] == _resolved(eval_every=5, recipe="none")


def test_export_of_the_last_step_is_the_average(
    small_store: FeatureStore, tmp_path: Path
) -> None:
    run = make_run(small_store, tmp_path, distilling(steps=4, export_weights="last"))
    run.train(resume=False)
    exported = load_file(tmp_path / "student.safetensors")
    averaged = run.average.module["student"].state_dict()
    raw = run.learner.student.state_dict()
    assert all(torch.equal(exported[key], averaged[key]) for key in averaged)
    assert any(not torch.equal(exported[key], raw[key]) for key in raw)


def test_best_export_is_the_row_with_the_lowest_loss(
    small_store: FeatureStore, tmp_path: Path
) -> None:
    """A rate that wrecks the student late leaves the early weights exported."""
    config = train_config(steps=6, eval_every=2, optimizer={"lr": 1e-4}, ema_decay=0.0)
    run = make_run(small_store, tmp_path, config)
    step = run.step

    def wrecking(batch: Data) -> dict[str, Tensor]:
        losses = step(batch)
        if run.progress.step >= 4:
            for parameter in run.average.module["student"].parameters():
                parameter.data.mul_(1.3)
        return losses

    run.step = wrecking  # type: ignore[method-assign]
    run.train(resume=False)
    losses = [float(row["val_loss"]) for row in metric_rows(tmp_path)]
    assert losses[2] > max(losses[:2])
    provenance = load_checkpoint(tmp_path / "student.safetensors").provenance
    assert provenance["step"] == 2 * (1 + int(np.argmin(losses)))


def test_folder_of_a_run_tells_the_same_everywhere(
    finished: Path, small_store: FeatureStore
) -> None:
    rows = metric_rows(finished)
    assert [int(row["step"]) for row in rows] == [5, 10, 12]
    assert {"train_loss", "train_l0", "train_n2n", "train_v2v"} <= rows[0].keys()
    summary = json.loads((finished / "metrics.json").read_text())
    header = json.loads((finished / "run.json").read_text())
    header["config"] = yaml.safe_load((finished / "config.yaml").read_text())
    assert summary["fingerprint"] == small_store.fingerprint == header["fingerprint"]
    assert header["config"] == _resolved(eval_every=5, recipe="none")
    plain = _plain_student(distilling())
    assert summary["parameters"] == sum(p.numel() for p in plain.parameters())
    best = min(rows, key=lambda row: float(row["val_loss"]))
    for name in ("energy_mae", "forces_mae", "forces_cos", "efwt"):
        assert summary["metrics"][name] == pytest.approx(float(best[f"val_{name}"]))
    assert set(summary["teacher_metrics"]) == set(summary["metrics"])


def test_predictions_of_a_run_give_its_metrics(finished: Path) -> None:
    with np.load(finished / "predictions.npz") as file:
        kept = {name: torch.from_numpy(file[name]) for name in file.files}
    sums = MetricSums()
    n_atoms = kept["n_atoms"].long()
    sums.add(
        kept["energy"],
        kept["forces"],
        kept["energy_label"],
        kept["forces_label"],
        torch.repeat_interleave(torch.arange(len(n_atoms)), n_atoms),
        torch.zeros(int(n_atoms.sum()), dtype=torch.bool),
    )
    summary = json.loads((finished / "metrics.json").read_text())
    assert sums.result() == pytest.approx(summary["metrics"], rel=1e-6)


def _noted_sizes(samples: CachedSamples) -> list[int]:
    """Atoms of every batch that ``samples`` makes from now on."""
    make = samples.batch
    sizes: list[int] = []

    def noting(positions: np.ndarray) -> Data:
        batch = make(positions)
        sizes.append(len(batch.atomic_numbers))
        return batch

    samples.batch = noting  # type: ignore[method-assign]
    return sizes


def test_steps_and_validation_keep_the_budget_of_atoms(
    small_store: FeatureStore, tmp_path: Path
) -> None:
    run = make_run(small_store, tmp_path, train_config(batch_atoms=60, steps=40))
    train, val = _noted_sizes(run.train_samples), _noted_sizes(run.val_samples)
    run.train(resume=False)
    assert 30 < max(train) <= 60
    assert 60 < max(val) <= 120
    labels = small_store.splits["val"].read(np.arange(24), ["labels/energy"])
    with np.load(tmp_path / "predictions.npz") as file:
        assert np.array_equal(file["energy_label"], labels["labels/energy"])


def test_normaliser_is_the_teachers_or_that_of_the_labels(
    small_store: FeatureStore, labels_store: FeatureStore
) -> None:
    assert store_normalizer(small_store, "train") == teacher_normalizer()
    own = store_normalizer(labels_store, "train")
    statistics = labels_store.attributes["label_statistics"]["train"]
    assert own == Normalizer.from_dict(statistics)
    assert own != Normalizer()


def test_unknown_split_is_refused(small_store: FeatureStore, tmp_path: Path) -> None:
    for key in ("train_split", "val_split"):
        with pytest.raises(SpecError, match=r"'trian'.*train.*val"):
            make_run(small_store, tmp_path, train_config(**{key: "trian"}))


def test_damaged_block_stops_training_with_its_name(
    datasets: dict[str, Path], tmp_path: Path
) -> None:
    small = {"format": "extxyz", "path": str(datasets["train"]), "limit": 20}
    document = spec_document({"train": small, "val": small}, tmp_path / "s.zarr")
    store = build(write_spec(tmp_path / "s.yaml", document))
    shard = tmp_path / "s.zarr" / "train" / "labels" / "forces" / "c" / "0" / "0"
    content = bytearray(shard.read_bytes())
    content[40] ^= 4
    shard.write_bytes(content)
    run = make_run(store, tmp_path / "run", train_config(steps=2))
    with pytest.raises(DamagedStoreError, match="labels/forces"):
        run.train(resume=False)


def test_isolated_atom_of_a_labels_store_stops_training_with_its_name(
    tmp_path: Path,
) -> None:
    frames = [*collision_frames(5), frame("alone", ["H"], [[0, 0, 0]], energy=-13.0)]
    data = write_frames(tmp_path / "d.extxyz", frames)
    document = spec_document({"train": data, "val": data}, tmp_path / "s.zarr")
    store = build(write_spec(tmp_path / "s.yaml", document))
    run = make_run(store, tmp_path / "run", train_config(steps=2))
    with pytest.raises(DataError, match=r"'alone'.*no neighbours"):
        run.train(resume=False)


def test_validation_without_labels_still_finishes(
    tmp_path: Path, datasets: dict[str, Path]
) -> None:
    """Missing labels leave metrics NaN, and metrics.json stays readable JSON."""
    bare = frame(None, ["O", "H", "H"], [[0, 0, 0], [1, 0, 0], [0, 1, 0]])
    val = write_frames(tmp_path / "bare.extxyz", [bare, bare])
    splits = {"train": datasets["train"], "val": val}
    teacher = save_teacher(tmp_path / "t.safetensors")
    document = spec_document(splits, tmp_path / "s.zarr", teacher)
    store = build(write_spec(tmp_path / "s.yaml", document))
    make_run(store, tmp_path / "run", train_config(steps=2)).train(resume=False)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    text = (tmp_path / "run" / "metrics.json").read_text()
    assert json.loads(text, parse_constant=refuse)["steps"] == 2


def test_a_loss_that_explodes_is_reported(
    small_store: FeatureStore, tmp_path: Path
) -> None:
    config = train_config(
        steps=4,
        eval_every=2,
        optimizer={"lr": 1e30, "clip_norm": None},
        schedule={"kind": "constant", "warmup_steps": 0},
    )
    with pytest.raises(PipelineError, match=r"(?i)diverge|nan|finite"):
        make_run(small_store, tmp_path, config).train(resume=False)


def test_digest_of_weights_sees_every_parameter() -> None:
    model = _plain_student(train_config())
    before = weights_digest(model)
    assert weights_digest(model) == before
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.view(-1)[0] += 1e-3
        assert weights_digest(model) != before
        before = weights_digest(model)


def test_final_metrics_are_the_plain_mean_over_the_test_splits(
    small_store: FeatureStore, tmp_path: Path
) -> None:
    config = train_config(steps=2, val_split="val", test_split="train+val")
    summary = make_run(small_store, tmp_path / "both", config).train(resume=False)
    single = {}
    for split in ("train", "val"):
        one = train_config(steps=2, val_split="val", test_split=split)
        run = make_run(small_store, tmp_path / split, one)
        single[split] = run.train(resume=False)
        predictions = np.load(tmp_path / split / "predictions.npz")
        assert len(predictions["energy"]) == len(small_store.splits[split])
    for of in ("metrics", "teacher_metrics"):
        for name, value in summary[of].items():
            parts = [single[split][of][name] for split in single]
            assert value == pytest.approx(sum(parts) / 2)
    assert single["train"]["metrics"] != single["val"]["metrics"]
    assert summary["val_split"] == "train+val"
    joined = np.load(tmp_path / "both" / "predictions.npz")["energy"]
    assert len(joined) == sum(len(small_store.splits[s]) for s in single)
