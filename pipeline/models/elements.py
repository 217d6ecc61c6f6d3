"""Checks that a model knows the elements it is asked about."""

from collections.abc import Container

import numpy as np
import numpy.typing as npt

from pipeline.errors import DataError


def check_elements(
    atomic_numbers: npt.ArrayLike,
    elements: Container[int],
    sample_ids: npt.ArrayLike | None = None,
) -> None:
    """Raise :class:`DataError` for the first atom whose element is not in ``elements``.

    ``sample_ids`` (N,) names each atom's sample, for the message.
    """
    numbers = np.asarray(atomic_numbers)
    unknown = [int(z) for z in np.unique(numbers) if int(z) not in elements]
    if not unknown:
        return
    atom = int(np.flatnonzero(np.isin(numbers, unknown))[0])
    where = "" if sample_ids is None else f" {str(np.asarray(sample_ids)[atom])!r}"
    raise DataError(
        f"Sample{where} holds an atom with atomic number {int(numbers[atom])}, which "
        "this model cannot embed; leave such samples out or use a model with more "
        "elements."
    )
