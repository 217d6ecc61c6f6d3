"""Vanilla 2: the teacher's energy of every atom."""

from torch import Tensor
from torch_geometric.data import Data

from kd_train.strategies.base import Strategy, count_values
from pipeline.models.output import ModelOutput


class Vanilla2(Strategy):
    """Mean over atoms of |e_s − e_t| (Eq. 8), on the normalised scale."""

    name = "vanilla2"
    fields = ("per_atom_energy",)
    default_weight = 100.0
    trains = ("energy",)

    def counts(self, batch: Data) -> Tensor:
        """Return the number of atoms, shape (1,)."""
        return count_values(batch.per_atom_energy)

    def totals(self, output: ModelOutput, batch: Data) -> Tensor:
        """Return the per-atom energy error of the batch, shape (1,)."""
        target = batch.per_atom_energy / self.setting.normalizer.energy_std
        return (output.per_atom_energy - target).abs().sum().reshape(1)
