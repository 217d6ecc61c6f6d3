"""MACE, small and untrained, beside its own ASE calculator and under the contract."""

import os
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
from pipeline.store.verify import verify_store
from pipeline.teachers.checks import Subject, check_potential
from pipeline.teachers.mace import Mace, load
from tests.frames import collision_frames, write_frames
from tests.stores import spec_document, write_spec
from tests.teachers.shared_data import made_samples

UNSAFE = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


@pytest.fixture(scope="module")
def mace_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers, two heads, 8 scalars and 8 vectors; float32."""
    pytest.importorskip("mace")  # before e3nn 0.4, which only it can import
    from e3nn import o3
    from mace import modules

    os.environ.pop(UNSAFE, None)
    interaction = modules.interaction_classes["RealAgnosticResidualInteractionBlock"]
    torch.manual_seed(4)
    model = modules.ScaleShiftMACE(
        r_max=4.0,
        num_bessel=6,
        num_polynomial_cutoff=5,
        max_ell=2,
        interaction_cls=interaction,
        interaction_cls_first=interaction,
        num_interactions=2,
        num_elements=3,
        hidden_irreps=o3.Irreps("8x0e+8x1o"),
        MLP_irreps=o3.Irreps("8x0e"),
        atomic_energies=np.array([[-1.0, -3.0, -5.0], [-2.0, -4.0, -6.0]]),
        avg_num_neighbors=8,
        atomic_numbers=[1, 6, 8],
        correlation=2,
        gate=torch.nn.functional.silu,
        atomic_inter_scale=[1.0, 1.5],
        atomic_inter_shift=[0.0, 0.2],
        heads=["first", "second"],
    )
    path = tmp_path_factory.mktemp("mace") / "small.model"
    torch.save(model, path)
    return path


def _spec(path: Path, **options: object) -> TeacherSpec:
    options = {"trust_pickle": True} | options
    return TeacherSpec(model="mace", checkpoint=str(path), options=options)


pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("head", ["first", "second"])
def test_equals_its_ase_calculator(mace_file: Path, head: str) -> None:
    from mace.calculators import MACECalculator

    potential = load(_spec(mace_file, head=head))
    calculator = MACECalculator(
        models=[potential.model], device="cpu", default_dtype="float32", head=head
    )
    samples = made_samples()
    graphs = [potential.graph(sample) for sample in samples]
    with torch.no_grad():
        found = potential.forward(graphs, ("node_features", "per_atom_energy"), {})
    row = 0
    for number, sample in enumerate(samples):
        structure = sample.structure
        atoms = ase.Atoms(
            numbers=structure.atomic_numbers,
            positions=structure.positions,
            cell=structure.cell,
            pbc=structure.pbc,
        )
        atoms.calc = calculator
        rows = slice(row, row := row + len(atoms))
        energy = float(found["teacher_energy"][number])
        assert energy == pytest.approx(atoms.get_potential_energy(), abs=1e-4)
        forces = atoms.get_forces()
        assert np.abs(forces).max() > 1e-3
        assert np.allclose(found["teacher_forces"][rows], forces, atol=1e-5)
        if atoms.pbc.all():
            virial = -atoms.get_volume() * atoms.get_stress(voigt=False)
            assert np.allclose(found["teacher_virial"][number], virial, atol=1e-4)
        # Their descriptors: the scalars of all layers, side by side.
        descriptors = calculator.get_descriptors(atoms, invariants_only=True)
        features = found["node_features"][rows].numpy()
        assert np.allclose(features, descriptors[:, 8:], atol=1e-5)


def test_keeps_the_contract(mace_file: Path) -> None:
    potential = load(_spec(mace_file))
    assert isinstance(potential, Mace)
    assert potential.available_fields["vector_features"].layers == {"block1": 8}
    kept = dict(check_potential(Subject(potential, made_samples())))
    assert {"reflections", "sum_of_atoms", "gradient_forces", "virial"} <= kept.keys()


def test_store_is_sound(mace_file: Path, tmp_path: Path) -> None:
    data = write_frames(tmp_path / "d.extxyz", collision_frames(6))
    document = spec_document({"train": data}, tmp_path / "s.zarr")
    document["teacher"] = _spec(mace_file).model_dump(exclude_defaults=True)
    fields = ("node_features", "vector_features", "per_atom_energy")
    document["features"] = {name: {} for name in fields}
    assert build_store(load_spec(write_spec(tmp_path / "s.yaml", document)))
    assert verify_store(tmp_path / "s.zarr") == []


def test_torch_still_loads_with_care(mace_file: Path) -> None:
    """In a process of its own, which imports mace for the first time."""
    program = (
        "import os, sys\n"
        "from pipeline.spec.sections import TeacherSpec\n"
        "from pipeline.teachers.mace import load\n"
        "load(TeacherSpec.model_validate_json(sys.argv[1]))\n"
        f"sys.exit(int({UNSAFE!r} in os.environ))"
    )
    spec = _spec(mace_file).model_dump_json()
    plain = {name: text for name, text in os.environ.items() if name != UNSAFE}
    command = [sys.executable, "-c", program, spec]
    assert subprocess.run(command, env=plain).returncode == 0


def test_files_need_their_owner_s_word_and_a_known_head(mace_file: Path) -> None:
    with pytest.raises(SpecError, match="has first, second"):
        load(_spec(mace_file, head="third"))
    other = mace_file.with_name("linear.model")
    torch.save(torch.nn.Linear(1, 1), other)
    with pytest.raises(CheckpointError, match="holds a Linear, not a MACE"):
        load(_spec(other))


def test_no_file_is_opened_without_trust(tmp_path: Path) -> None:
    """Needs no mace: the refusal comes before anything is imported or read."""
    with pytest.raises(SpecError, match=r"teacher\.options\.trust_pickle=true"):
        load(_spec(tmp_path / "any.model", trust_pickle=False))
    with pytest.raises(SpecError, match=r"teacher\.checkpoint is missing"):
        load(TeacherSpec(model="mace", options={"trust_pickle": True}))
