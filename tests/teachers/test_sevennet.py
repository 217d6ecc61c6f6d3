"""SevenNet beside its own ASE calculator, and under the contract."""

import subprocess
import sys
from pathlib import Path

import ase
import numpy as np
import pytest
import torch

from pipeline.build.build import build_store
from pipeline.errors import CheckpointError, SpecError
from pipeline.spec.cache_spec import load_spec
from pipeline.spec.sections import TeacherSpec
from pipeline.store.reader import FeatureStore
from pipeline.store.verify import verify_store
from pipeline.structure import Sample
from pipeline.teachers.checks import Subject, check_potential
from pipeline.teachers.registry import load_potential
from pipeline.teachers.runner import TeacherRunner
from tests.stores import STUDENTS, spec_document, write_spec
from tests.teachers.shared_data import made_samples, real_samples, shared_file

pytest.importorskip("sevenn")
pytestmark = [
    pytest.mark.filterwarnings("ignore:No tensor product accelerator"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def _as_atoms(sample: Sample) -> ase.Atoms:
    structure = sample.structure
    return ase.Atoms(
        numbers=structure.atomic_numbers,
        positions=structure.positions,
        cell=structure.cell,
        pbc=structure.pbc,
    )


@pytest.mark.parametrize("samples", [made_samples, real_samples])
def test_equals_its_ase_calculator(samples: object) -> None:
    from sevenn.calculator import SevenNetCalculator

    chosen = samples()  # type: ignore[operator]
    calculator = SevenNetCalculator("7net-0", device="cpu")
    teacher = TeacherRunner.load(TeacherSpec(model="sevennet"))
    found = teacher.predict(chosen, ("per_atom_energy", "teacher_virial"))
    references = np.array(teacher.potential.normalizer.element_references)
    row = 0
    for number, sample in enumerate(chosen):
        atoms = _as_atoms(sample)
        atoms.calc = calculator
        rows = slice(row, row := row + len(atoms))
        energy = found["teacher_energy"][number]
        assert energy == pytest.approx(atoms.get_potential_energy(), abs=1e-4)
        forces = atoms.get_forces()
        assert np.allclose(found["teacher_forces"][rows], forces, atol=1e-4)
        if atoms.pbc.all():
            virial = -atoms.get_volume() * atoms.get_stress(voigt=False)
            assert np.allclose(found["teacher_virial"][number], virial, atol=1e-3)
        each = found["per_atom_energy"][rows] + references[atoms.numbers]
        assert np.allclose(each, atoms.get_potential_energies(), atol=1e-4)


@pytest.mark.parametrize("samples", [made_samples, real_samples])
def test_keeps_the_contract(samples: object) -> None:
    potential = load_potential(TeacherSpec(model="sevennet"))
    kept = dict(check_potential(Subject(potential, samples())))  # type: ignore[operator]
    assert "reflections" not in kept  # made for rotations only
    assert {"rotation", "sum_of_atoms", "gradient_forces", "virial"} <= kept.keys()


def test_features_are_those_that_e3nn_names() -> None:
    """Scalars and l = 1 parts of the state, taken apart by e3nn's own irreps."""
    from e3nn.o3 import Irreps

    potential = load_potential(TeacherSpec(model="sevennet"))
    graphs = [potential.graph(sample) for sample in made_samples()]
    states = []
    gate = potential.model.get_submodule("3_equivariant_gate")
    handle = gate.register_forward_hook(lambda m, i, out: states.append(out["x"]))
    with torch.no_grad():
        layers = dict.fromkeys(("node_features", "vector_features"), "block4")
        found = potential.forward(graphs, tuple(layers), layers)
    handle.remove()
    irreps = Irreps(str(gate.gate.irreps_out))
    assert str(irreps) == "128x0e+64x1e+32x2e"
    scalars, vectors = (states[0][:, part] for part in irreps.slices()[:2])
    assert torch.equal(found["node_features"], scalars)
    assert torch.equal(found["vector_features"][5, :, 7], vectors[5, 21:24])


def test_store_of_real_frames_is_sound(tmp_path: Path) -> None:
    slabs = shared_file("oc20_s2ef_debug")
    molecules = shared_file("acac/train_600K.xyz.gz")
    splits = {
        "slabs": {
            "format": "extxyz",
            "path": str(slabs / "random1000100.extxyz.xz"),
            "every": 60,
            "limit": 3,
        },
        "molecules": {"format": "extxyz", "path": str(molecules), "limit": 5},
    }
    document = spec_document(splits, tmp_path / "s.zarr")
    document["splits"]["molecules"]["check_energy_kind"] = False
    document["teacher"] = {"model": "sevennet"}
    fields = ("node_features", "vector_features", "per_atom_energy")
    document["features"] = {name: {} for name in fields}
    spec = load_spec(write_spec(tmp_path / "s.yaml", document))
    assert build_store(spec)
    assert verify_store(tmp_path / "s.zarr") == []
    store = FeatureStore.open(tmp_path / "s.zarr")
    assert store.attributes["teacher"]["checkpoint_sha256"].startswith("7052cb42")
    assert store.attributes["teacher"]["graph_rule"]["cutoff"] == 5.0
    arrays = store.splits["molecules"].arrays
    assert arrays["features/node_features"].shape == (128,)
    assert arrays["features/vector_features"].shape == (3, 64)
    _train_without_sevennet(tmp_path / "s.zarr", tmp_path / "run")


def _train_without_sevennet(store: Path, run: Path) -> None:
    """In a process that cannot import what the store was made with."""
    program = (
        "import sys; sys.modules.update({'sevenn': None, 'e3nn': None}); "
        "from kd_train.cli.train import main; main()"
    )
    student = STUDENTS["painn-small-demo"].items()
    options = [f"--set=student.hyperparameters.{key}={value}" for key, value in student]
    options += ["--set=steps=2", "--set=batch_size=2", f"--out={run}"]
    options += ["--set=train_split=molecules", "--set=val_split=slabs"]
    options += ["--strategy=n2n+v2v", "--student=painn-small-demo"]
    command = [sys.executable, "-c", program, f"--cache={store}", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (run / "student.safetensors").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"options": {"pretrained": "7net-omni"}}, "not among the weights that ship"),
        ({"options": {"pretrain": "7net-0"}}, "no option 'pretrain'"),
        ({"options": {"modal": "PBE"}}, "offers no choice"),
        ({"options": {"pretrained": "7net-mf-0"}}, "offers R2SCAN, PBE"),
    ],
)
def test_wrong_options_are_named(changes: dict, said: str) -> None:
    with pytest.raises(SpecError, match=said):
        load_potential(TeacherSpec(model="sevennet", **changes))


def test_precision_that_it_lacks_is_named() -> None:
    with pytest.raises(SpecError, match=r"bfloat16.*runs in float32, tf32"):
        TeacherRunner.load(TeacherSpec(model="sevennet", precision="bfloat16"))


def test_a_file_that_could_run_code_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "evil.pth"
    torch.save({"config": Path("x"), "model_state_dict": {}}, path)
    with pytest.raises(CheckpointError, match="could run code"):
        load_potential(TeacherSpec(model="sevennet", checkpoint=str(path)))


def test_memory_estimate_bounds_the_passes() -> None:
    """A budget of one and a half structures makes passes of one."""
    potential = load_potential(TeacherSpec(model="sevennet"))
    samples = made_samples()
    need = max(potential.estimate_memory(potential.graph(sample)) for sample in samples)
    assert need > 10_000 * len(potential.graph(samples[2]).edges)
    spec = TeacherSpec(model="sevennet", max_batch_gib=1.5 * need / 2**30)
    passes: list[int] = []
    teacher = TeacherRunner.load(spec)
    model = teacher.potential.model  # type: ignore[attr-defined]
    model.register_forward_pre_hook(
        lambda m, inputs: passes.append(len(inputs[0]["num_atoms"]))
    )
    teacher.predict([samples[2]] * 3, ())
    assert passes == [1, 1, 1]
