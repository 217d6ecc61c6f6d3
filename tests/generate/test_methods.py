"""Methods of generation against a teacher whose Hessian is known."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from ase import units

from pipeline.errors import DataError
from pipeline.generate.piece import Piece, make_piece
from pipeline.graphs.neighbors import NeighborSpec
from pipeline.spec.generate_spec import GenerateSpec
from pipeline.structure import Sample
from pipeline.teachers.runner import TeacherRunner
from tests.generate.springs import Springs, molecule, springs


def _make(
    sample: Sample, teacher: TeacherRunner | None = None, **keys: Any
) -> tuple[Piece, np.ndarray]:
    """A piece and the displacements (copies, N, 3) of its copies."""
    spec = GenerateSpec.model_validate(keys)
    piece = make_piece([sample], spec, teacher or springs(sample), None)
    assert not any(piece.reasons)
    n = len(sample.structure)
    return piece, piece.positions.reshape(-1, n, 3) - sample.structure.positions


def test_normal_modes_have_the_thermal_covariance_of_the_hessian() -> None:
    """kT H⁺ by autograd in double precision; mean energy by equipartition."""
    sample = molecule(n=4)
    count, temperature = 4000, 30.0
    piece, moves = _make(
        sample,
        method="normal_modes",
        copies=count,
        temperature=temperature,
        min_curvature=0.5,
    )
    potential = Springs(sample.structure.positions)
    places = torch.from_numpy(sample.structure.positions)
    hessian = torch.autograd.functional.hessian(potential.energy, places)
    hessian = hessian.reshape(12, 12).numpy()
    wanted = units.kB * temperature * np.linalg.pinv(hessian, rcond=1e-8)
    flat = moves.reshape(count, -1)
    found = flat.T @ flat / count
    assert np.abs(found - wanted).max() < 0.06 * np.abs(wanted).max()
    thermal = (12 - 6) / 2 * units.kB * temperature
    assert piece.energies.mean() == pytest.approx(thermal, rel=0.05)
    # Displacements of a pair are opposite, and none moves or turns the molecule.
    assert np.array_equal(moves[0::2], -moves[1::2])
    assert np.abs(moves.mean(axis=1)).max() < 1e-6
    centred = sample.structure.positions - sample.structure.positions.mean(axis=0)
    assert np.abs(np.cross(centred, moves).sum(axis=1)).max() < 1e-5


def test_soft_modes_are_floored() -> None:
    sample = molecule(n=2)
    _, moves = _make(sample, method="normal_modes", copies=400, temperature=10)
    # The one inner motion of two atoms has the curvature 2k along (1, -1)/√2.
    along = moves[:, 0] - moves[:, 1]
    assert along.std() == pytest.approx(np.sqrt(2 * units.kB * 10 / 40 / 3), rel=0.1)
    _, floored = _make(
        sample, method="normal_modes", copies=400, temperature=10, min_curvature=4000.0
    )
    assert np.abs(floored).max() < 0.2 * np.abs(moves).max()


def test_a_hessian_costs_six_passes_an_atom() -> None:
    piece, _ = _make(molecule(n=5), method="normal_modes", copies=3, temperature=10)
    assert piece.counts["passes"] == 1 + 6 * 5 + 3


def test_large_samples_move_a_group_of_neighbours() -> None:
    sample = molecule(n=9, fixed=[3])
    piece, moves = _make(
        sample,
        method="normal_modes",
        copies=4,
        temperature=10,
        max_hessian_atoms=4,
    )
    assert piece.counts["passes"] == 1 + 6 * 4 + 4
    moving = np.flatnonzero(np.abs(moves).max(axis=(0, 2)))
    assert len(moving) == 4
    assert 3 not in moving
    places = sample.structure.positions
    free = [atom for atom in range(9) if atom != 3]
    nearest = [
        {
            free[k]
            for k in np.argsort(np.linalg.norm(places[free] - places[c], axis=1))[:4]
        }
        for c in free
    ]
    assert set(moving.tolist()) in nearest


@pytest.mark.parametrize(
    "keys",
    [
        {"method": "rattle", "sigma": 0.05},
        {"method": "normal_modes", "temperature": 50},
        {"method": "md", "temperature": 50, "every": 2},
        {"method": "rattle_relax", "sigma": 0.05},
    ],
    ids=lambda keys: keys["method"],
)
def test_every_method_keeps_fixed_atoms_and_repeats_itself(
    keys: dict[str, Any],
) -> None:
    sample = molecule(n=5, fixed=[1, 2])
    piece, moves = _make(sample, copies=4, **keys)
    again, _ = _make(sample, copies=4, **keys)
    assert np.array_equal(piece.positions, again.positions)
    assert not moves[:, [1, 2]].any()
    assert (np.abs(moves[:, [0, 3, 4]]).max(axis=2) > 0).all()
    other, _ = _make(sample, copies=4, seed=1, **keys)
    assert not (piece.positions == other.positions).all()
    # Labels are the teacher's of the copies.
    potential = springs(sample).potential
    assert isinstance(potential, Springs)
    for k in range(4):
        places = torch.from_numpy(piece.positions.reshape(4, 5, 3)[k])
        assert piece.energies[k] == pytest.approx(float(potential.energy(places)))


def test_copies_do_not_depend_on_their_number_or_their_neighbours() -> None:
    first, second = molecule("a"), molecule("b", seed=3)
    for keys in ({"method": "rattle"}, {"method": "normal_modes", "temperature": 20}):
        spec = GenerateSpec.model_validate({**keys, "copies": 4})
        both = make_piece([first, second], spec, springs(first), None)
        alone = make_piece([second], spec, springs(first), None)
        more = spec.model_copy(update={"copies": 6})
        longer = make_piece([first], more, springs(first), None)
        assert np.array_equal(both.positions[16:], alone.positions)
        assert np.array_equal(longer.positions[:16], both.positions[:16])


def test_rattled_copies_are_gaussian_pairs() -> None:
    _, moves = _make(molecule(n=6), method="rattle", copies=400, sigma=0.03)
    assert moves.std() == pytest.approx(0.03, rel=0.05)
    assert np.array_equal(moves[0::2], -moves[1::2])


def test_steps_downhill_lower_the_energy() -> None:
    sample = molecule(n=6)
    walked, _ = _make(sample, method="rattle_relax", copies=6, sigma=0.1, relax_steps=5)
    rattled, _ = _make(sample, method="rattle", copies=6, sigma=0.1)
    assert walked.energies.mean() < 0.5 * rattled.energies.mean()
    assert walked.counts["passes"] == 1 + 6 * 5 + 6


def test_dynamics_reach_the_temperature() -> None:
    """Potential energy of a harmonic molecule is half of (3N - 6) kT on average."""
    sample = molecule(n=4)
    piece, _ = _make(
        sample,
        method="md",
        temperature=60,
        copies=150,
        every=10,
        steps=2000,
        timestep=2.0,
        friction=0.05,
    )
    thermal = (12 - 6) / 2 * units.kB * 60
    assert piece.energies.mean() == pytest.approx(thermal, rel=0.35)
    assert piece.counts["passes"] <= 1 + 2000 + 150 + 2


def test_outliers_are_drawn_again() -> None:
    sample = molecule(n=6)
    wild, _ = _make(sample, method="rattle", copies=40, sigma=0.1, max_force=1e6)
    largest = _largest_forces(wild)
    limit = float(np.quantile(largest, 0.7))
    tame, _ = _make(sample, method="rattle", copies=40, sigma=0.1, max_force=limit)
    assert _largest_forces(tame).max() <= limit
    assert tame.counts["force"] >= 10
    kept = largest <= limit
    assert np.array_equal(
        wild.positions.reshape(40, -1)[kept], tame.positions.reshape(40, -1)[kept]
    )
    rise = float(np.quantile(wild.energies, 0.7)) / 6
    low, _ = _make(
        sample,
        method="rattle",
        copies=40,
        sigma=0.1,
        max_force=1e6,
        max_energy_rise=rise,
    )
    assert low.energies.max() <= 6 * rise
    assert low.counts["energy"] >= 10


def _largest_forces(piece: Piece) -> np.ndarray:
    norms = np.linalg.norm(piece.forces.astype(np.float64), axis=1)
    return norms.reshape(len(piece.reasons), -1).max(axis=1)


def test_copies_that_are_always_refused_carry_the_reason() -> None:
    sample = molecule(n=3)
    spec = GenerateSpec(method="rattle", copies=2, sigma=0.1, max_force=1e-6)
    piece = make_piece([sample], spec, springs(sample), None)
    assert all("eV/Å" in str(reason) for reason in piece.reasons)
    assert piece.counts["force"] == 20
    close = GenerateSpec(method="rattle", copies=2, sigma=0.01)
    piece = make_piece([sample], close, springs(sample), 3.0)
    assert all("too close" in str(reason) for reason in piece.reasons)
    # No pass is spent on them.
    assert piece.counts["passes"] == 1


class _FreeSprings(Springs):
    graph_rule = NeighborSpec(3.0, 100, symmetric=False)


def test_strain_is_symmetric_and_moves_cell_and_atoms_alike() -> None:
    sample = molecule(n=4)
    cell = np.array([[7.0, 0, 0], [1.0, 8.0, 0], [0.5, 0.3, 9.0]])
    structure = replace(sample.structure, cell=cell, pbc=np.ones(3, np.bool_))
    periodic = replace(sample, structure=structure)
    teacher = springs(sample)
    teacher = replace(teacher, potential=_FreeSprings(structure.positions))
    spec = GenerateSpec(method="rattle", copies=30, sigma=0.001, cell_sigma=0.02)
    piece = make_piece([periodic], spec, teacher, None)
    strains = np.linalg.inv(cell) @ piece.cells - np.eye(3)
    assert np.abs(strains - strains.swapaxes(1, 2)).max() < 1e-6
    assert strains[:, range(3), range(3)].std() == pytest.approx(0.02, rel=0.3)
    places = piece.positions.reshape(30, 4, 3)
    fractional = places @ np.linalg.inv(piece.cells)
    wanted = structure.positions @ np.linalg.inv(cell)
    assert np.abs(fractional - wanted).max() < 0.001
    with pytest.raises(DataError, match=r"'a' is not periodic.*cell_sigma"):
        make_piece([sample], spec, springs(sample), None)


def test_samples_without_free_atoms_are_named() -> None:
    held = molecule(n=2, fixed=[0, 1])
    with pytest.raises(DataError, match=r"'a' has fixed atoms only"):
        make_piece([held], GenerateSpec(method="rattle"), springs(held), None)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"method": "shake"}, "rattle"),
        ({"method": "rattle", "temperature": 300}, "temperature is for method normal"),
        ({"method": "md", "sigma": 0.1}, "sigma is for method rattle and rattle_relax"),
        ({"method": "md", "temperature": 0}, "greater than 0"),
        ({"method": "normal_modes", "temperature": -5}, "greater than 0"),
        ({"method": "rattle", "copies": 0}, "greater than or equal to 1"),
        ({"method": "md", "copies": 8, "every": 10, "steps": 70}, "need 80"),
        ({"method": "rattle", "cell_sigma": 0}, "greater than 0"),
    ],
)
def test_keys_that_do_not_fit_are_refused(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        GenerateSpec.model_validate(keys)
