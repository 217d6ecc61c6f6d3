"""Linear CKA between the layers of two models over the atoms of a split, streaming.

Atoms pass once, in batches. Only sums in the space of features stay in memory.
"""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch_geometric.data import Data

from kd_train.evaluation.load_student import known_elements
from kd_train.loader.choose_split import choose_split
from kd_train.loader.data import CachedSamples
from kd_train.loader.prefetch import move_to_device, pin_batches, prefetch
from kd_train.loader.sampler import Positions, ordered_within
from kd_train.loader.split import Split
from pipeline.errors import SpecError
from pipeline.fields import FIELDS
from pipeline.models.checkpoint import load_checkpoint
from pipeline.store.reader import FeatureStore

STORED = "teacher"
# Relative deviation below which a feature is constant up to rounding.
_CONSTANT = 1e-12


class LinearCKA:
    """Linear centred kernel alignment of all layers of two models.

    For centred features X (N, C) and Y (N, D) of the same atoms it is
    ‖XᵀY‖² / (‖XᵀX‖ ‖YᵀY‖) in Frobenius norms (Kornblith et al. 2019, arXiv:1905.00414,
    eq. 5), which equals HSIC of the N×N Gram matrices in linear time. Products are
    centred batch by batch and combined with the shift between means (Chan et al.), so
    that a large common offset costs no digits.
    """

    def __init__(self) -> None:
        self.count = 0
        self._widths: tuple[list[int], list[int]] = ([], [])
        self._means: list[Tensor] = []
        self._cross = torch.empty(0)
        self._own: tuple[list[Tensor], list[Tensor]] = ([], [])

    def add(self, first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
        """Take in atoms: features (N, C) of every layer of both models, same order."""
        sides = [[layer.double() for layer in side] for side in (first, second)]
        rows = [torch.cat(side, dim=1) for side in sides]
        if not self.count:
            self._start(sides, rows)
        new = len(rows[0])
        total = self.count + new
        means = [side.mean(dim=0) for side in rows]
        shifts = [mean - old for mean, old in zip(means, self._means, strict=True)]
        centred = [side - mean for side, mean in zip(rows, means, strict=True)]
        weight = self.count * new / total
        self._cross += centred[0].T @ centred[1] + weight * torch.outer(*shifts)
        for own, widths, side, shift in zip(
            self._own, self._widths, centred, shifts, strict=True
        ):
            parts = zip(own, side.split(widths, 1), shift.split(widths), strict=True)
            for product, block, delta in parts:
                product += block.T @ block + weight * torch.outer(delta, delta)
        for mean, shift in zip(self._means, shifts, strict=True):
            mean += shift * (new / total)
        self.count = total

    def result(self) -> npt.NDArray[np.float64]:
        """Return CKA (layers of first, layers of second), NaN for constant layers."""
        norms = [
            torch.stack([self._norm(k, side) for k in range(len(self._widths[side]))])
            for side in (0, 1)
        ]
        blocks = [
            row.split(self._widths[1], 1) for row in self._cross.split(self._widths[0])
        ]
        cross = torch.stack(
            [torch.stack([block.square().sum() for block in row]) for row in blocks]
        )
        return (cross / torch.outer(*norms)).cpu().numpy()

    def _start(self, sides: Sequence[Sequence[Tensor]], rows: Sequence[Tensor]) -> None:
        """Set all sums to zero, in the right sizes."""
        zeros = rows[0].new_zeros
        widths = [[layer.shape[1] for layer in side] for side in sides]
        self._widths = (widths[0], widths[1])
        self._means = [zeros(sum(side)) for side in widths]
        self._cross = zeros(sum(widths[0]), sum(widths[1]))
        own = [[zeros(width, width) for width in side] for side in widths]
        self._own = (own[0], own[1])

    def _norm(self, layer: int, side: int) -> Tensor:
        """Return the norm of a layer's centred self-product, NaN if it is constant."""
        product = self._own[side][layer]
        mean = self._means[side].split(self._widths[side])[layer]
        rounding = self.count * mean.square().sum() * _CONSTANT**2
        norm = torch.linalg.matrix_norm(product)
        return torch.where(product.trace() > rounding, norm, torch.nan)


@dataclass(frozen=True)
class Similarity:
    """CKA (layers of first, layers of second) and what it was taken of."""

    first: str
    second: str
    first_layers: tuple[str, ...]
    second_layers: tuple[str, ...]
    matrix: npt.NDArray[np.float64]
    split: str
    samples: int
    atoms: int
    fingerprint: str


class Side(Protocol):
    """A model, or the store in its place, that gives node features by layer."""

    title: str

    def load(self, positions: Positions) -> Data:
        """Load the input from which the features of these samples are computed.

        Several threads may call it at the same time.
        """

    def states(self, batch: Data) -> dict[str, Tensor]:
        """Return features (N, C) by layer, atoms in the order of the samples."""


class ModelSide:
    """A student or teacher from a file, with its own graphs."""

    def __init__(
        self, path: Path, split: Split, device: torch.device, any_element: bool
    ) -> None:
        loaded = load_checkpoint(_model_file(path))
        self.title = f"{path.resolve().name} ({loaded.name})"
        self._model = loaded.model.to(device).eval()
        rule = loaded.model.graph_rule
        elements = known_elements(loaded, "--any-element", any_element)
        # Every sample comes once.
        samples = CachedSamples(split, rule, elements, edge_cache_bytes=0)
        self.load = pin_batches(samples.batch, device)
        self._device = device

    def states(self, batch: Data) -> dict[str, Tensor]:
        """Return features (N, C) after every layer of the model."""
        return self._model.node_states(move_to_device(batch, self._device))


class StoredSide:
    """The stored node features of the teacher."""

    title = "teacher (stored)"

    def __init__(self, split: Split, device: torch.device) -> None:
        self._path = FIELDS["node_features"].path
        if self._path not in split.arrays:
            raise SpecError(
                f"Split {split.name!r} has no node_features of the teacher; choose "
                "another --split, or name the teacher's checkpoint as a model."
            )
        self._split = split
        self._device = device

    def load(self, positions: Positions) -> Data:
        """Read the stored features, decoded."""
        rows = self._split.read(positions, [self._path])[self._path]
        return Data(node_features=torch.from_numpy(rows))

    def states(self, batch: Data) -> dict[str, Tensor]:
        """Return the single layer that the spec of the store chose."""
        return {"node_features": batch.node_features.to(self._device)}


def compare_models(
    models: tuple[str, str],
    store: FeatureStore,
    split_name: str,
    device: torch.device,
    *,
    limit: int | None = None,
    batch_atoms: int = 2000,
    any_element: bool = False,
) -> Similarity:
    """Compute CKA between all layers of two models over the atoms of a split.

    A model is a run folder, a model file, or ``teacher`` for the features in the store.
    ``limit`` takes the first samples in storage order, which is random; with
    ``any_element`` a model may be given elements that its training data lacked.

    Raises
    ------
    SpecError
        There is no such split, or ``teacher`` is named and there are no features.
    CheckpointError
        A file is not a model.
    DataError
        A sample has no neighbours or an element that a model does not know.
    """
    split = choose_split(store, split_name)
    count = len(split) if limit is None else min(limit, len(split))
    sides = [_side(model, split, device, any_element) for model in models]
    batches = ordered_within(split.n_atoms[:count], batch_atoms)
    sums = LinearCKA()
    layers: list[tuple[str, ...]] = []
    loaded = prefetch(lambda chosen: [side.load(chosen) for side in sides], batches)
    with closing(loaded) as stream, torch.no_grad():
        for parts in stream:
            pairs = zip(sides, parts, strict=True)
            states = [side.states(part) for side, part in pairs]
            layers = [tuple(found) for found in states]
            sums.add(*(list(found.values()) for found in states))
    return Similarity(
        first=sides[0].title,
        second=sides[1].title,
        first_layers=layers[0],
        second_layers=layers[1],
        matrix=sums.result(),
        split=split.name,
        samples=count,
        atoms=sums.count,
        fingerprint=store.fingerprint,
    )


def _side(model: str, split: Split, device: torch.device, any_element: bool) -> Side:
    if model == STORED:
        return StoredSide(split, device)
    return ModelSide(Path(model), split, device, any_element)


def _model_file(path: Path) -> Path:
    """Return the model file: the student of a run folder, or ``path`` itself."""
    if not path.is_dir():
        return path
    if (path / "student.safetensors").is_file():
        return path / "student.safetensors"
    raise SpecError(
        f"{path} has no student.safetensors; name a run folder with at least one "
        "validation, a model file, or teacher for the features in the store."
    )
