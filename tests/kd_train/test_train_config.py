"""The configuration: where values come from, and what it refuses."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from kd_train.config.train_config import TrainConfig, load_config
from pipeline.errors import SpecError


def _load(
    tmp_path: Path, document: Any = None, *overrides: str, **flags: Any
) -> TrainConfig:
    path = None
    if document is not None:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(document))
    return load_config(path, flags, overrides)


def test_defaults_hold_without_anything(tmp_path: Path) -> None:
    config = _load(tmp_path)
    assert config == TrainConfig()
    assert config.strategies == ()
    distill = config.distill.model_dump()
    # arXiv:2306.14818, Table 6, COLL.
    assert distill["n2n"] == 100
    assert distill["v2v"] == 10000
    assert config.optimizer.amsgrad
    assert config.loss.force_weight == 100 * config.loss.energy_weight


def test_flags_beat_the_file_and_overrides_beat_flags(tmp_path: Path) -> None:
    document = {"seed": 1, "steps": 10, "optimizer": {"lr": 0.5}, "strategy": "n2n"}
    config = _load(
        tmp_path,
        document,
        "steps=30",
        "optimizer.eps=1e-3",
        seed=2,
        steps=20,
        strategy=None,
    )
    assert (config.seed, config.steps, config.strategy) == (2, 30, "n2n")
    assert (config.optimizer.lr, config.optimizer.eps) == (0.5, 1e-3)


def test_numbers_may_have_exponents_and_underscores(tmp_path: Path) -> None:
    """B10: YAML 1.1 takes 1e1 for text."""
    (tmp_path / "c.yaml").write_text("optimizer: {lr: 1e-4}\nsteps: 1_000\n")
    config = load_config(tmp_path / "c.yaml", {}, ("optimizer.clip_norm=1e1",))
    assert (config.optimizer.lr, config.optimizer.clip_norm) == (1e-4, 10.0)
    assert config.steps == 1000


def test_flags_reach_into_sections(tmp_path: Path) -> None:
    config = _load(tmp_path, {"student": {}}, **{"student.preset": "schnet"})
    assert config.student.preset == "schnet"


def test_joined_strategies_are_split(tmp_path: Path) -> None:
    config = _load(tmp_path, strategy="n2n+v2v+vanilla2")
    assert config.strategies == ("n2n", "v2v", "vanilla2")


def test_configuration_cannot_change_once_read(tmp_path: Path) -> None:
    config = _load(tmp_path)
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3  # type: ignore[misc]


def test_resolved_configuration_reads_back_equal(tmp_path: Path) -> None:
    config = _load(
        tmp_path, {"distill": {"n2n": 7.5}}, "optimizer.clip_norm=null", seed=4
    )
    assert config.optimizer.clip_norm is None
    assert (
        _load(tmp_path, yaml.safe_load(yaml.safe_dump(config.model_dump()))) == config
    )


REFUSED: list[tuple[Any, tuple[str, ...], list[str]]] = [
    ({"sted": 1}, (), ["'sted'", "'seed'"]),
    ({"optimizer": {"learning_rate": 1}}, (), ["'optimizer.learning_rate'", "lr"]),
    ({"steps": 0}, (), ["steps", "greater"]),
    ({"steps": True}, (), ["steps", "must be a plain decimal number, found True"]),
    (
        {"loss": {"force_weight": True}},
        (),
        ["loss.force_weight", "must be a plain decimal number"],
    ),
    ({}, ("loss.force_weight=on",), ["loss.force_weight", "found 'on'"]),
    ({}, ("schedule.milestones=[1, true]",), ["schedule.milestones", "number"]),
    ({}, ("steps=010",), ["steps", "'010'"]),
    ({"seed": 10**19}, (), ["seed", "too large"]),
    ({}, ("batch_atoms=1:30",), ["batch_atoms", "'1:30'"]),
    ({"steps": "many"}, (), ["steps", "'many'"]),
    ({"batch_size": 2.5}, (), ["batch_size", "2.5"]),
    ({"batch_atoms": 0}, (), ["batch_atoms", "0"]),
    ({"shuffle_blocks": 0}, (), ["shuffle_blocks", "0"]),
    ({"loader_threads": 0}, (), ["loader_threads", "0"]),
    ({"train_split": "a+b+a"}, (), ["train_split", "a+b+a", "once"]),
    ({"seed": -1}, (), ["seed", "-1"]),
    ({"ema_decay": 1.0}, (), ["ema_decay", "1.0"]),
    ({"optimizer": {"lr": 0}}, (), ["optimizer.lr"]),
    ({"optimizer": {"lr": float("nan")}}, (), ["optimizer.lr"]),
    ({"optimizer": {"lr": float("inf")}}, (), ["optimizer.lr", "inf"]),
    ({"loss": {"force_weight": float("inf")}}, (), ["loss.force_weight"]),
    ({"distill": {"n2n": -1}}, (), ["distill.n2n", "-1"]),
    ({"export": "both"}, (), ["export", "'both'"]),
    ({"strategy": "n2m"}, (), ["n2m", "known: none, n2n"]),
    ({"strategy": ""}, (), ["strategy"]),
    ({"strategy": "n2n+n2n"}, (), ["once"]),
    ({"strategy": "none+n2n"}, (), ["none cannot be joined"]),
    ({"schedule": {"kind": "step"}}, (), ["schedule.kind", "'step'"]),
    ({"student": "painn"}, (), ["student"]),
    (None, ("steps",), ["--set", "'steps'", "key.subkey=value"]),
    (None, ("=3",), ["--set", "'=3'"]),
    (None, ("steps.more=3",), ["steps"]),
    (None, ("strategy=n2n", "strategy.x=1"), ["'strategy'", "is not a mapping"]),
    (None, ("steps=[1,",), ["--set", "not valid YAML"]),
    (
        None,
        ("seed=!!python/object/apply:os.getpid []",),
        ["seed", "must be a plain decimal number"],
    ),
    ([1, 2], (), ["mapping", "[1, 2]"]),
]


@pytest.mark.parametrize(("document", "overrides", "words"), REFUSED)
def test_wrong_values_are_named(
    document: Any, overrides: tuple[str, ...], words: list[str], tmp_path: Path
) -> None:
    with pytest.raises(SpecError) as error:
        _load(tmp_path, document, *overrides)
    message = str(error.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


def test_weights_by_name_and_keys_of_built_in_strategies_are_one() -> None:
    by_name = load_config(None, {}, ["distill.weights.n2n=7", "distill.v2v=3"])
    flat = load_config(None, {}, ["distill.n2n=7", "distill.v2v=3"])
    assert by_name == flat
    assert by_name.model_dump() == flat.model_dump()
    assert "weights" not in flat.model_dump()["distill"]
    assert (by_name.distill.weight("n2n"), by_name.distill.weight("e2n")) == (7, 10)
    assert by_name.distill.set_weights == {"n2n", "v2v"}
    for overrides, words in (
        (["distill.weights.n2n=7", "distill.n2n=7"], "n2n and weights.n2n are one key"),
        (["distill.weights.n2m=7"], r"unknown strategy 'n2m' \(known: none, n2n, e2n"),
        (["distill.weights.n2n=-7"], "distill.n2n: .*greater than or equal to 0"),
        (["distill.weights=7"], "distill.weights: "),
    ):
        with pytest.raises(SpecError, match=words):
            load_config(None, {}, overrides)


def test_a_network_without_a_preset_can_be_the_student() -> None:
    config = load_config(None, {}, ["student.model=painn"])
    assert config.student.name == "painn"
    assert "model" not in load_config(None, {}, []).model_dump()["student"]
    with pytest.raises(SpecError, match="model and preset exclude each other"):
        load_config(None, {"student.preset": "schnet"}, ["student.model=painn"])
