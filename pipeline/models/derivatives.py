"""Forces and virials as derivatives of an energy, from one backward pass."""

import copy
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch_geometric.data import Data

from pipeline.errors import SpecError
from pipeline.models.network import Network
from pipeline.models.output import ModelOutput


def predict_gradients(
    network: Network, batch: Data, layers: Mapping[str, str] | None = None
) -> ModelOutput:
    """Predict energies with forces and virials that are their derivatives.

    Works for networks with a force head too, whose head is left out. ``forces`` (N, 3)
    and ``virial`` (B, 3, 3) are in the network's unit of energy (forces per Å), so all
    three become eV by the scale of the energy. Virials are minus the derivative by a
    symmetric strain: -V times the stress, and finite for molecules. ``layers`` is that
    of :meth:`Network.forward`. In training mode the derivatives can be differentiated.
    Works under ``torch.no_grad`` too; then the results carry no graph.

    Raises
    ------
    SpecError
        The network does not define `Network.predict_energies`, or its class changes
        only ``forward``.
    """
    classes = type(network).__mro__
    forward = next(c for c in classes if "forward" in vars(c))
    energies = next(c for c in classes if "predict_energies" in vars(c))
    if energies is Network or (
        forward is not energies and issubclass(forward, energies)
    ):
        raise SpecError(
            f"{forward.__name__} defines forward without predict_energies, so forces "
            "and virials cannot be derived from its energy; define predict_energies."
        )
    return differentiate(network, batch, layers or {})


def differentiate(
    network: Network, batch: Data, layers: Mapping[str, str]
) -> ModelOutput:
    """Differentiate the result of ``predict_energies``: `predict_gradients` unchecked.

    For the forward pass of networks whose forces are gradients.
    """
    tracked = torch.is_grad_enabled()
    with torch.enable_grad():
        positions = batch.positions.detach().requires_grad_()
        strain = torch.zeros_like(batch.cell).requires_grad_()
        output = network.predict_energies(_strained(batch, positions, strain), layers)
        by_positions, by_strain = torch.autograd.grad(
            output.energy.sum(),
            (positions, strain),
            create_graph=network.training and tracked,
            retain_graph=tracked,
        )
    output = replace(output, forces=-by_positions, virial=-by_strain)
    return output if tracked else output.detached()


def _strained(batch: Data, positions: Tensor, strain: Tensor) -> Data:
    """Shallow copy of ``batch`` at ``positions`` under the symmetric part of strains.

    ``strain`` (B, 3, 3) is zero, so values stay what they are, to the last bit.
    """
    symmetric = (strain + strain.mT) / 2
    strained = copy.copy(batch)
    # Not matrix products: reduced-precision modes of a GPU would round gradients.
    of_atoms = positions[:, :, None] * symmetric[batch.batch]  # (N, 3, 3)
    strained.positions = positions + of_atoms.sum(dim=1)
    of_cells = batch.cell[:, :, :, None] * symmetric[:, None]  # (B, 3, 3, 3)
    strained.cell = batch.cell + of_cells.sum(dim=2)
    return strained
