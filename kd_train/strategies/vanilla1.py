"""Vanilla 1: the teacher's energies and forces as additional labels."""

from torch import Tensor
from torch_geometric.data import Data

from kd_train.strategies.base import Setting, Strategy
from kd_train.strategies.losses import OutputError, teacher_labels
from pipeline.models.output import ModelOutput


class Vanilla1(Strategy):
    """α_E·MAE(E_s, E_t) + α_F·mean‖F_s − F_t‖₂ over free atoms (Eq. 7).

    With virials of the teacher also α_W·mean‖W_s − W_t‖/N.
    """

    name = "vanilla1"
    fields = ("teacher_energy", "teacher_forces")
    default_weight = 1.0

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._error = OutputError(
            self.name, teacher_labels, setting.normalizer, setting.loss
        )
        self.part_weights = self._error.part_weights

    def counts(self, batch: Data) -> Tensor:
        """Return the number of errors of every part, shape (P,)."""
        return self._error.counts(batch)

    def totals(self, output: ModelOutput, batch: Data) -> Tensor:
        """Return the errors of every part on the student's normalised scale, (P,)."""
        return self._error.totals(output, batch)
