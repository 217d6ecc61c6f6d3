"""Objective of training: student and terms of the loss in one forward pass."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch_geometric.data import Data

from kd_train.strategies import Strategy
from kd_train.strategies.displaced import (
    Displacements,
    append_displaced,
    split_copies,
    split_output,
)
from kd_train.strategies.losses import Term, joint_mean
from kd_train.trainer.numerics import forward_precision, in_float32
from pipeline.errors import SpecError


class Objective(nn.Module):
    """Totals of all terms, so that one module holds everything that has gradients.

    ``modules`` has the ``student`` and the ``adapters`` that the terms use. Only the
    student's forward pass has the reduced ``precision``.
    """

    def __init__(
        self, modules: nn.ModuleDict, terms: Sequence[Term], precision: str
    ) -> None:
        super().__init__()
        self.learned = modules
        self._precision = precision
        self.terms = tuple(terms)
        self._sizes = [len(term.part_weights) for term in self.terms]

    def forward(self, batch: Data) -> Tensor:
        """Return summed errors of ``batch``, term by term, with gradients, (P,)."""
        found = {term.name: _displacements(term, batch) for term in self.terms}
        moves = {name: m for name, m in found.items() if m is not None}
        extended = batch
        for copies in moves.values():
            extended = append_displaced(extended, copies)
        with forward_precision(self._precision, batch.positions.device):
            output = self.learned["student"](extended)
        output, rest = split_output(in_float32(output), batch)
        totals = []
        for term in self.terms:
            if isinstance(term, Strategy) and term.name in moves:
                copies = batch.natoms[moves[term.name].graph]
                own, rest = split_copies(rest, len(copies), int(copies.sum()))
                values = term.displaced_totals(output, own, batch)
            else:
                values = term.totals(output, batch)
            totals.append(_parts(term, values))
        return torch.cat(totals)

    def counts(self, batch: Data) -> Tensor:
        """(P,) float64: what :meth:`forward` of ``batch`` is to be divided by."""
        return torch.cat([_parts(t, t.counts(batch)) for t in self.terms])

    def values(self, totals: Tensor, counts: Tensor) -> dict[str, Tensor]:
        """Return the scalar value of every term by name.

        With the ``counts`` of a whole step, a batch's share of its values.
        """
        parts = zip(
            self.terms,
            totals.split(self._sizes),
            counts.split(self._sizes),
            strict=True,
        )
        return {
            term.name: joint_mean(term.part_weights, total, count)
            for term, total, count in parts
        }


def _displacements(term: Term, batch: Data) -> Displacements | None:
    """Return the displaced copies that ``term`` needs; None for most terms."""
    return term.displacements(batch) if isinstance(term, Strategy) else None


def _parts(term: Term, values: Tensor) -> Tensor:
    """``values`` of ``term``; refuses other shapes than (P,), which plug-ins may give.

    Raises
    ------
    SpecError
        The shape is another one.
    """
    parts = len(term.part_weights)
    if values.shape != (parts,):
        raise SpecError(
            f"The strategy {term.name!r} gives sums or counts of shape "
            f"{tuple(values.shape)}; its part_weights need ({parts},)."
        )
    return values
