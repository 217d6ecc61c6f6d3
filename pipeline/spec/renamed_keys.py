"""Earlier names of keys and values: read as the names of today, with a warning."""

import logging
from collections.abc import Mapping
from typing import Any, get_args, get_origin

from pydantic import BaseModel

from pipeline.errors import SpecError
from pipeline.spec.closed_model import ClosedModel, is_model, without_none

log = logging.getLogger("pipeline.spec.renamed_keys")


def rename_keys(
    model: type[BaseModel],
    document: Mapping[str, Any],
    where: str,
    *,
    warn: bool = True,
    above: str = "",
) -> dict[str, Any]:
    """Return ``document`` with the names that keys and values of ``model`` have today.

    Parameters
    ----------
    model
        Its ``earlier_keys``, ``earlier_values`` and ``key_aliases`` are the names, and
        those of the models that it contains.
    document
        Keys may be dotted; ``document`` itself stays as it is.
    where
        The file or option that messages begin with.
    warn
        Whether an earlier name gives a warning; false for what a program wrote itself.
    above
        The dotted name of ``document`` in the file, with a dot at its end.

    Raises
    ------
    SpecError
        One key is there by two names.
    """
    renamed: dict[str, Any] = {}
    spelled: dict[str, str] = {}
    for key, value in document.items():
        name, old, inside = _current_name(model, key)
        if name in renamed:
            raise SpecError(
                f"{where}: {above}{spelled[name]} and {above}{key} are two names of "
                f"one key; keep {above}{name} alone."
            )
        if old and warn:
            _warn(where, f"the key {above}{key}", f"{above}{name}")
        spelled[name] = key
        renamed[name] = _rename_values(inside, value, where, warn, f"{above}{name}.")
        today = _earlier_values(model, name).get(value) if _is_text(value) else None
        if today is not None:
            renamed[name] = today
            if warn:
                _warn(where, f"{above}{name}: {value}", f"{above}{name}: {today}")
    return renamed


def rename_setting(model: type[BaseModel], dotted: str, where: str) -> str:
    """Return the name of today of the key ``dotted``; warn if it is an earlier one."""
    name, old, _ = _current_name(model, dotted)
    if old:
        _warn(where, f"the key {dotted}", name)
    return name


def _warn(where: str, old: str, new: str) -> None:
    log.warning("%s: %s is now called %s; the old name still works", where, old, new)


def _current_name(model: Any, dotted: Any) -> tuple[Any, bool, Any]:
    """The name of today, whether an earlier one was used, and what the key contains."""
    if not isinstance(dotted, str):
        return dotted, False, None
    names, old, level = [], False, model
    for key in dotted.split("."):
        name = key
        if _is_closed(level):
            name = level.earlier_keys.get(key, key)
            old |= name != key
            name = level.key_aliases.get(name, name)
        names.append(name)
        level = _inside(level, name)
    return ".".join(names), old, level


def _inside(level: Any, name: str) -> Any:
    """What key ``name`` of a model or a mapping contains, as an annotation."""
    if is_model(level):
        field = level.model_fields.get(name)
        return None if field is None else without_none(field.annotation)
    return get_args(level)[1] if get_origin(level) is dict else None


def _rename_values(inside: Any, value: Any, where: str, warn: bool, above: str) -> Any:
    """``value`` of a key that contains ``inside``, which may have keys itself."""
    if not isinstance(value, Mapping):
        return value
    if is_model(inside):
        return rename_keys(inside, value, where, warn=warn, above=above)
    if get_origin(inside) is dict:
        (_, part) = get_args(inside)
        return {
            key: _rename_values(part, item, where, warn, f"{above}{key}.")
            for key, item in value.items()
        }
    return value


def _earlier_values(model: Any, dotted: Any) -> Mapping[str, str]:
    """Earlier values of the key ``dotted``, which has the name of today."""
    if not isinstance(dotted, str):
        return {}
    *parents, last = dotted.split(".")
    for name in parents:
        model = _inside(model, name)
    return model.earlier_values.get(last, {}) if _is_closed(model) else {}


def _is_closed(level: Any) -> bool:
    return is_model(level) and issubclass(level, ClosedModel)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)
