"""A small, untrained potential of fairchem beside its own calculator."""

from pathlib import Path
from typing import Any

import ase
import numpy as np
import pytest
import torch

from pipeline.build.build import build_store
from pipeline.errors import SpecError
from pipeline.spec.cache_spec import load_spec
from pipeline.spec.sections import TeacherSpec
from pipeline.store.verify import verify_store
from pipeline.teachers.checks import Subject, check_potential
from pipeline.teachers.fairchem import load
from tests.frames import collision_frames, write_frames
from tests.stores import spec_document, write_spec
from tests.teachers.shared_data import made_samples

CORE = "fairchem.core"
UMA = f"{CORE}.models.uma"
NORMALIZATION = f"{CORE}.modules.normalization"
pytestmark = pytest.mark.filterwarnings("ignore")


def _task(name: str, level: str, dim: int, references: object) -> dict[str, Any]:
    return {
        "_target_": f"{CORE}.units.mlip_unit.mlip_unit.Task",
        "name": f"oc20_{name}",
        "level": level,
        "property": name,
        "out_spec": {
            "_target_": f"{CORE}.units.mlip_unit.mlip_unit.OutputSpec",
            "dim": [dim],
            "dtype": "float32",
        },
        "normalizer": {
            "_target_": f"{NORMALIZATION}.normalizer.Normalizer",
            "mean": 0.0,
            "rmsd": 1.5,
        },
        "element_references": references,
        "datasets": ["oc20"],
    }


def _model() -> dict[str, Any]:
    """UMA's backbone without experts, two layers of 8 channels, gradient forces."""
    return {
        "_target_": f"{CORE}.models.base.HydraModel",
        "pass_through_head_outputs": True,
        "backbone": {
            "model": f"{UMA}.escn_md.eSCNMDBackbone",
            "sphere_channels": 8,
            "edge_channels": 8,
            "hidden_channels": 8,
            "num_layers": 2,
            "num_distance_basis": 16,
            "cutoff": 5.0,
            "direct_forces": False,
            "regress_forces": True,
            "always_use_pbc": False,
            "dataset_mapping": {"oc20": "oc20"},
            "ff_type": "spectral",
        },
        "heads": {
            "energy_and_forces": {
                "module": f"{UMA}.escn_moe.DatasetSpecificSingleHeadWrapper",
                "dataset_names": ["oc20"],
                "head_cls": f"{UMA}.escn_md.MLP_EFS_Head",
                "head_kwargs": {"wrap_property": False},
            }
        },
    }


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("fairchem.core")
    import hydra
    from fairchem.core.units.mlip_unit.api.inference import MLIPInferenceCheckpoint

    torch.manual_seed(5)
    model = hydra.utils.instantiate(_model())
    state = model.state_dict()
    references = {
        "_target_": f"{NORMALIZATION}.element_references.ElementReferences",
        "element_references": {
            "_target_": "torch.DoubleTensor",
            "_args_": [[0.1 * number for number in range(101)]],
        },
    }
    path = tmp_path_factory.mktemp("fairchem") / "small.pt"
    content = MLIPInferenceCheckpoint(
        model_config=_model(),
        model_state_dict=state,
        ema_state_dict={
            "n_averaged": torch.tensor(1),
            **{f"module.{name}": value for name, value in state.items()},
        },
        tasks_config=[
            _task("energy", "system", 1, references),
            _task("forces", "atom", 3, None),
        ],
    )
    torch.save(content, path)
    return path


def _spec(path: Path, **options: object) -> TeacherSpec:
    options = {"trust_pickle": True, "task": "oc20"} | options
    return TeacherSpec(model="fairchem", checkpoint=str(path), options=options)


def test_equals_its_ase_calculator(checkpoint: Path) -> None:
    """Their calculator finds the neighbours itself."""
    from fairchem.core import FAIRChemCalculator
    from fairchem.core.units.mlip_unit import InferenceSettings, load_predict_unit

    unit = load_predict_unit(
        checkpoint, inference_settings=InferenceSettings(), device="cpu"
    )
    calculator = FAIRChemCalculator(unit, task_name="oc20")
    potential = load(_spec(checkpoint))
    samples = made_samples()
    with torch.no_grad():
        graphs = [potential.graph(sample) for sample in samples]
        found = potential.forward(graphs, ("per_atom_energy",), {})
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
        assert np.allclose(found["teacher_forces"][rows].detach(), forces, atol=1e-5)


def test_keeps_the_contract(checkpoint: Path) -> None:
    potential = load(_spec(checkpoint))
    assert potential.available_fields["vector_features"].layers == {
        "block1": 8,
        "block2": 8,
    }
    kept = dict(check_potential(Subject(potential, made_samples())))
    assert {"rotation", "sum_of_atoms", "gradient_forces"} <= kept.keys()
    assert "reflections" not in kept


def test_store_is_sound(checkpoint: Path, tmp_path: Path) -> None:
    data = write_frames(tmp_path / "d.extxyz", collision_frames(6))
    document = spec_document({"train": data}, tmp_path / "s.zarr")
    document["teacher"] = _spec(checkpoint).model_dump(exclude_defaults=True)
    fields = ("node_features", "vector_features", "per_atom_energy")
    document["features"] = {name: {} for name in fields}
    assert build_store(load_spec(write_spec(tmp_path / "s.yaml", document)))
    assert verify_store(tmp_path / "s.zarr") == []


def test_unknown_tasks_are_named(checkpoint: Path) -> None:
    with pytest.raises(SpecError, match="this model offers oc20"):
        load(_spec(checkpoint, task="omat"))


def test_no_file_is_opened_without_trust(tmp_path: Path) -> None:
    """Needs no fairchem: the refusal comes before anything is imported or read."""
    with pytest.raises(SpecError, match=r"teacher\.options\.trust_pickle=true"):
        load(_spec(tmp_path / "any.pt", trust_pickle=False))
