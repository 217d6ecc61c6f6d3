"""Reads ``.pt`` files without running anything that is in them."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch

from pipeline.errors import CheckpointError

# What wrappers of torch (compiled, parallel, sharded, checkpointed modules) put into
# names, at any depth; no model of ours has a part that is called so.
_WRAPPERS = {
    "_orig_mod",
    "module",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
}


class _NumberType:
    """Stands in for ``numpy.dtype`` while unpickling; keeps only the type's code."""

    def __init__(self, code: str, *_: object) -> None:
        self.code = code

    def __setstate__(self, state: object) -> None:
        """Ignore layout and byte order; what is read is little-endian."""


def _number(kind: _NumberType, content: bytes) -> float | int | bool:
    """Return the Python number that a pickled numpy scalar stands for."""
    dtype = np.dtype(kind.code)
    if dtype.kind not in "biuf":
        raise UnpicklingError(f"a numpy scalar of type {kind.code!r}")
    return np.frombuffer(content, dtype.newbyteorder("<"), count=1)[0].item()


# Released files keep numpy numbers among their metrics.
_HARMLESS: list[Any] = [
    (_NumberType, "numpy.dtype"),
    (_number, "numpy.core.multiarray.scalar"),
    (_number, "numpy._core.multiarray.scalar"),
]


def _cause(error: UnpicklingError) -> str:
    """Return the forbidden name in torch's message, in brackets, if there is one."""
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    return f" ({found.group(1)})" if found else ""


def strip_wrappers(key: str) -> str:
    """Return ``key`` without what torch.compile and parallel training add."""
    return ".".join(part for part in key.split(".") if part not in _WRAPPERS)


def unwrap_tensors(tensors: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """``tensors`` by their names without the parts that wrappers add, in their order.

    Raises
    ------
    CheckpointError
        Two entries have the same name then.
    """
    plain: dict[str, Any] = {}
    for key, value in tensors.items():
        name = strip_wrappers(key)
        if name in plain:
            raise CheckpointError(
                f"{path} holds {name} twice, once more as {key}; keep one of the two."
            )
        plain[name] = value
    return plain


def load_restricted(path: Path, harmless: Sequence[Any]) -> Any:
    """Content of a ``.pt`` file, tensors on the CPU; nothing in it is run.

    ``harmless`` names types to admit beside tensors, plain containers and numbers, as
    for ``torch.serialization.safe_globals``.

    Raises
    ------
    CheckpointError
        The file is missing, damaged, or holds anything else.
    """
    try:
        with torch.serialization.safe_globals(list(harmless)):
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"There is no checkpoint file {path}.") from error
    except UnpicklingError as error:
        raise CheckpointError(
            f"{path} is refused: it is damaged or holds more than tensors and plain "
            f"values{_cause(error)}, which could run code when loaded; fetch it again "
            "or save it with tensors and plain values only."
        ) from error
    except Exception as error:  # damaged archives fail in many ways inside torch
        raise CheckpointError(
            f"{path} is not a readable torch file ({type(error).__name__}); it may be "
            "incomplete, so fetch it again."
        ) from error


def read_torch_file(path: Path) -> dict[Any, Any]:
    """Mapping stored in a ``.pt`` file, tensors on the CPU.

    Only tensors, plain containers and numbers are admitted; a file with anything else,
    or damaged, is refused with :class:`CheckpointError`.
    """
    content = load_restricted(path, _HARMLESS)
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path} holds a {type(content).__name__} instead of a mapping of names."
        )
    return content
