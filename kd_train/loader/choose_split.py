"""The splits of a store that a run names, and the fields that a split holds."""

from collections.abc import Sequence

from kd_train.loader.concat import ConcatSplit
from kd_train.loader.data import read_paths
from kd_train.loader.split import Split
from pipeline.errors import SpecError
from pipeline.fields import FIELDS
from pipeline.store.reader import FeatureStore


def choose_split(store: FeatureStore, choice: str, fields: Sequence[str] = ()) -> Split:
    """Return the split ``choice``, or several joined with +, alike in ``fields``.

    Raises
    ------
    SpecError
        The store has no such split, or the splits cannot be joined.
    """
    names = choice.split("+")
    for name in names:
        if name not in store.splits:
            known = ", ".join(store.splits)
            raise SpecError(f"The store has no split {name!r} (known: {known}).")
    if len(names) == 1:
        return store.splits[choice]
    parts = [store.splits[name] for name in names]
    return ConcatSplit(parts, tuple(read_paths(fields).values()))


def stored_widths(split: Split) -> dict[str, int]:
    """Return the width of every stored field, 0 for fields without channels."""
    return {
        name: split.arrays[field.path].shape[field.shape.index(None)]
        if None in field.shape
        else 0
        for name, field in FIELDS.items()
        if field.path in split.arrays
    }
