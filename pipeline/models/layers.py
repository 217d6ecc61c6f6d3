"""Building blocks that several models share: bases, activations, geometry."""

import math

import torch
from torch import Tensor, nn
from torch_geometric.data import Data

from pipeline.errors import SpecError

# Gaussian tails below 1e-20 become exact zeros. They change nothing, but left alone
# they reach subnormal numbers, on which processors are up to 100 times slower.
NEGLIGIBLE = 1e-20
_LOWEST_EXPONENT = -50.0
_LOG_2 = 0.6931471824645996  # rounded to single precision, as released models use it


class ScaledSiLU(nn.Module):
    """``silu(x) / 0.6``, which keeps the variance of normal inputs near one."""

    def forward(self, x: Tensor) -> Tensor:
        """Activation of each entry."""
        return nn.functional.silu(x) * (1 / 0.6)


class ShiftedSoftplus(nn.Module):
    """``softplus(x) - log 2``, zero at zero."""

    def forward(self, x: Tensor) -> Tensor:
        """Activation of each entry."""
        return nn.functional.softplus(x) - _LOG_2


class ScaleFactor(nn.Module):
    """Multiplies by one stored number that is never trained."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.scale_factor = nn.Parameter(torch.tensor(factor), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Product of ``x`` and the factor."""
        return x * self.scale_factor


class GaussianSmearing(nn.Module):
    """Gaussians on evenly spaced centres from 0 to ``stop``.

    The centres are stored. The width is their exact distance with ``exact_width``, else
    that of the first two as stored, which is rounded; released models do either.
    """

    offset: Tensor

    def __init__(
        self, stop: float, num_gaussians: int, *, exact_width: bool = False
    ) -> None:
        super().__init__()
        if num_gaussians < 2:
            raise SpecError("A Gaussian basis needs at least 2 functions, not 1.")
        self.width = stop / (num_gaussians - 1) if exact_width else None
        self.register_buffer("offset", torch.linspace(0.0, stop, num_gaussians))

    def deviation(self) -> float:
        """Width of the Gaussians as a number, which waits for the device."""
        return self.width or float(self.offset[1] - self.offset[0])

    def forward(self, distance: Tensor) -> Tensor:
        """Basis (E, K) of distances (E,) in the unit of the centres."""
        width = self.width or self.offset[1] - self.offset[0]
        deviation = (distance[:, None] - self.offset) / width  # (E, K)
        exponent = (-0.5 * deviation.square()).clamp_min(_LOWEST_EXPONENT)
        return nn.functional.threshold(torch.exp(exponent), NEGLIGIBLE, 0.0)


class RadialBasis(nn.Module):
    """Gaussians of ``distance / cutoff`` under a smooth envelope."""

    def __init__(
        self,
        num_radial: int,
        cutoff: float,
        exponent: int,
        *,
        exact_width: bool = False,
    ) -> None:
        super().__init__()
        self.cutoff = cutoff
        self.exponent = exponent
        self.rbf = GaussianSmearing(1.0, num_radial, exact_width=exact_width)

    def forward(self, distance: Tensor) -> Tensor:
        """Basis (E, K) of distances (E,) in Å."""
        return self.envelope(distance)[:, None] * self.rbf(distance / self.cutoff)

    def envelope(self, distance: Tensor) -> Tensor:
        """Envelope (E,) of distances (E,) in Å."""
        return polynomial_envelope(distance / self.cutoff, self.exponent)


class AtomEmbedding(nn.Module):
    """A learned row per element, ``Z = 1`` first."""

    def __init__(self, num_elements: int, width: int) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(num_elements, width)
        nn.init.uniform_(self.embeddings.weight, -math.sqrt(3), math.sqrt(3))

    def forward(self, atomic_numbers: Tensor) -> Tensor:
        """Rows (N, H) of atoms (N,)."""
        return self.embeddings(atomic_numbers - 1)


def full_precision(x: Tensor) -> torch.autocast:
    """Context that keeps an output head on ``x``'s device out of reduced precision.

    Heads cost little, and rounding there is the rounding of the results.
    """
    return torch.autocast(x.device.type, enabled=False)


def vector_norm(vectors: Tensor) -> Tensor:
    """Lengths (N, ...) of vectors (N, 3, ...), with zero gradient at length zero."""
    squared = vectors.square().sum(dim=1)
    return squared.clamp_min(torch.finfo(squared.dtype).tiny).sqrt()


def polynomial_envelope(x: Tensor, exponent: int) -> Tensor:
    """Value that falls from 1 at 0 to 0 at 1 with two vanishing derivatives there."""
    p = exponent
    a = -(p + 1) * (p + 2) / 2
    b = p * (p + 2)
    c = -p * (p + 1) / 2
    value = 1 + x.pow(p) * (a + x * (b + x * c))
    return torch.where(x < 1, value, torch.zeros_like(x))


def cosine_cutoff(distance: Tensor, cutoff: float) -> Tensor:
    """``(cos(pi d / cutoff) + 1) / 2`` per edge; (E,) -> (E,)."""
    return 0.5 * (torch.cos(distance * (math.pi / cutoff)) + 1)


def edge_vectors(batch: Data, positions: Tensor, prefix: str = "") -> Tensor:
    """Vectors from each target to its source image, (E, 3) in Å.

    ``prefix`` names a side graph of the batch, such as ``ae_``.
    """
    source, target = batch[f"{prefix}edge_index"]
    cells = batch.cell[batch.batch[target]]  # (E, 3, 3)
    # Not a matrix product: reduced-precision modes of a GPU would round the shift.
    shift = (batch[f"{prefix}cell_offsets"][:, :, None] * cells).sum(dim=1)
    return positions[source] - positions[target] + shift


def reset_linear(module: nn.Module) -> None:
    """Draw Xavier-uniform weights and zero biases for every linear layer inside."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def envelope_exponent(envelope: dict[str, object]) -> int:
    """Exponent of a polynomial envelope as configurations write it (5 if unsaid)."""
    exponent = envelope.get("exponent", 5)
    if (
        envelope.get("name") != "polynomial"
        or not isinstance(exponent, int)
        or exponent < 1
    ):
        raise SpecError(
            f"Envelope {envelope} is not supported; use "
            '{"name": "polynomial", "exponent": 5}.'
        )
    return exponent
