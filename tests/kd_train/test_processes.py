"""Several processes: one run, exactly; by the real launcher and the real command."""

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from kd_train.cli.train import main
from kd_train.distributed import (
    World,
    interleave,
    process_device,
    process_group,
    read_world,
)
from kd_train.evaluation.evaluate import evaluate
from kd_train.loader.sampler import SamplerConfig, epoch_parts, ordered_batches
from kd_train.trainer.checkpoint import read_checkpoint
from pipeline.errors import PipelineError, SpecError
from pipeline.models.checkpoint import load_checkpoint
from pipeline.store.reader import FeatureStore
from tests.commands import refusal
from tests.kd_train.gradients_of_ranks import CONFIGS, PARTS
from tests.kd_train.processes import TIMEOUT, by_hand, torchrun
from tests.kd_train.runs import make_run, metric_rows
from tests.stores import (
    FLOAT32,
    STUDENTS,
    TINY_PAINN,
    build,
    save_gemnet,
    spec_document,
    write_spec,
)

STUDENT = "painn-small-demo"


@pytest.fixture(scope="module")
def full_store(
    tmp_path_factory: pytest.TempPathFactory, datasets: dict[str, Path]
) -> FeatureStore:
    """Every field that a strategy reads, of 18 samples."""
    folder = tmp_path_factory.mktemp("full")
    teacher = save_gemnet(folder / "teacher.safetensors")
    split = {"format": "extxyz", "path": str(datasets["train"]), "limit": 18}
    names = ["node_features", "edge_to_node_features", "vector_features"]
    names += ["edge_features", "per_atom_energy"]
    document = spec_document(
        {"train": split, "val": split},
        folder / "s.zarr",
        teacher,
        {**dict.fromkeys(names, FLOAT32), "force_jacobian": {"columns": 1}},
    )
    document["teacher"]["model"] = "gemnet_oc"
    return build(write_spec(folder / "s.yaml", document))


def test_gradients_are_those_of_one_process_on_the_joint_batch(
    full_store: FeatureStore, tmp_path: Path
) -> None:
    """Every strategy and a student with gradient forces; two batches a process."""
    module = "tests.kd_train.gradients_of_ranks"
    launched = torchrun(tmp_path / "logs", module, [full_store.path, tmp_path])
    assert launched.wait(TIMEOUT) == 0
    positions = np.concatenate([part for parts in PARTS for part in parts])
    for name, config in CONFIGS.items():
        run = make_run(full_store, tmp_path, config)
        joint = run.step(run.on_device(run.train_samples.batch(positions)))
        states = [
            torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=True)
            for rank in range(2)
        ]
        for key, value in joint.items():
            shares = [float(state["values"][key]) for state in states]
            assert sum(shares) == pytest.approx(value.item(), rel=1e-5), key
            assert min(shares) > 0
        assert {k.split(".")[0] for k in states[0]["gradients"]} == {
            "student",
            "adapters",
        }
        for key, parameter in run.modules.named_parameters():
            if not parameter.requires_grad:
                continue
            wanted = parameter.grad
            assert wanted is not None
            found = states[0]["gradients"][key]
            scale = wanted.abs().max().item()
            assert scale > 0, key
            assert torch.allclose(found, wanted, rtol=0, atol=2e-5 * scale), key
            assert torch.equal(found, states[1]["gradients"][key]), key
        for key, value in states[0]["average"].items():
            assert torch.equal(value, states[1]["average"][key]), key


def _arguments(store: FeatureStore, out: Path, *more: object) -> list[object]:
    settings = [
        f"student.hyperparameters.{k}={v}" for k, v in STUDENTS[STUDENT].items()
    ]
    settings += [
        "batch_size=8",
        "accumulate_steps=2",
        "eval_every=4",
        "distill.target_ratio=0.5",
    ]
    flags = [part for setting in settings for part in ("--set", setting)]
    return [
        *("--cache", store.path, "--out", out, "--student", STUDENT),
        *("--strategy", "n2n+v2v", "--steps", 24, "--device", "cpu", *flags, *more),
    ]


def _said(logs: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(logs.rglob("*.log")))


@pytest.fixture(scope="module")
def trained(
    small_store: FeatureStore, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Folder of a run that two processes finished."""
    folder = tmp_path_factory.mktemp("trained")
    out, logs = folder / "run", folder / "logs"
    launched = torchrun(logs, "kd_train", _arguments(small_store, out))
    assert launched.wait(TIMEOUT) == 0, _said(logs)
    said = _said(logs)
    assert said.count("energy_mae") == 1
    assert "Warning" not in said
    return out


@pytest.mark.slow
def test_processes_share_the_batch_of_a_recipe(
    small_store: FeatureStore, tmp_path: Path
) -> None:
    """And the first one alone tells, once, what the recipe lacks."""
    out, logs = tmp_path / "run", tmp_path / "logs"
    sizes = [f"student.hyperparameters.{k}={v}" for k, v in TINY_PAINN.items()]
    arguments: list[object] = ["--cache", small_store.path, "--out", out]
    arguments += ["--student", "painn-big", "--strategy", "n2n", "--steps", 1]
    arguments += [part for size in sizes for part in ("--set", size)]
    launched = torchrun(logs, "kd_train", [*arguments, "--device", "cpu"])
    assert launched.wait(TIMEOUT) == 0, _said(logs)
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert (config["recipe"], config["batch_size"]) == ("coll", 16)
    assert _said(logs).count("no weights for painn to painn-big") == 1


def test_metrics_are_those_of_one_process_bit_for_bit(
    trained: Path, small_store: FeatureStore
) -> None:
    loaded = load_checkpoint(trained / "student.safetensors")
    run = make_run(small_store, trained)
    samples = run.val_samples
    one = evaluate(
        loaded.model,
        map(samples.batch, ordered_batches(len(samples), 16)),
        loaded.normalizer,
        run.config.loss,
        torch.device("cpu"),
    )
    summary = json.loads((trained / "metrics.json").read_text())
    assert summary["metrics"] == one.metrics
    assert not summary["stopped_early"]
    best = min(metric_rows(trained), key=lambda row: float(row["val_loss"]))
    assert float(best["val_loss"]) == one.loss
    with np.load(trained / "predictions.npz") as file:
        assert set(file.files) == set(one.predictions)
        for name, values in one.predictions.items():
            assert np.array_equal(file[name], values), name


def test_killed_run_of_two_processes_continues_bit_for_bit(
    trained: Path, small_store: FeatureStore, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    arguments = _arguments(small_store, out)
    module = "tests.kd_train.killed_run"
    for process in by_hand(module, [7, *arguments]):
        _, said = process.communicate(timeout=TIMEOUT)
        assert process.returncode == -signal.SIGKILL, said
    assert read_checkpoint(out / "last.pt")["progress"]["step"] == 4
    assert not (out / "metrics.json").exists()
    again = torchrun(tmp_path / "again", "kd_train", [*arguments, "--auto-resume"])
    assert again.wait(TIMEOUT) == 0, _said(tmp_path / "again")
    for name in ("student.safetensors", "predictions.npz", "config.yaml"):
        assert (out / name).read_bytes() == (trained / name).read_bytes(), name
    assert metric_rows(out) == metric_rows(trained)


def test_another_number_of_processes_is_refused(
    trained: Path, small_store: FeatureStore, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(trained, out)
    sentence = refusal(main, _arguments(small_store, out, "--resume"))
    assert "trained by 2 processes, but now there are 1" in sentence


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.slow
def test_error_of_one_process_ends_all_with_its_sentence(
    failing: int, labels_store: FeatureStore, tmp_path: Path
) -> None:
    """A damaged block that only one process reads; no launcher that ends the other."""
    store = tmp_path / "copy.zarr"
    shutil.copytree(labels_store.path, store)
    split = labels_store.splits["train"]
    blocks = [split.block_positions(number) for number in range(split.n_blocks)]
    parts = epoch_parts(blocks, SamplerConfig(0, 8, world_size=2), 0)
    mine, others = (
        {int(p) for piece in parts[rank] for p in piece}
        for rank in (failing, 1 - failing)
    )
    damaged = next(n for n, b in enumerate(blocks) if not others & set(b))
    assert mine & set(blocks[damaged])
    shard = store / "train" / "labels" / "forces" / "c" / str(damaged) / "0"
    content = bytearray(shard.read_bytes())
    content[3] ^= 1
    shard.write_bytes(content)
    arguments = _arguments(labels_store, tmp_path / "run", "--set", "steps=200")
    arguments[1] = store
    arguments[7] = "none"
    processes = by_hand("kd_train", arguments)
    said = [process.communicate(timeout=TIMEOUT)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    assert "labels/forces" in said[failing]
    assert said[failing].count("Error: ") == 1
    assert "Error" not in said[1 - failing]
    assert all("Traceback" not in text and "frame #" not in text for text in said)
    assert not (tmp_path / "run" / "metrics.json").exists()


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({"WORLD_SIZE": "2"}, "RANK is not set"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "LOCAL_RANK is not set"),
        ({"WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0"}, "RANK=2"),
        ({"WORLD_SIZE": "0", "RANK": "0", "LOCAL_RANK": "0"}, "WORLD_SIZE=0"),
    ],
)
def test_variables_that_fit_no_process_are_named(
    variables: dict[str, str], words: str
) -> None:
    with pytest.raises(SpecError, match=words):
        read_world(variables)


def test_one_process_needs_no_variable() -> None:
    assert read_world({}) == read_world({"WORLD_SIZE": "1"}) == World()
    four = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"}
    assert read_world(four) == World(3, 4, 1)


def test_a_process_that_cannot_reach_the_others_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with (
        pytest.raises(PipelineError, match="Process 0 of 2 .*MASTER_ADDR"),
        process_group(World(0, 2, 0), "cpu"),
    ):
        pass


def test_every_process_gets_the_gpu_of_its_local_rank(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    assert process_device(World(3, 4, 1), None) == "cuda:1"
    assert process_device(World(3, 4, 1), "cpu") == "cpu"
    assert process_device(World(), "cuda:1") == "cuda:1"
    with pytest.raises(SpecError, match="'cuda:1' is one GPU for 4"):
        process_device(World(3, 4, 1), "cuda:1")
    with pytest.raises(SpecError, match="LOCAL_RANK=2, but its machine has 2 GPUs"):
        process_device(World(3, 4, 2), None)


def test_turns_undo_the_sharing_out() -> None:
    for count in range(8):
        items = list(range(count))
        assert interleave([items[rank::3] for rank in range(3)]) == items
