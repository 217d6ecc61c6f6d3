"""Vanilla 1: the teacher's energies and forces as additional labels."""

from torch import Tensor
from torch_geometric.data import Data

from kd_train.losses import output_loss
from kd_train.strategies.base import Strategy
from pipeline.models.output import ModelOutput


class Vanilla1(Strategy):
    """α_E·MAE(E_s, E_t) + α_F·mean‖F_s − F_t‖₂ over free atoms (Eq. 7)."""

    name = "vanilla1"
    fields = ("teacher_energy", "teacher_forces")

    def loss(self, output: ModelOutput, batch: Data) -> Tensor:
        """Output error of the batch, on the student's normalised scale."""
        return output_loss(
            output,
            batch,
            batch.teacher_energy,
            batch.teacher_forces,
            self.setting.normalizer,
            self.setting.loss,
        )
