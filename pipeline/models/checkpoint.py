"""Loads teachers and students from files, and publishes models.

Released ``.pt`` files are understood in :mod:`pipeline.models.released`; our own format
is one ``.safetensors`` file whose metadata says how to build the model.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from pipeline.errors import CheckpointError
from pipeline.files.atomic import sha256_of, write_atomically
from pipeline.models.contents import (
    ModelContents,
    Weights,
    assemble,
    empty_model,
)
from pipeline.models.network import Network
from pipeline.models.normalizer import Normalizer
from pipeline.models.released import read_released
from pipeline.models.torch_file import unwrap_tensors

_METADATA_KEY = "kd_train"
_ENTRIES = {
    "model": str,
    "hyperparameters": dict,
    "normalizer": dict,
    "provenance": dict,
}


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode with everything needed to use and to cite it.

    ``sha256`` is the hash of the file; ``provenance`` is JSON-able.
    """

    name: str
    model: Network
    normalizer: Normalizer
    sha256: str
    provenance: dict[str, Any]


def load_checkpoint(
    path: Path, *, scale_file: Path | None = None, weights: Weights = "ema"
) -> LoadedModel:
    """Model in ``path``: a ``.safetensors`` file of ours or a released ``.pt`` file.

    Nothing in the file is executed. ``scale_file`` gives the scale factors of released
    files that lack them. ``weights`` chooses between the moving average, where a
    released file has one, and the plain weights.
    """
    if not path.is_file():
        raise CheckpointError(f"There is no checkpoint file {path}.")
    if path.suffix == ".safetensors":
        contents = _read_published(path)
    else:
        contents = read_released(path, scale_file=scale_file, weights=weights)
    return LoadedModel(
        name=contents.name,
        model=assemble(contents, path),
        normalizer=contents.normalizer,
        sha256=sha256_of(path),
        provenance=contents.provenance,
    )


def save_model(
    path: Path,
    name: str,
    model: Network,
    normalizer: Normalizer,
    provenance: dict[str, Any],
) -> None:
    """Write ``model`` in single precision so that :func:`load_checkpoint` reads it.

    Scale factors are part of the state. A kill leaves the old file or the new one.

    Raises
    ------
    CheckpointError
        ``model`` has other parameters than the plain architecture of its
        hyperparameters, such as training-only ones.
    """
    _require_plain(name, model, path)
    header = {
        "model": name,
        "hyperparameters": model.hyperparameters,
        "normalizer": normalizer.to_dict(),
        "provenance": provenance,
    }
    tensors = {
        key: value.detach().to("cpu", torch.float32).contiguous()
        for key, value in model.state_dict().items()
    }
    content = safetensors.torch.save(
        tensors, metadata={_METADATA_KEY: json.dumps(header, sort_keys=True)}
    )
    write_atomically(path, content)


def _require_plain(name: str, model: Network, path: Path) -> None:
    """Refuse names and shapes that the architecture alone does not have."""
    plain = empty_model(name, model.hyperparameters, path).state_dict()
    shapes, found = (
        {key: tuple(value.shape) for key, value in state.items()}
        for state in (plain, model.state_dict())
    )
    if found != shapes:
        other = sorted(dict(found.items() ^ shapes.items()))
        raise CheckpointError(
            f"The model for {path} is not a plain {name}: it differs in "
            f"{', '.join(other[:5])}."
        )


def _read_published(path: Path) -> ModelContents:
    """Contents of a file that :func:`save_model` wrote."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a readable safetensors file; it may be incomplete."
        ) from error
    header = _header(metadata.get(_METADATA_KEY, ""), path)
    return ModelContents(
        name=header["model"],
        hyperparameters=header["hyperparameters"],
        tensors=unwrap_tensors(tensors, path),
        normalizer=Normalizer.from_dict(header["normalizer"]),
        provenance=header["provenance"],
    )


def _header(text: str, path: Path) -> dict[str, Any]:
    """Return the description in a file's metadata, its entries and types checked."""
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} does not say which model it holds; it was not written by kd-train."
        ) from error
    if not isinstance(header, dict) or any(
        not isinstance(header.get(key), kind) for key, kind in _ENTRIES.items()
    ):
        raise CheckpointError(
            f"The metadata of {path} needs the entries {', '.join(_ENTRIES)}."
        )
    return header
