"""Finds the strategy of a name: a built-in one or that of a plug-in."""

import math
import re
from functools import cache
from pkgutil import resolve_name

from kd_train.config.sections import DistillConfig
from kd_train.config.strategy_names import BUILT_IN, STRATEGIES
from kd_train.strategies.base import Strategy
from pipeline.fields import FIELDS

# Names are columns of metrics.csv and parts of file names.
_NAME = re.compile("[A-Za-z][A-Za-z0-9_]*")
_TAKEN = ("l0", "loss")


@cache
def load_strategy(name: str) -> type[Strategy]:
    """Import the class of the strategy ``name``.

    Raises
    ------
    SpecError
        There is no such strategy, its plug-in cannot be imported, or the class of the
        plug-in breaks the contract of a strategy.
    """
    if name in BUILT_IN:
        STRATEGIES.check(name)
        built_in: type[Strategy] = resolve_name(BUILT_IN[name])
        return built_in
    found = STRATEGIES.load(name)
    if (reason := _violation(name, found)) is not None:
        raise STRATEGIES.refuse(name, reason)
    return found


def term_weight(config: DistillConfig, name: str) -> float:
    """Return the weight of the term ``name``: the configured one or its default."""
    weight = config.weight(name)
    return float(load_strategy(name).default_weight if weight is None else weight)


def _violation(name: str, found: object) -> str | None:
    """Return how ``found`` breaks the contract of a strategy; None if it keeps it."""
    if not (isinstance(found, type) and issubclass(found, Strategy)):
        return "is not a subclass of kd_train.strategies.Strategy"
    if not _NAME.fullmatch(name) or name in _TAKEN:
        return "needs another name, of letters, digits and _, and not l0 or loss"
    if getattr(found, "name", None) != name:
        return f"has name = {getattr(found, 'name', None)!r}, not its entry point's"
    fields = getattr(found, "fields", None)
    if not isinstance(fields, tuple) or not fields:
        return "needs fields, a tuple with the names of the store's fields it reads"
    unknown = [field for field in fields if field not in FIELDS]
    if unknown:
        return f"reads the field {unknown[0]!r}, which no store has"
    weight = found.default_weight
    if not isinstance(weight, int | float) or not 0 <= weight < math.inf:
        return f"has default_weight = {weight!r}, not a number that is at least 0"
    return None
