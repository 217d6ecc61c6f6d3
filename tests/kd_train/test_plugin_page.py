"""The plug-ins that docs/plugins.md writes, as packages of their own."""

import json
import re
import tomllib
from io import StringIO
from pathlib import Path

import ase.io
import pytest
import yaml

from pipeline.store.reader import FeatureStore
from tests.frames import collision_frames
from tests.plugin_packages import ROOT, install, run_with
from tests.stores import STUDENTS, spec_document, write_spec

PAGE = ROOT / "docs" / "plugins.md"
BUILD, TRAIN = "pipeline.cli.main:main", "kd_train.cli.train:main"
EVALUATE = "kd_train.cli.evaluate:eval_main"


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), re.DOTALL)


def _lines(block: str) -> int:
    """Lines of code, without docstrings and empty lines."""
    lines = (line.strip() for line in block.splitlines())
    return sum(1 for line in lines if line and not line.startswith('"""'))


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the three packages of the page."""
    folder = tmp_path_factory.mktemp("site")
    for code, text in zip(_blocks("python"), _blocks("toml"), strict=True):
        project = tomllib.loads(text)["project"]
        ((group, points),) = project["entry-points"].items()
        ((name, value),) = points.items()
        module = value.split(":")[0]
        entries = f"[{group}]\n{name} = {value}\n"
        install(folder, project["name"], {module: code}, entries)
    return folder


@pytest.fixture(scope="module")
def store(
    packages: Path, tmp_path_factory: pytest.TempPathFactory, teacher_file: Path
) -> Path:
    """A store of the reader's files."""
    folder = tmp_path_factory.mktemp("plugins")
    data = folder / "frames.jsonl"
    data.write_text("".join(map(_json_line, collision_frames(24))))
    path = folder / "s.zarr"
    document = spec_document({"train": data, "val": data}, path, teacher_file)
    for split in document["splits"].values():
        split["format"] = "jsonl"
    spec = write_spec(folder / "s.yaml", document)
    absent = run_with(None, BUILD, "build", spec)
    assert absent.returncode == 2
    assert "unknown dataset format (known: oc20_lmdb, oc20_raw" in absent.stderr
    built = run_with(packages, BUILD, "build", spec)
    assert built.returncode == 0, built.stderr
    return path


def _json_line(text: str) -> str:
    atoms = ase.io.read(StringIO(text), format="extxyz")
    frame = {
        "numbers": atoms.numbers.tolist(),
        "positions": atoms.positions.tolist(),
        "energy": float(atoms.get_potential_energy()),
        "forces": atoms.get_forces().tolist(),
    }
    return json.dumps(frame) + "\n"


def _train(
    packages: Path | None, store: Path, out: Path, *more: object
) -> tuple[int, str]:
    done = run_with(
        packages,
        TRAIN,
        *("--cache", store, "--out", out, "--steps", "4"),
        *("--set", "batch_size=4", "--set", "eval_every=2", *more),
    )
    return done.returncode, done.stderr


def test_examples_are_short() -> None:
    strategy, reader, student = _blocks("python")
    assert _lines(strategy) <= 30
    assert _lines(reader) <= 25
    assert _lines(student) <= 20


def test_the_reader_builds_a_store(store: Path) -> None:
    split = FeatureStore.open(store).splits["train"]
    assert len(split) == 24
    assert (split.n_atoms > 1).all()


def test_the_strategy_trains_and_is_named_if_it_is_absent(
    packages: Path, store: Path, tmp_path: Path
) -> None:
    student = STUDENTS["painn-small-demo"].items()
    sizes = [f"--set=student.hyperparameters.{key}={value}" for key, value in student]
    choice = ["--strategy", "cosine+n2n", "--student", "painn-small-demo", *sizes]
    code, error = _train(packages, store, tmp_path / "run", *choice)
    assert code == 0, error
    header = (tmp_path / "run" / "metrics.csv").read_text().splitlines()[0]
    assert "train_cosine" in header.split(",")
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["distill"]["weights"] == {"cosine": 50.0}
    assert config["distill"]["n2n"] == 100.0
    code, error = _train(packages, store, tmp_path / "run", *choice, "--resume")
    assert code == 0, error
    code, error = _train(None, store, tmp_path / "absent", *choice)
    assert code == 2
    assert "unknown strategy 'cosine' (known: none, n2n, e2n, e2e, v2v" in error


def test_the_student_trains_and_its_file_needs_the_package(
    packages: Path, store: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    sizes = {"hidden_channels": 8, "num_filters": 8, "num_interactions": 2}
    document = {"model": "shifted-schnet", "hyperparameters": {**sizes, "cutoff": 5.0}}
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump({"student": document}))
    code, error = _train(packages, store, run, "--strategy", "n2n", "--config", config)
    assert code == 0, error
    evaluate = (run, "--data", store, "--split", "val")
    done = run_with(packages, EVALUATE, *evaluate)
    assert done.returncode == 0, done.stderr
    absent = run_with(None, EVALUATE, *evaluate)
    assert absent.returncode == 2
    assert "No model is called 'shifted-schnet'" in absent.stderr
    assert "if its package is installed." in absent.stderr
    both = ("--student", "shifted-schnet", "--config", config)
    code, error = _train(packages, store, tmp_path / "both", *both)
    assert code == 2
    assert "model and preset exclude each other" in error
