"""``kd-train`` as it is typed: what it does, and one sentence for what it refuses."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from kd_train.cli.train import main
from pipeline.build.build import build_store
from pipeline.build.worker import FillOptions
from pipeline.spec.cache_spec import load_spec
from pipeline.store.reader import FeatureStore
from tests.commands import refusal, run_command
from tests.frames import collision_frames, frame, write_frames
from tests.stores import (
    STUDENTS,
    build,
    spec_document,
    write_spec,
)

STUDENT = "painn-small-demo"


def _arguments(store: Path, out: Path, *more: object) -> list[object]:
    sizes = [
        f"student.hyperparameters.{key}={value}"
        for key, value in STUDENTS[STUDENT].items()
    ]
    settings = ["batch_size=16", "eval_every=2", *sizes]
    flags = [part for setting in settings for part in ("--set", setting)]
    return [
        *("--cache", store, "--out", out, "--student", STUDENT),
        *("--steps", 3, "--device", "cpu", *flags, *more),
    ]


def test_trains_from_a_staged_copy(small_store: FeatureStore, tmp_path: Path) -> None:
    near = _arguments(small_store.path, tmp_path / "near")
    far = _arguments(
        small_store.path, tmp_path / "far", "--local-copy", tmp_path / "stage"
    )
    for arguments in (near, far):
        assert run_command(main, arguments).exit_code == 0
    (copy,) = (tmp_path / "stage").glob("small-*.zarr")
    assert FeatureStore.open(copy).fingerprint == small_store.fingerprint
    runs = [tmp_path / name / "student.safetensors" for name in ("near", "far")]
    assert runs[0].read_bytes() == runs[1].read_bytes()


def test_trains_and_resumes(small_store: FeatureStore, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = run_command(
        main, _arguments(small_store.path, out, "--strategy", "n2n", "--seed", 3)
    )
    assert done.exit_code == 0
    assert str(out) in done.stdout
    assert "energy_mae" in done.stdout
    names = {path.name for path in out.iterdir()}
    assert names == {
        "config.yaml",
        "run.json",
        "last.pt",
        "metrics.csv",
        "metrics.json",
        "predictions.npz",
        "student.safetensors",
        "train.log",
    }
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert (config["strategy"], config["seed"], config["steps"]) == ("n2n", 3, 3)
    assert config["student"]["preset"] == STUDENT
    assert "step 2" in (out / "train.log").read_text()
    again = _arguments(small_store.path, out, "--strategy", "n2n", "--seed", 3)
    assert "--resume" in refusal(main, again)
    resumed = run_command(main, [*again, "--resume"])
    assert resumed.exit_code == 0
    longer = [*again, "--steps", 5]
    assert "add --extend to continue with more" in refusal(main, [*longer, "--resume"])
    assert run_command(main, [*longer, "--extend"]).exit_code == 0
    assert json.loads((out / "metrics.json").read_text())["steps"] == 5


def test_file_flags_and_overrides_join(
    small_store: FeatureStore, tmp_path: Path
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("strategy: vanilla2\nema_decay: 0.5\nsteps: 50\n")
    out = tmp_path / "run"
    done = run_command(main, _arguments(small_store.path, out, "--config", file))
    assert done.exit_code == 0
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert config["strategy"] == "vanilla2"
    assert config["ema_decay"] == 0.5
    assert config["steps"] == 3


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--strategy", "n2m"], ["n2m", "known: none, n2n"]),
        (["--strategy", "e2n"], ["'edge_to_node_features'", "features:"]),
        (["--student", "painn-smal"], ["'painn-smal'", "'painn-small'"]),
        (["--set", "sted=1"], ["'sted'", "'seed'"]),
        (["--set", "garbage"], ["--set 'garbage'"]),
        (["--seed", 10**20], ["seed", "too large"]),
        (["--set", "seed=99999999999999999999"], ["seed", "too large"]),
        (
            ["--set", "batch_size=true"],
            ["batch_size", "must be a plain decimal number"],
        ),
        (["--set", "student.hyperparameters.layers=3"], ["layers", "num_layers"]),
        (
            ["--set", "student.hyperparameters.regress_forces=false"],
            ["regress_forces is false", "loss.force_weight=0"],
        ),
        (
            ["--set", "student.hyperparameters.hidden_channels=1"],
            ["painn.hidden_channels is 1", "at least 2"],
        ),
        (["--config", "absent.yaml"], ["absent.yaml does not exist"]),
        (["--config", "."], ["."]),
        (["--resume"], ["last.pt does not exist", "nothing to resume"]),
        (["--device", "toaster"], ["toaster"]),
        (["--set", "val_split=test"], ["'test'", "val"]),
        (["--set", "batch_atoms=3"], ["Sample '", "atoms", "batch_atoms = 3", "raise"]),
    ],
)
def test_bad_input_is_one_sentence(
    more: list[str], words: list[str], small_store: FeatureStore, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    sentence = refusal(main, _arguments(small_store.path, out, *more))
    assert all(word in sentence for word in words), sentence
    assert not (out / "metrics.csv").exists()


def test_one_of_several_processes_needs_to_know_which(
    small_store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    out = tmp_path / "run"
    sentence = refusal(main, _arguments(small_store.path, out))
    assert "RANK is not set" in sentence
    assert "torchrun" in sentence
    assert not out.exists()
    monkeypatch.setenv("WORLD_SIZE", "1")
    done = run_command(main, _arguments(small_store.path, out))
    assert done.exit_code == 0


def test_a_field_that_is_missing_is_told_first(
    small_store: FeatureStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither what the recipe lacks nor a missing split comes before."""
    arguments = ["--cache", small_store.path, "--out", tmp_path / "run"]
    arguments += ["--student", "painn-small", "--set", "val_split=absent"]
    sentence = refusal(main, [*arguments, "--strategy", "e2e"])
    assert sentence == (
        "Strategy 'e2e' needs the field 'edge_features', which this store lacks; add "
        "the line 'edge_features: {}' under features: of the spec and build the store "
        "again."
    )
    assert caplog.text == ""


def test_strategy_v2v_needs_vectors_of_the_student(
    small_store: FeatureStore, tmp_path: Path
) -> None:
    arguments = ["--cache", small_store.path, "--out", tmp_path / "run"]
    arguments += ["--student", "schnet-demo", "--strategy", "v2v"]
    # Told before what is wrong with validation.
    arguments += ["--set", "val_split=absent"]
    sentence = refusal(main, arguments)
    assert "'v2v'" in sentence
    assert "schnet-demo" in sentence


def test_yaml_tags_are_not_executed(small_store: FeatureStore, tmp_path: Path) -> None:
    trace = tmp_path / "executed"
    file = tmp_path / "c.yaml"
    file.write_text(f"seed: !!python/object/apply:os.mkdir [{trace}]\n")
    arguments = _arguments(small_store.path, tmp_path / "r", "--config", file)
    assert "c.yaml is not valid YAML" in refusal(main, arguments)
    assert not trace.exists()


def test_missing_and_foreign_stores_are_refused(tmp_path: Path) -> None:
    absent = refusal(main, _arguments(tmp_path / "absent.zarr", tmp_path / "r"))
    assert "absent.zarr is not a feature store" in absent
    (tmp_path / "empty").mkdir()
    empty = refusal(main, _arguments(tmp_path / "empty", tmp_path / "r"))
    assert "kd-cache build" in empty


def test_unsealed_store_names_its_missing_blocks(
    small_spec: Path, tmp_path: Path
) -> None:
    store = tmp_path / "partial.zarr"
    spec = load_spec(small_spec, [f"store.path={store}"])
    assert not build_store(spec, filling=FillOptions(blocks=(0, 2)))
    sentence = refusal(main, _arguments(store, tmp_path / "run"))
    assert "block 2 of split 'train'" in sentence
    assert "'val'" not in sentence
    assert "kd-cache build" in sentence


def test_paths_keep_their_spelling(
    labels_store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B10: a folder called moved was reported as "Moved"; A13: names are no YAML."""
    monkeypatch.chdir(tmp_path)
    for name in ("moved", "run #2", "no", "a: b"):
        arguments = _arguments(labels_store.path, Path(name))
        assert run_command(main, arguments).exit_code == 0
        told = refusal(main, arguments)
        assert told == f"{name} holds a run; add --resume or change --out."
    assert {path.name for path in tmp_path.iterdir()} == {
        *("moved", "run #2", "no", "a: b")
    }


def test_out_that_is_a_file_is_refused(
    small_store: FeatureStore, tmp_path: Path
) -> None:
    out = tmp_path / "file"
    out.write_text("mine")
    sentence = refusal(main, _arguments(small_store.path, out))
    assert str(out) in sentence
    assert out.read_text() == "mine"


def test_resume_with_another_store_or_configuration_is_refused(
    small_store: FeatureStore, labels_store: FeatureStore, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    done = run_command(main, _arguments(labels_store.path, out))
    assert done.exit_code == 0
    other = refusal(main, _arguments(small_store.path, out, "--resume"))
    assert labels_store.fingerprint[:12] in other
    assert small_store.fingerprint[:12] in other
    changed = _arguments(labels_store.path, out, "--resume", "--seed", 5)
    assert "seed = 0" in refusal(main, changed)
    (out / "last.pt").write_bytes(b"torn")
    torn = refusal(main, _arguments(labels_store.path, out, "--resume"))
    assert "last.pt is damaged" in torn


def test_lonely_atom_and_unknown_element_are_named(tmp_path: Path) -> None:
    alone = frame("alone", ["H"], [[0, 0, 0]], energy=-13.0)
    heavy = frame("heavy", ["U", "H"], [[0, 0, 0], [1, 0, 0]], energy=-13.0)
    for number, (text, words) in enumerate(
        [(alone, "'alone'"), (heavy, "'heavy' holds an atom with atomic number 92")]
    ):
        data = write_frames(tmp_path / "d.extxyz", [*collision_frames(4), text])
        store = tmp_path / f"{number}.zarr"
        document = spec_document({"train": data, "val": data}, store)
        build(write_spec(tmp_path / "s.yaml", document))
        sentence = refusal(main, _arguments(store, tmp_path / f"run{number}"))
        assert words in sentence


def test_damaged_store_is_named_with_the_repair(
    labels_store: FeatureStore, tmp_path: Path
) -> None:
    store = tmp_path / "copy.zarr"
    shutil.copytree(labels_store.path, store)
    shard = store / "train" / "labels" / "energy" / "c" / "1"
    content = bytearray(shard.read_bytes())
    content[3] ^= 1
    shard.write_bytes(content)
    sentence = refusal(main, _arguments(store, tmp_path / "run"))
    assert "labels/energy" in sentence
    assert "--repair" in sentence


@pytest.mark.parametrize("option", ["--out", "--cache", "--config", "--stage"])
def test_an_empty_path_is_not_the_current_folder(
    option: str,
    labels_store: FeatureStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """B7: `--out "$UNSET"` trained in the current folder."""
    monkeypatch.chdir(tmp_path)
    arguments = [*_arguments(labels_store.path, tmp_path / "r"), option, ""]
    done = run_command(main, arguments)
    assert done.exit_code == 2
    assert "it is empty; is a variable of the shell not set?" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["--student", "--strategy"])
def test_an_empty_name_is_no_default(
    option: str, labels_store: FeatureStore, tmp_path: Path
) -> None:
    arguments = _arguments(labels_store.path, tmp_path / "r", option, "")
    told = refusal(main, arguments)
    assert told == f"{option} is empty; name one or leave the option out."


@pytest.mark.parametrize("name", ["meta", "gpu", "cuda:99"])
def test_a_device_without_numbers_is_refused(
    name: str, labels_store: FeatureStore, tmp_path: Path
) -> None:
    arguments = _arguments(labels_store.path, tmp_path / "r", "--device", name)
    assert f"--device '{name}' cannot be used" in refusal(main, arguments)


def test_the_largest_budget_is_no_traceback(
    labels_store: FeatureStore, tmp_path: Path
) -> None:
    setting = ["--set", f"batch_atoms={2**63 - 1}", "--steps", 1]
    arguments = _arguments(labels_store.path, tmp_path / "r", *setting)
    assert run_command(main, arguments).exit_code == 0


def test_weights_that_are_no_numbers_end_the_run(
    labels_store: FeatureStore, tmp_path: Path
) -> None:
    """The student's file was said to be damaged."""
    arguments = ["--set", "optimizer.eps=1e-300", "--set", "optimizer.lr=1e-3"]
    told = refusal(main, _arguments(labels_store.path, tmp_path / "r", *arguments))
    assert "weights are no longer finite numbers by step" in told
    assert "optimizer.eps" in told
