"""What any model file holds once it is read, and the model that is made of it."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pipeline.errors import CheckpointError, SpecError
from pipeline.models.network import Network
from pipeline.models.normalizer import Normalizer
from pipeline.models.zoo import build_model

Weights = Literal["ema", "raw"]


@dataclass(frozen=True)
class ModelContents:
    """Everything a file says about a model; nothing in it is checked yet."""

    name: str
    hyperparameters: dict[str, Any]
    tensors: dict[str, Tensor]
    normalizer: Normalizer
    provenance: dict[str, Any]


def empty_model(name: str, hyperparameters: Mapping[str, Any], path: Path) -> Network:
    """Model without storage for its weights; draws no random numbers."""
    try:
        with torch.device("meta"):
            return build_model(name, hyperparameters)
    except SpecError as error:
        raise CheckpointError(
            f"The model in {path} cannot be built: {error}"
        ) from error


def assemble(contents: ModelContents, path: Path) -> Network:
    """Model in evaluation mode with the file's weights in single precision.

    Names and shapes must fit exactly; what is missing or left over is named.
    """
    model = empty_model(contents.name, contents.hyperparameters, path)
    expected = model.state_dict()
    _refuse_other_names(contents.tensors, expected, path)
    for name, value in contents.tensors.items():
        if value.shape != expected[name].shape:
            raise CheckpointError(
                f"{name} in {path} has shape {tuple(value.shape)}, but this model "
                f"needs {tuple(expected[name].shape)}."
            )
        if value.is_complex() or value.is_meta or value.layout is not torch.strided:
            raise CheckpointError(f"{name} in {path} is not a dense array of numbers.")
        if not torch.isfinite(value).all():
            raise CheckpointError(
                f"{name} in {path} holds numbers that are not finite."
            )
    model.load_state_dict(
        {
            name: value.detach().to(torch.float32, copy=True)
            for name, value in contents.tensors.items()
        },
        assign=True,
    )
    return model.eval()


def _refuse_other_names(
    found: Collection[str], expected: Collection[str], path: Path
) -> None:
    """Raise an error that lists missing and unknown entries, if there are any."""
    known, there = set(expected), set(found)
    parts = [
        f"{what} {len(names)} entries ({', '.join(names[:5])}"
        f"{', ...' if len(names) > 5 else ''})"
        for what, names in (
            ("lacks", [name for name in expected if name not in there]),
            ("has unknown", [name for name in found if name not in known]),
        )
        if names
    ]
    if parts:
        raise CheckpointError(
            f"{path} {' and '.join(parts)}; it is incomplete, or its configuration "
            "belongs to another model."
        )
