"""A run that was stopped ends as if it had not been, or refuses to go on."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch_geometric.data import Data

from kd_train.config.sections import DistillConfig, LossConfig, OptimizerConfig
from kd_train.config.train_config import TrainConfig
from kd_train.loader.sampler import SamplerConfig, epoch_batches
from kd_train.report.runs import read_run
from kd_train.trainer.checkpoint import read_checkpoint, save_checkpoint
from kd_train.trainer.trainer import Trainer
from pipeline.errors import CheckpointError, SpecError
from pipeline.spec.yaml_model import ClosedModel, read_yaml
from pipeline.store.reader import FeatureStore
from tests.kd_train.runs import TIMINGS, distilling, make_run, metric_rows
from tests.stores import train_config


class _Killed(Exception):
    pass


def _interrupt(run: Trainer, at_step: int, *, extend: bool = False) -> None:
    """Train ``run`` until step ``at_step`` begins, then stop as a kill would."""
    step = run.step

    def stopping(*batches: Data) -> dict[str, Tensor]:
        if run.progress.step == at_step:
            raise _Killed
        return step(*batches)

    run.step = stopping  # type: ignore[method-assign]
    with pytest.raises(_Killed):
        run.train(resume=extend or run.progress.step > 0, extend=extend)


def _assert_same(left: Any, right: Any, where: str = "state") -> None:
    assert type(left) is type(right), where
    if isinstance(left, Tensor):
        assert torch.equal(left, right), where
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key in left.keys() - {*TIMINGS}:
            _assert_same(left[key], right[key], f"{where}.{key}")
    elif isinstance(left, list):
        assert len(left) == len(right), where
        for number, (a, b) in enumerate(zip(left, right, strict=True)):
            _assert_same(a, b, f"{where}[{number}]")
    else:
        assert left == right, where


def _by_atoms(**changes: Any) -> TrainConfig:
    """Batches of few samples, so that every epoch has its own number of them."""
    return distilling(batch_atoms=70, shuffle_blocks=1, **changes)


@pytest.mark.parametrize(
    ("config", "stop"), [(distilling(), 6), (distilling(), 8), (_by_atoms(), 8)]
)
def test_interrupted_run_ends_as_if_it_had_not_been(
    config: TrainConfig, stop: int, small_store: FeatureStore, tmp_path: Path
) -> None:
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    make_run(small_store, straight, config).train(resume=False)
    _interrupt(make_run(small_store, stopped, config), stop)
    assert read_checkpoint(stopped / "last.pt")["progress"]["step"] == 6
    make_run(small_store, stopped, config).train(resume=True)
    for name in ("student.safetensors", "config.yaml"):
        assert (straight / name).read_bytes() == (stopped / name).read_bytes()
    states = [read_checkpoint(folder / "last.pt") for folder in (straight, stopped)]
    _assert_same(*states)
    assert states[0]["progress"]["step"] == 12
    assert metric_rows(straight) == metric_rows(stopped)
    summaries = [
        json.loads((folder / "metrics.json").read_text())
        for folder in (straight, stopped)
    ]
    _assert_same(*summaries)


def _longer(steps: int, **changes: Any) -> TrainConfig:
    schedule = {"kind": "exponential", "warmup_steps": 5, "decay_steps": 10}
    return distilling(**{"steps": steps, "schedule": schedule, **changes})


def test_an_extended_run_ends_as_if_it_had_been_longer(
    small_store: FeatureStore, tmp_path: Path
) -> None:
    """C: resume with more steps, recorded."""
    straight, extended = tmp_path / "straight", tmp_path / "extended"
    make_run(small_store, straight, _longer(12)).train(resume=False)
    make_run(small_store, extended, _longer(6)).train(resume=False)
    with pytest.raises(SpecError, match=r"steps = 6, but now it is 12; .*add --extend"):
        make_run(small_store, extended, _longer(12)).train(resume=True)
    going_on = make_run(small_store, extended, _longer(12))
    _interrupt(going_on, 7, extend=True)
    assert not (extended / "metrics.json").exists()
    assert not (extended / "predictions.npz").exists()
    # The same command again; then a plain --resume, as it has the steps by then.
    _interrupt(make_run(small_store, extended, _longer(12)), 10, extend=True)
    make_run(small_store, extended, _longer(12)).train(resume=True)
    states = [read_checkpoint(folder / "last.pt") for folder in (straight, extended)]
    assert states[1]["header"].pop("extended_from") == [6]
    _assert_same(*states)
    assert metric_rows(straight) == metric_rows(extended)
    assert _about(extended)["extended_from"] == [6]
    assert read_yaml(extended / "config.yaml")["steps"] == 12
    assert read_run(extended).summary.steps == 12
    make_run(small_store, extended, _longer(15)).train(resume=True, extend=True)
    assert _about(extended)["extended_from"] == [6, 12]


def _about(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "run.json").read_text()))


FADING = {"schedule": {"kind": "linear"}}


@pytest.mark.parametrize(
    ("changes", "steps", "words"),
    [
        (
            {"schedule": {"kind": "cosine"}},
            8,
            "schedule.kind=cosine decays the learning",
        ),
        ({"distill": FADING}, 8, "distill.schedule.kind=linear ends at the last step"),
        (
            {"distill": {"schedule": "fade"}},
            8,
            "distill.schedule=fade ends at half of the steps",
        ),
        ({}, 3, "steps = 4, but --extend needs more steps; set steps to more than 4"),
        ({"seed": 1}, 8, "seed = 0, but now it is 1"),
        (
            {"patience": 1, "eval_every": 1, "monitor": "efwt"},
            8,
            "stopped early",
        ),
    ],
)
def test_runs_that_cannot_be_extended_are_told_why(
    changes: dict[str, Any],
    steps: int,
    words: str,
    small_store: FeatureStore,
    tmp_path: Path,
) -> None:
    first = {key: value for key, value in changes.items() if key != "seed"}
    run = make_run(small_store, tmp_path, _longer(4, **first))
    run.train(resume=False)
    if "patience" in changes:
        assert run.progress.step < 4
    before = (tmp_path / "metrics.json").read_bytes()
    with pytest.raises(SpecError, match=words):
        make_run(small_store, tmp_path, _longer(steps, **changes)).train(
            resume=True, extend=True
        )
    assert (tmp_path / "metrics.json").read_bytes() == before


def test_resuming_a_finished_run_changes_nothing(
    small_store: FeatureStore, tmp_path: Path
) -> None:
    config = train_config(steps=4, eval_every=3)
    make_run(small_store, tmp_path, config).train(resume=False)
    names = ("metrics.csv", "student.safetensors", "last.pt", "config.yaml")
    before = {name: (tmp_path / name).read_bytes() for name in names}
    make_run(small_store, tmp_path, config).train(resume=True)
    assert metric_rows(tmp_path)[-1]["step"] == "4"
    assert len(metric_rows(tmp_path)) == 2
    for name, content in before.items():
        assert (tmp_path / name).read_bytes() == content, name


def test_resume_refuses_another_store(
    finished: Path, labels_store: FeatureStore, tmp_path: Path
) -> None:
    config = train_config(steps=3)
    make_run(labels_store, tmp_path, config).train(resume=False)
    state = read_checkpoint(tmp_path / "last.pt")
    state["header"]["fingerprint"] = "0123456789abcdef" * 4
    save_checkpoint(tmp_path / "last.pt", state)
    with pytest.raises(SpecError, match="fingerprint 0123456789ab") as error:
        make_run(labels_store, tmp_path, config).train(resume=True)
    assert labels_store.fingerprint[:12] in str(error.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 5}, ["seed = 0", "5"]),
        ({"batch_size": 9}, ["batch_size = 16", "9"]),
        ({"batch_atoms": 900}, ["batch_atoms = None", "900"]),
        ({"shuffle_blocks": 2}, ["shuffle_blocks = 16", "2"]),
        ({"loader_threads": 1}, ["loader_threads = 2", "1"]),
        ({"train_split": "train+val"}, ["train_split = 'train'", "train+val"]),
        ({"distill": {"n2n": 3.0}}, ["distill", "3.0"]),
    ],
)
def test_resume_refuses_a_changed_configuration(
    change: dict[str, Any], words: list[str], finished: Path, small_store: FeatureStore
) -> None:
    config = distilling(eval_every=5, **change)
    before = (finished / "config.yaml").read_bytes()
    with pytest.raises(SpecError) as error:
        make_run(small_store, finished, config).train(resume=True)
    assert all(word in str(error.value) for word in words)
    assert (finished / "config.yaml").read_bytes() == before


def test_resume_refuses_another_number_of_processes(
    finished: Path, small_store: FeatureStore, tmp_path: Path
) -> None:
    state = read_checkpoint(finished / "last.pt")
    state["progress"]["world_size"] = 2
    save_checkpoint(tmp_path / "last.pt", state)
    with pytest.raises(SpecError, match="trained by 2 processes, but now there are 1"):
        make_run(small_store, tmp_path, distilling(eval_every=5)).train(resume=True)


def _seen(run: Trainer, *, resume: bool, stop: int | None = None) -> list[list[int]]:
    """A coordinate of every atom, for every step that ``run`` takes."""
    step, seen = run.step, []

    def noting(batch: Data) -> dict[str, Tensor]:
        if run.progress.step == stop:
            raise _Killed
        seen.append(batch.positions[:, 0].tolist())
        return step(batch)

    run.step = noting  # type: ignore[method-assign]
    if stop is None:
        run.train(resume=resume)
    else:
        with pytest.raises(_Killed):
            run.train(resume=resume)
    return seen


def test_a_resume_inside_an_epoch_of_another_length_sees_the_same_batches(
    small_store: FeatureStore, tmp_path: Path
) -> None:
    found = [_epoch_lengths(small_store, _by_atoms(seed=seed)) for seed in range(20)]
    seed = next(n for n, lengths in enumerate(found) if lengths[0] != lengths[1])
    lengths = found[seed]
    config = _by_atoms(seed=seed, steps=sum(lengths) + 3, eval_every=10)
    straight = make_run(small_store, tmp_path / "straight", config)
    whole = _seen(straight, resume=False)
    stop = lengths[0] + 15
    stopped = tmp_path / "stopped"
    before = _seen(make_run(small_store, stopped, config), resume=False, stop=stop)
    resumed = make_run(small_store, stopped, config)
    after = _seen(resumed, resume=True)
    saved = len(whole) - len(after)
    assert lengths[0] < saved <= stop == len(before)
    assert before[:saved] + after == whole
    _assert_same(vars(resumed.progress), vars(straight.progress))
    weights = [
        (folder / "student.safetensors").read_bytes()
        for folder in (tmp_path / "straight", stopped)
    ]
    assert weights[0] == weights[1]


def _epoch_lengths(store: FeatureStore, config: TrainConfig) -> list[int]:
    """Batches of the first epochs of ``config`` on the split ``train``."""
    split = store.splits["train"]
    blocks = [split.block_positions(block) for block in range(split.n_blocks)]
    rule = SamplerConfig(
        config.seed, config.batch_size, config.batch_atoms, config.shuffle_blocks
    )
    return [
        len(epoch_batches(blocks, split.n_atoms, rule, epoch, 0)) for epoch in range(2)
    ]


class _Hostile:
    """Creates a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.trace,))


def _damaged_checkpoints(folder: Path, sound: bytes) -> dict[str, bytes]:
    trace = folder / "executed"
    torch.save({"header": _Hostile(trace)}, folder / "hostile.pt")
    torch.save({"other": 1}, folder / "foreign.pt")
    torch.save([1, 2], folder / "list.pt")
    return {
        "truncated": sound[: len(sound) // 2],
        "empty": b"",
        "garbage": b"\x00not a checkpoint" * 50,
        "pickle": pickle.dumps(_Hostile(trace)),
        "hostile": (folder / "hostile.pt").read_bytes(),
        "foreign": (folder / "foreign.pt").read_bytes(),
        "list": (folder / "list.pt").read_bytes(),
    }


@pytest.mark.parametrize(
    "kind",
    ["truncated", "empty", "garbage", "pickle", "hostile", "foreign", "list"],
)
def test_damaged_checkpoint_is_refused_and_not_executed(
    kind: str, finished: Path, small_store: FeatureStore, tmp_path: Path
) -> None:
    sound = (finished / "last.pt").read_bytes()
    content = _damaged_checkpoints(tmp_path, sound)[kind]
    (tmp_path / "last.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"last\.pt is damaged"):
        make_run(small_store, tmp_path, distilling(eval_every=5)).train(resume=True)
    assert not (tmp_path / "executed").exists()


def test_nothing_to_resume_is_an_error(
    small_store: FeatureStore, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="nothing to resume"):
        make_run(small_store, tmp_path).train(resume=True)


def test_same_seed_gives_the_same_run_and_another_seed_another(
    small_store: FeatureStore, tmp_path: Path
) -> None:
    folders = [tmp_path / name for name in ("a", "b", "c")]
    for folder, seed in zip(folders, (1, 1, 2), strict=True):
        make_run(small_store, folder, distilling(steps=3, seed=seed)).train(
            resume=False
        )
    first, again, other = (metric_rows(folder) for folder in folders)
    assert first == again
    assert first != other


def _with_earlier_names(config: dict[str, Any]) -> dict[str, Any]:
    """``config`` as runs of before keys were renamed have it."""
    sections: tuple[tuple[type[ClosedModel], dict[str, Any]], ...] = (
        (TrainConfig, config),
        (LossConfig, config["loss"]),
        (DistillConfig, config["distill"]),
        (OptimizerConfig, config["optimizer"]),
    )
    for model, section in sections:
        for old, new in model.earlier_keys.items():
            section[old] = section.pop(new)
    config["normalizer"] = "unit" if config["normalizer"] == "none" else "store"
    return config


def test_runs_of_before_keys_were_renamed_are_read_and_resumed(
    small_store: FeatureStore, tmp_path: Path
) -> None:
    straight, early = tmp_path / "straight", tmp_path / "early"
    config = distilling(loss={"force_loss": "mae"}, accumulate_steps=2)
    make_run(small_store, straight, config).train(resume=False)
    _interrupt(make_run(small_store, early, config), 8)
    state = read_checkpoint(early / "last.pt")
    state["header"]["config"] = _with_earlier_names(state["header"]["config"])
    assert "accumulate" in state["header"]["config"]
    save_checkpoint(early / "last.pt", state)
    make_run(small_store, early, config).train(resume=True)
    name = "student.safetensors"
    assert (straight / name).read_bytes() == (early / name).read_bytes()
    header = _about(straight)
    before = read_run(straight)
    # Earlier runs had one file.
    header["config"] = _with_earlier_names(read_yaml(straight / "config.yaml"))
    (straight / "config.yaml").write_text(json.dumps(header))
    after = read_run(straight)
    assert after.settings == before.settings
    assert after.batch == before.batch
    state["header"]["config"]["accumulate"] = 3
    save_checkpoint(early / "last.pt", state)
    with pytest.raises(SpecError, match="accumulate_steps = 3, but now it is 2"):
        make_run(small_store, early, config).train(resume=True)
