"""Finds a model's fixed scale factors, wherever a released file keeps them."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.errors import CheckpointError
from pipeline.files.strict_json import parse_json
from pipeline.models.torch_file import read_torch_file, strip_wrappers

SUFFIX = ".scale_factor"
# Sources may differ by the rounding of numbers written as text.
_TOLERANCE = 1e-5


def read_scale_file(path: Path) -> dict[str, float]:
    """Factors by module name from a ``.pt`` or ``.json`` file."""
    if path.suffix != ".json":
        return as_factors(read_torch_file(path), str(path))
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"There is no scale file {path}.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"Scale file {path} is not readable JSON ({error})."
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"Scale file {path} is not a mapping of names to factors."
        )
    content.pop("comment", None)
    return as_factors(content, str(path))


def as_factors(values: Mapping[Any, Any], origin: str) -> dict[str, float]:
    """Plain numbers by module name, prefixes and suffix removed."""
    factors = {}
    for key, value in values.items():
        name = strip_wrappers(str(key)).removesuffix(SUFFIX)
        if isinstance(value, Tensor) and value.numel() == 1:
            value = value.item()
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise CheckpointError(f"Scale factor {name} in {origin} is not a number.")
        if not math.isfinite(value):
            raise CheckpointError(f"Scale factor {name} in {origin} is {value}.")
        factors[name] = float(value)
    return factors


def merge_scale_factors(
    names: Iterable[str], sources: Mapping[str, Mapping[str, float]], path: Path
) -> dict[str, float]:
    """One factor for each of ``names`` from all ``sources`` (origin -> factors).

    Zero means "never fitted": another source wins over it, and alone it stands for
    one. Sources that disagree, and names that no source has, are errors.
    """
    merged = {}
    missing = []
    for name in names:
        found = {o: factors[name] for o, factors in sources.items() if name in factors}
        fitted = {origin: value for origin, value in found.items() if value != 0}
        if not found:
            missing.append(name)
        elif not fitted:
            merged[name] = 1.0
        else:
            _refuse_conflict(name, fitted, path)
            merged[name] = next(iter(fitted.values()))
    if missing:
        raise CheckpointError(
            f"{path} lacks {len(missing)} scale factors, such as {missing[0]}, "
            "without which its numbers are wrong; name the file that holds them "
            "in the option teacher.scale_file."
        )
    return merged


def _refuse_conflict(name: str, fitted: Mapping[str, float], path: Path) -> None:
    """Raise if the sources of one factor differ by more than rounding."""
    low, high = min(fitted.values()), max(fitted.values())
    if not math.isclose(low, high, rel_tol=_TOLERANCE):
        values = ", ".join(f"{value} in {origin}" for origin, value in fitted.items())
        raise CheckpointError(
            f"Scale factor {name} of {path} has different values: {values}; leave out "
            "the option teacher.scale_file or name the file that belongs to this model."
        )
