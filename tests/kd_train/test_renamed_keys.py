"""Earlier names of keys: read with one warning, refused beside the new name."""

import logging
from pathlib import Path
from typing import Any

import pytest
import yaml

from kd_train.config.train_config import TrainConfig, load_config
from kd_train.sweep.grid import load_sweep
from pipeline.errors import SpecError
from pipeline.spec.cache_spec import load_spec
from pipeline.spec.renamed_keys import rename_keys

OLD = {
    "loss.teacher_labels": ("loss.pseudo_label_weight", 0.5),
    "loss.force_error": ("loss.force_loss", "mae"),
    "distill.balance": ("distill.target_ratio", 0.3),
    "optimizer.decayed": ("optimizer.weight_decay_on", "matrices"),
    "accumulate": ("accumulate_steps", 3),
    "export": ("export_weights", "last"),
    "best_by": ("monitor", "efwt"),
    "buffer_blocks": ("shuffle_blocks", 5),
}
OLD_OF_SPECS = {
    "teacher.batch_gib": ("teacher.max_batch_gib", 2.0),
    "splits.train.compare_energies": ("splits.train.check_energy_kind", False),
    "features.node_features.error": ("features.node_features.max_relative_error", 0.1),
}


def _nested(dotted: str, value: Any) -> dict[str, Any]:
    first, dot, rest = dotted.partition(".")
    return {first: _nested(rest, value) if dot else value}


def _write(path: Path, document: Any) -> Path:
    path.write_text(yaml.safe_dump(document))
    return path


def _value(config: Any, dotted: str) -> Any:
    for key in dotted.split("."):
        config = config[key]
    return config


@pytest.mark.parametrize("old", OLD)
def test_configurations_may_have_the_earlier_names(
    old: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    new, value = OLD[old]
    path = _write(tmp_path / "c.yaml", _nested(old, value))
    for file, changes in ((path, []), (None, [f"{old}={value}"])):
        caplog.clear()
        config = load_config(file, {}, changes)
        assert _value(config.model_dump(), new) == value
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        assert f"the key {old} is now called {new}" in record.message
    assert load_config(path, {}, [f"{new}={value}"]) == config


def test_a_value_may_have_its_earlier_name(caplog: pytest.LogCaptureFixture) -> None:
    assert load_config(None, {}, ["normalizer=unit"]).normalizer == "none"
    (record,) = caplog.records
    assert "normalizer: unit is now called normalizer: none" in record.message


def test_two_names_of_one_key_are_refused_but_layers_overrule(tmp_path: Path) -> None:
    both = _write(tmp_path / "both.yaml", {"accumulate": 2, "accumulate_steps": 2})
    with pytest.raises(SpecError, match=r"both\.yaml: accumulate(_steps)? and .*alone"):
        load_config(both, {}, [])
    old = _write(tmp_path / "old.yaml", {"accumulate": 2})
    assert load_config(old, {}, ["accumulate_steps=4"]).accumulate_steps == 4
    new = _write(tmp_path / "new.yaml", {"accumulate_steps": 2})
    assert load_config(new, {}, ["accumulate=4"]).accumulate_steps == 4


@pytest.mark.parametrize("old", OLD_OF_SPECS)
def test_specs_may_have_the_earlier_names(
    old: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    new, value = OLD_OF_SPECS[old]
    (tmp_path / "d.extxyz").touch()
    document: dict[str, Any] = {
        "teacher": {"model": "chgnet"},
        "splits": {"train": {"format": "extxyz", "path": "d.extxyz"}},
        "features": {"node_features": {"profile": "compact"}},
        "store": {"path": "s.zarr"},
    }
    plain = _write(tmp_path / "plain.yaml", document)
    set_now = load_spec(plain, [f"{old}={value}"]).model_dump()
    *parents, last = old.split(".")
    _value(document, ".".join(parents))[last] = value
    in_file = load_spec(_write(tmp_path / "old.yaml", document)).model_dump()
    assert set_now == in_file
    assert _value(in_file, new) == value
    assert [r.levelno for r in caplog.records] == [logging.WARNING] * 2
    assert all(f"{old} is now called {new};" in r.message for r in caplog.records)


def test_sweeps_may_have_the_earlier_names(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _write(tmp_path / "shared.yaml", {"accumulate": 2, "loss": {"force_error": "mae"}})
    document = {
        "store": "s.zarr",
        "out": "out",
        "config": "shared.yaml",
        "settings": {"accumulate_steps": 3, "recipe": "none"},
        "students": ["schnet-demo"],
        "strategies": ["energy_force", "n2n+per_atom_energy"],
        "weights": {"per_atom_energy": [1, 2]},
        "variants": {"a": {}, "b": {"distill.balance": 0.5}},
    }
    sweep = load_sweep(_write(tmp_path / "sweep.yaml", document))
    assert {run.config.accumulate_steps for run in sweep.runs} == {3}
    assert {run.config.loss.force_loss for run in sweep.runs} == {"mae"}
    assert {run.config.distill.target_ratio for run in sweep.runs} == {None, 0.5}
    names = {run.name for run in sweep.runs}
    assert {"schnet-demo-vanilla1-b-s0", "schnet-demo-n2n+vanilla2=2-a-s0"} <= names
    assert len(caplog.records) == 3  # one for each name, not for each run


def test_strategies_have_second_names(caplog: pytest.LogCaptureFixture) -> None:
    config = load_config(None, {"strategy": "n2n+energy_force"}, [])
    assert config.strategies == ("n2n", "vanilla1")
    config = load_config(None, {}, ["distill.per_atom_energy=7"])
    assert config.distill.vanilla2 == 7
    assert not caplog.records


def test_documents_without_earlier_names_stay_as_they_are() -> None:
    document = TrainConfig().model_dump(mode="json")
    assert rename_keys(TrainConfig, document, "here") == document
    assert rename_keys(TrainConfig, {1: 2, "x": None}, "here") == {1: 2, "x": None}
