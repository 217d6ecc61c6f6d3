"""Everything needed to continue a run bit for bit, written atomically."""

import io
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import CheckpointError
from pipeline.files.atomic import write_atomically


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write tensors and plain values to ``path``, atomically."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomically(path, buffer.getvalue())


STATE = frozenset(
    {"header", "progress", "rows", "modules", "average", "optimizer", "weighting"}
)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a state of :func:`save_checkpoint` without running code of the file.

    Raises
    ------
    CheckpointError
        The file is missing, damaged, or holds more than tensors and plain values.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if set(state) != STATE:
            raise ValueError("other keys")
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} does not exist, so there is nothing to resume; omit --resume "
            "and --extend."
        ) from None
    except Exception:
        # torch raises many classes for torn and for hostile files alike.
        raise CheckpointError(
            f"{path} is damaged or is not a checkpoint of this version of kd-train; "
            "start a new run."
        ) from None
    return dict(state)
