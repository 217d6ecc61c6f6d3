"""Trust in files of weights, and hashes of weights; knows no plug-in's format."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy._core.multiarray import _reconstruct
from torch import nn

from pipeline.errors import SpecError
from pipeline.models.torch_file import load_restricted
from pipeline.spec.sections import TeacherSpec

# Arrays of numbers, by the names that numpy 1 and 2 gave their parts.
NUMPY_ARRAYS: list[Any] = [
    np.ndarray,
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("float32", "float64", "int32", "int64")),
    (_reconstruct, "numpy.core.multiarray._reconstruct"),
    (_reconstruct, "numpy._core.multiarray._reconstruct"),
]


def refuse_code(path: Path, harmless: Sequence[Any] = ()) -> None:
    """Raise unless unpickling ``path`` can only make tensors and plain values.

    For files that a plug-in's own loader unpickles without such a check. ``harmless``
    names further types, as for ``torch.serialization.safe_globals``.

    Raises
    ------
    CheckpointError
        The file is missing, damaged, or holds something that could run code.
    """
    load_restricted(path, harmless)


def require_trust(spec: TeacherSpec) -> None:
    """Raise SpecError unless the spec's owner says that its file may run code."""
    if spec.options.get("trust_pickle") is not True:
        raise SpecError(
            f"teacher.checkpoint: {spec.model} files are pickled objects, which can "
            "run code when loaded; if you trust the source of this file, set "
            "teacher.options.trust_pickle=true."
        )


def check_options(spec: TeacherSpec, known: Mapping[str, Any]) -> dict[str, Any]:
    """The options of ``spec`` over their defaults ``known``.

    Raises
    ------
    SpecError
        An option is unknown, or a key is set that only our own models have.
    """
    if spec.scale_file is not None:
        raise SpecError(
            f"teacher.scale_file: {spec.model} has no scale factors; remove the key."
        )
    unknown = sorted(spec.options.keys() - known.keys())
    if unknown:
        raise SpecError(
            f"teacher.options: {spec.model} has no option {unknown[0]!r} (known: "
            f"{', '.join(sorted(known)) or 'none'})."
        )
    return dict(known) | spec.options


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of a model's parameters and buffers.

    For models that come without a file; takes seconds for a billion numbers.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, torch.Tensor):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
