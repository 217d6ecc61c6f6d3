"""Columns of the force Jacobian: the student's against the teacher's."""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch_geometric.data import Data

from kd_train.strategies.base import Strategy
from kd_train.strategies.displaced import Displacements
from pipeline.models.output import ModelOutput

_NO_COLUMN = -1


class _Choice(NamedTuple):
    """Columns that a step compares: D graphs, the column and its place in the store.

    ``graph``, ``column`` and ``slot`` are (D,) int64.
    """

    graph: Tensor
    column: Tensor
    slot: Tensor


class ForceJacobian(Strategy):
    """Mean over atoms of ‖(c_s − c_t) / σ_F‖₂, c a column of ∂F/∂x, in 1/Å.

    Each step takes one stored column of each of a ``fraction`` of the structures. The
    student's column is (F(x + h e_q) − F(x)) / h, or a central difference, of graphs
    that join the forward pass: no second derivative is needed. Columns are compared
    with columns. Rows differ from them if forces are no gradient.

    The loader calls `prepare`, which chooses structures and columns.
    """

    name = "jacobian"
    fields = ("force_jacobian", "force_jacobian_column")
    default_weight = 50.0

    def prepare(self, batch: Data, draw: Sequence[int]) -> None:
        """Choose columns of ``batch``; ``draw`` identifies the batch in its run.

        Adds ``jacobian_choice``, a (3, D) int64 tensor of graph, column and slot.
        """
        columns = batch.force_jacobian_column.numpy()[
            :, : self.setting.jacobian.columns
        ]
        text = " ".join(map(str, ("jacobian", self.setting.seed, *draw)))
        digest = hashlib.blake2b(text.encode(), digest_size=32).digest()
        random = np.random.RandomState(np.frombuffer(digest, "<u4"))
        usable = np.flatnonzero((columns != _NO_COLUMN).any(axis=1))
        count = round(self.setting.jacobian.fraction * len(columns))
        graphs = np.sort(random.permutation(usable)[: max(count, 1)])
        slots = np.array(
            [random.choice(np.flatnonzero(columns[g] != _NO_COLUMN)) for g in graphs],
            np.int64,
        )
        chosen = columns[graphs, slots]
        batch.jacobian_choice = torch.from_numpy(
            np.stack((graphs, chosen, slots)).astype(np.int64)
        )

    def displacements(self, batch: Data) -> Displacements:
        """Return the copies that the student's columns need: one or two for each."""
        graph, column, _ = batch.jacobian_choice
        step = self.setting.jacobian.step
        shift = torch.full(graph.shape, step, device=graph.device)
        if self.setting.jacobian.difference == "one_sided":
            return Displacements(graph, column, shift)
        return Displacements(
            torch.cat((graph, graph)),
            torch.cat((column, column)),
            torch.cat((shift, -shift)),
        )

    def counts(self, batch: Data) -> Tensor:
        """Return the number of free atoms in the chosen structures, shape (1,)."""
        rows, _ = _atoms(batch, _Choice(*batch.jacobian_choice))
        return (~batch.fixed[rows]).sum().double().reshape(1)

    def totals(self, output: ModelOutput, batch: Data) -> Tensor:
        """Raise, because the term needs the outputs of displaced copies."""
        raise NotImplementedError("the objective calls displaced_totals")

    def displaced_totals(
        self, output: ModelOutput, displaced: ModelOutput, batch: Data
    ) -> Tensor:
        """Return the summed length of column errors over free atoms, shape (1,).

        Parameters
        ----------
        output
            Output of the structures of ``batch``.
        displaced
            Output of the copies of `displacements`, in their order.
        """
        choice = _Choice(*batch.jacobian_choice)
        rows, owner = _atoms(batch, choice)
        assert output.forces is not None
        assert displaced.forces is not None
        step, ahead = self.setting.jacobian.step, displaced.forces
        if self.setting.jacobian.difference == "one_sided":
            slope = (ahead - output.forces[rows]) / step
        else:
            ahead, behind = displaced.forces.split(len(rows))
            slope = (ahead - behind) / (2 * step)
        target = batch.force_jacobian[rows, choice.slot[owner]]
        error = slope - target / self.setting.normalizer.force_std
        length = torch.linalg.vector_norm(error, dim=1)
        return torch.where(batch.fixed[rows], 0, length).sum().reshape(1)


def _atoms(batch: Data, choice: _Choice) -> tuple[Tensor, Tensor]:
    """Return the rows of atoms of the chosen graphs, and the place of each graph."""
    first = batch.natoms.cumsum(0) - batch.natoms
    counts = batch.natoms[choice.graph]
    owner = torch.repeat_interleave(
        torch.arange(len(counts), device=counts.device), counts
    )
    within = torch.arange(len(owner), device=counts.device)
    within = within - (counts.cumsum(0) - counts)[owner]
    return first[choice.graph][owner] + within, owner
