"""Takes the invariant and the vector channels out of states made of irreps."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Channels:
    """Columns of a state (N, D) that hold ``count`` channels of one kind.

    ``blocks`` are the first column and the number of channels of every run of them;
    each channel has ``components`` columns side by side: 1, or 3 in the order x, y, z.
    """

    blocks: tuple[tuple[int, int], ...]
    components: int

    @property
    def count(self) -> int:
        """Number of channels."""
        return sum(channels for _, channels in self.blocks)

    def of(self, state: Tensor) -> Tensor:
        """(N, count) of invariants, (N, 3, count) of vectors."""
        runs = [
            state[:, first : first + channels * self.components]
            for first, channels in self.blocks
        ]
        joined = torch.cat(runs, dim=1)
        if self.components == 1:
            return joined
        # Each run is (N, channels·3) with the components of a channel together.
        return joined.reshape(len(state), self.count, 3).transpose(1, 2)


def invariants(irreps: str) -> Channels:
    """The channels of l = 0 that mirroring leaves alone."""
    return _channels(irreps, {"0e"}, 1)


def vectors(irreps: str) -> Channels:
    """The channels of l = 1 that mirroring turns, of models with parity.

    Models without parity call all their channels even; theirs are taken instead.
    """
    with_parity = any(kind.endswith("o") for _, kind in _parse_irreps(irreps))
    return _channels(irreps, {"1o" if with_parity else "1e"}, 3)


def _channels(irreps: str, wanted: set[str], components: int) -> Channels:
    blocks = []
    column = 0
    for channels, kind in _parse_irreps(irreps):
        if kind in wanted:
            blocks.append((column, channels))
        column += channels * (2 * int(kind[:-1]) + 1)
    return Channels(tuple(blocks), components)


def _parse_irreps(irreps: str) -> list[tuple[int, str]]:
    """Pairs of ``128x0e+64x1o``, as e3nn writes irreps."""
    pairs = (part.strip().split("x") for part in irreps.split("+"))
    return [(int(channels), kind) for channels, kind in pairs]
