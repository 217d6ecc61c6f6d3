"""Vanilla 1: the teacher's energies and forces as additional labels."""

from torch import Tensor
from torch_geometric.data import Data

from kd_train.losses import energy_mae, force_l2
from kd_train.strategies.base import Strategy
from pipeline.models.output import ModelOutput


class Vanilla1(Strategy):
    """α_E·MAE(E_s, E_t) + α_F·mean‖F_s − F_t‖₂ over free atoms (Eq. 7)."""

    name = "vanilla1"
    fields = ("teacher_energy", "teacher_forces")

    def loss(self, output: ModelOutput, batch: Data) -> Tensor:
        """Output error of the batch, on the student's normalised scale."""
        normalizer, weights = self.setting.normalizer, self.setting.loss
        energy = normalizer.normalize_energy(
            batch.teacher_energy, batch.atomic_numbers, batch.batch
        ).to(output.energy.dtype)
        forces = normalizer.normalize_forces(batch.teacher_forces)
        assert output.forces is not None
        return weights.energy_weight * energy_mae(
            output.energy, energy
        ) + weights.force_weight * force_l2(output.forces, forces, batch.fixed)
