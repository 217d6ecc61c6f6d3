"""Units between the network and eV."""

import json

import pytest
import torch

from pipeline.errors import CheckpointError
from pipeline.models.normalizer import NUM_REFERENCES, Normalizer

REFERENCES = tuple(-0.5 * z for z in range(NUM_REFERENCES))
NUMBERS = torch.tensor([1, 8, 1, 6])
BATCH = torch.tensor([0, 0, 0, 1])


def test_energy_is_scaled_then_shifted_then_referenced():
    normalizer = Normalizer(-0.75, 2.5, 3.0, REFERENCES)
    network = torch.tensor([2.0, -1.0])
    physical = normalizer.denormalize_energy(network, NUMBERS, BATCH)
    assert physical.dtype == torch.float64
    assert physical.tolist() == [2.0 * 2.5 - 0.75 - 5.0, -2.5 - 0.75 - 3.0]
    back = normalizer.normalize_energy(physical, NUMBERS, BATCH)
    assert back.tolist() == network.tolist()


def test_forces_are_only_scaled():
    normalizer = Normalizer(force_std=4.0, energy_std=7.0, energy_mean=1.0)
    forces = torch.tensor([[2.0, 0.0, -6.0]])
    assert normalizer.denormalize_forces(forces).tolist() == [[8.0, 0.0, -24.0]]
    assert normalizer.normalize_forces(forces).tolist() == [[0.5, 0.0, -1.5]]


def test_large_energies_survive_in_double_precision():
    normalizer = Normalizer(energy_mean=-80_000.0, element_references=REFERENCES)
    energy = torch.tensor([-80_000.001], dtype=torch.float64)
    zeros = torch.zeros(1, dtype=torch.long)
    network = normalizer.normalize_energy(energy, torch.tensor([2]), zeros)
    assert network.item() == pytest.approx(0.999, abs=1e-9)


def test_written_form_round_trips():
    normalizer = Normalizer(-0.1, 0.3, 0.7, REFERENCES)
    text = json.dumps(normalizer.to_dict())
    assert Normalizer.from_dict(json.loads(text)) == normalizer


GOOD = Normalizer().to_dict()


@pytest.mark.parametrize(
    "change",
    [
        {"energy_std": 0.0},
        {"force_std": -1.0},
        {"energy_mean": float("nan")},
        {"energy_std": float("inf")},
        {"element_references": [0.0] * 5},
        {"element_references": 3},
        {"element_references": ["x"] * NUM_REFERENCES},
        {"energy_mean": None},
        {"force_mean": 1.0},
    ],
)
def test_unusable_values_are_refused(change):
    with pytest.raises(CheckpointError, match="normaliser"):
        Normalizer.from_dict({**GOOD, **change})
