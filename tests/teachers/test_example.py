"""The plug-in that docs/teachers.md writes, as another package would bring it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.store.reader import FeatureStore
from tests.frames import collision_frames, write_frames
from tests.stores import STUDENTS, spec_document, write_spec

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "teachers.md"


def _blocks() -> tuple[str, str, str]:
    """The model, the plug-in and its entry point, as the page has them."""
    text = DOCUMENT.read_text()
    model, plugin = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (entry,) = re.findall(r"```toml\n.*?\n(toy = .*?)\n```", text, re.DOTALL)
    return model, plugin, entry.replace('"', "")


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the example as pip would install it."""
    folder = tmp_path_factory.mktemp("site")
    model, plugin, entry = _blocks()
    (folder / "toy.py").write_text(model)
    (folder / "toy_teacher.py").write_text(plugin)
    info = folder / "toy_teacher-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-teacher\n")
    (info / "entry_points.txt").write_text(f"[pipeline.teachers]\n{entry}\n")
    return folder


def _run(
    program: str, *arguments: object, packages: Path | None
) -> subprocess.CompletedProcess[str]:
    """A command line in a process of its own, with or without the example."""
    paths = [str(ROOT), *([] if packages is None else [str(packages)])]
    return subprocess.run(
        [
            sys.executable,
            "-c",
            f"from {program} import main; main()",
            *map(str, arguments),
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )


def test_plugin_is_about_forty_lines() -> None:
    lines = [line for line in _blocks()[1].splitlines() if line.strip()]
    assert len(lines) <= 50


def test_example_keeps_the_contract_and_its_store_trains_without_it(
    package: Path, tmp_path: Path
) -> None:
    weights = tmp_path / "toy.pt"
    program = "import sys, torch, toy; torch.save(toy.Toy().state_dict(), sys.argv[1])"
    subprocess.run([sys.executable, "-c", program, weights], cwd=package, check=True)
    data = write_frames(tmp_path / "d.extxyz", collision_frames(24))
    features = {"node_features": {}, "edge_features": {}, "per_atom_energy": {}}
    store = tmp_path / "toy.zarr"
    document = spec_document({"train": data, "val": data}, store, weights, features)
    document["teacher"]["model"] = "toy"
    spec = write_spec(tmp_path / "toy.yaml", document)

    checked = _run("pipeline.cli.main", "check-teacher", spec, packages=package)
    assert checked.returncode == 0, checked.stderr
    kept = [line.split()[0] for line in checked.stdout.splitlines()]
    assert kept[-1] == "gradient_forces"
    assert "reflections" in kept

    absent = _run("pipeline.cli.main", "build", spec, packages=None)
    assert absent.returncode == 2
    assert "there is no teacher 'toy'" in absent.stderr

    built = _run("pipeline.cli.main", "build", spec, packages=package)
    assert built.returncode == 0, built.stderr
    verified = _run("pipeline.cli.main", "verify", store, packages=None)
    assert verified.returncode == 0, verified.stderr
    assert FeatureStore.open(store).attributes["teacher"]["model"] == "toy"

    run = tmp_path / "run"
    student = [
        f"--set=student.hyperparameters.{key}={value}"
        for key, value in STUDENTS["painn-small-demo"].items()
    ]
    trained = _run(
        "kd_train.cli.train",
        *("--cache", store, "--strategy", "n2n", "--student", "painn-small-demo"),
        *("--set", "steps=3", "--set", "batch_size=4", "--out", run, *student),
        packages=None,
    )
    assert trained.returncode == 0, trained.stderr
    assert (run / "student.safetensors").exists()


def test_a_layer_of_the_example_can_be_chosen(package: Path, tmp_path: Path) -> None:
    """Its first layer is linear, so that unlike the default it has negative states."""
    program = (
        "import torch, toy, toy_teacher\n"
        "from tests.teachers.shared_data import made_samples\n"
        "potential = toy_teacher.ToyPotential(toy.Toy().requires_grad_(False))\n"
        "potential.to(torch.device('cpu'))\n"
        "graphs = [potential.graph(sample) for sample in made_samples()]\n"
        "layer = {'node_features': 'first'}\n"
        "first = potential.forward(graphs, ['node_features'], layer)['node_features']\n"
        "last = potential.forward(graphs, ['node_features'], {})['node_features']\n"
        "torch.testing.assert_close(torch.nn.functional.silu(first), last)\n"
    )
    paths = os.pathsep.join([str(ROOT), str(package)])
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
