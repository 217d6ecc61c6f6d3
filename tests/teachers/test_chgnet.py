"""CHGNet beside its own graphs and calculator, and under the contract."""

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
from tests.stores import spec_document, write_spec
from tests.teachers.shared_data import made_samples, real_samples, shared_file

pytest.importorskip("chgnet")
pytestmark = pytest.mark.filterwarnings("ignore")
FIELDS = ("node_features", "edge_features", "edge_to_node_features", "per_atom_energy")


def _as_atoms(sample: Sample) -> ase.Atoms:
    """Periodic, as CHGNet wants it: molecules in a box that keeps images apart."""
    structure = sample.structure
    atoms = ase.Atoms(
        numbers=structure.atomic_numbers,
        positions=structure.positions,
        cell=structure.cell,
        pbc=structure.pbc,
    )
    if not structure.pbc.any():
        atoms.center(vacuum=10.0)
        atoms.pbc = True
    return atoms


@pytest.mark.parametrize("samples", [made_samples, real_samples])
def test_equals_its_ase_calculator(samples: object) -> None:
    from chgnet.model.dynamics import CHGNetCalculator

    chosen = samples()  # type: ignore[operator]
    calculator = CHGNetCalculator(use_device="cpu", return_site_energies=True)
    teacher = TeacherRunner.load(TeacherSpec(model="chgnet"))
    found = teacher.predict(chosen, (*FIELDS, "teacher_virial"))
    references = np.array(teacher.potential.normalizer.element_references)
    row = 0
    for number, sample in enumerate(chosen):
        atoms = _as_atoms(sample)
        atoms.calc = calculator
        rows = slice(row, row := row + len(atoms))
        energy = found["teacher_energy"][number]
        assert energy == pytest.approx(atoms.get_potential_energy(), abs=1e-4)
        forces = atoms.get_forces()
        assert np.allclose(found["teacher_forces"][rows], forces, atol=2e-3)
        if atoms.pbc.all():
            virial = -atoms.get_volume() * atoms.get_stress(voigt=False)
            assert np.allclose(found["teacher_virial"][number], virial, atol=2e-3)
        each = found["per_atom_energy"][rows] + references[atoms.numbers]
        assert np.allclose(each, calculator.results["energies"], atol=1e-4)


def test_bond_states_lie_on_the_right_edges() -> None:
    """Against CHGNet's own graph of a crystal, edge by edge."""
    from pymatgen.io.ase import AseAtomsAdaptor

    sample = made_samples()[2]
    potential = load_potential(TeacherSpec(model="chgnet"))
    graph = potential.graph(sample)
    with torch.no_grad():
        found = potential.forward([graph], ("edge_features",), {})["edge_features"]
    model = potential.model
    theirs = model.graph_converter(AseAtomsAdaptor.get_structure(_as_atoms(sample)))
    states: list[torch.Tensor] = []
    handle = model.bond_conv_layers[-1].register_forward_hook(
        lambda m, i, out: states.append(out)
    )
    model([theirs], task="e")
    handle.remove()
    expected = states[0][theirs.directed2undirected.long()]
    # They wrap positions into the cell, so their images are counted from elsewhere.
    wrapped = np.floor(
        sample.structure.positions @ np.linalg.inv(sample.structure.cell)
    )
    places = {}
    for number, (target, source) in enumerate(theirs.atom_graph.tolist()):
        image = theirs.neighbor_image[number].numpy()
        shift = np.rint(image - wrapped[source] + wrapped[target]).astype(int)
        places[(source, target, *shift)] = number
    edges = graph.edges
    rows = np.column_stack((edges.edge_index.T, edges.cell_offsets))
    assert len(places) == len(rows)
    order = [places[tuple(row)] for row in rows.tolist()]
    torch.testing.assert_close(found, expected[order], atol=1e-4, rtol=1e-4)
    assert found.std(dim=0).max() > 0.05


def test_sums_over_edges_end_in_their_targets() -> None:
    teacher = TeacherRunner.load(TeacherSpec(model="chgnet"))
    samples = made_samples()
    found = teacher.predict(samples, FIELDS)
    first = edge = 0
    sums = np.zeros_like(found["edge_to_node_features"])
    for sample in samples:
        for _ in range(teacher.count_edges(sample.structure)):
            target = found["edge_index"][edge, 1]
            sums[first + target] += found["edge_features"][edge]
            edge += 1
        first += len(sample.structure)
    assert edge == len(found["edge_features"])
    assert np.allclose(found["edge_to_node_features"], sums, atol=1e-3)


@pytest.mark.parametrize("samples", [made_samples, real_samples])
def test_keeps_the_contract(samples: object) -> None:
    potential = load_potential(TeacherSpec(model="chgnet"))
    # Angles near 180 degrees amplify rounding.
    subject = Subject(potential, samples(), tolerance=5e-3)  # type: ignore[operator]
    kept = dict(check_potential(subject))
    assert {"reflections", "sum_of_atoms", "gradient_forces"} <= kept.keys()


def test_structures_without_angles_are_served_alone_and_in_company() -> None:
    """Atoms farther apart than CHGNet's bonds that have angles."""
    sample = made_samples()[0]
    positions = sample.structure.positions * 4.2
    structure = sample.structure
    spread = type(structure)(
        structure.atomic_numbers,
        positions,
        structure.cell,
        structure.pbc,
        structure.tags,
        structure.fixed,
    )
    lonely = Sample("spread", spread, sample.energy, sample.forces)
    teacher = TeacherRunner.load(TeacherSpec(model="chgnet"))
    alone = teacher.predict([lonely], FIELDS)
    company = teacher.predict([lonely, sample], FIELDS)
    for name in FIELDS:
        count = len(alone[name])
        assert np.allclose(company[name][:count], alone[name], atol=1e-4), name


@pytest.mark.parametrize("name", ["0.2.0", "r2scan"])
def test_other_weights_of_the_wheel_work(name: str) -> None:
    spec = TeacherSpec(model="chgnet", options={"pretrained": name})
    subject = Subject(load_potential(spec), made_samples()[1:], tolerance=5e-3)
    assert dict(check_potential(subject))


def test_store_of_real_frames_is_sound(tmp_path: Path) -> None:
    slabs = shared_file("oc20_s2ef_debug/random1000100.extxyz.xz")
    molecules = shared_file("acac/train_600K.xyz.gz")
    splits = {
        "slabs": {"format": "extxyz", "path": str(slabs), "every": 60, "limit": 3},
        "molecules": {
            "format": "extxyz",
            "path": str(molecules),
            "limit": 5,
            "check_energy_kind": False,
        },
    }
    document = spec_document(splits, tmp_path / "s.zarr")
    document["teacher"] = {"model": "chgnet"}
    document["features"] = {name: {} for name in FIELDS}
    assert build_store(load_spec(write_spec(tmp_path / "s.yaml", document)))
    assert verify_store(tmp_path / "s.zarr") == []
    split = FeatureStore.open(tmp_path / "s.zarr").splits["slabs"]
    assert split.arrays["edges/edge_features"].shape == (64,)
    assert split.n_edges.sum() > 2000


def test_wrong_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="'0.9' is not among"):
        load_potential(TeacherSpec(model="chgnet", options={"pretrained": "0.9"}))
    path = tmp_path / "evil.pth"
    torch.save({"model": Path("x")}, path)
    with pytest.raises(CheckpointError, match="could run code"):
        load_potential(TeacherSpec(model="chgnet", checkpoint=str(path)))
