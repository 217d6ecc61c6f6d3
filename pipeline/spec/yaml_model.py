"""YAML documents as closed pydantic models: dotted overrides, one-sentence errors."""

import difflib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from pipeline.errors import SpecError
from pipeline.files.strict_json import parse_json
from pipeline.spec.closed_model import ClosedModel, is_model, without_none
from pipeline.spec.plain_yaml import RepeatedKey, parse_value, parse_yaml
from pipeline.spec.renamed_keys import rename_keys, rename_setting

_VARIABLE = re.compile(r"\$\{(\w+)\}|\$(\w+)")
_WANTED = {
    "model_type": "must be a map of keys",
    "dict_type": "must be a map of keys",
    "tuple_type": "must be a list",
}
# Characters of a value in a message.
_SHOWN = 200


Document = TypeVar("Document", bound=ClosedModel)


def read_yaml(path: Path) -> dict[str, Any]:
    """Mapping at the top of a YAML file; plain data only, no YAML tags.

    Raises
    ------
    SpecError
        The file cannot be read, is no YAML, has a key twice, or holds no mapping.
    """
    try:
        loaded = parse_yaml(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise SpecError(f"{path} does not exist.") from None
    except OSError as error:
        raise SpecError(f"{path} cannot be read: {error.strerror}.") from None
    except RepeatedKey as error:
        raise SpecError(f"{path}: {error.problem}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SpecError(f"{path} is not valid YAML: {_reason(error)}.") from None
    if not isinstance(loaded, dict):
        raise SpecError(f"{path} must be a mapping of keys, but it is {loaded!r:.60}.")
    return loaded


def _reason(error: Exception) -> str:
    """What is wrong with YAML, where, and what helps against the usual causes."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return " ".join(str(error).split())
    reason = f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"  # type: ignore[attr-defined]
    if "'\\t'" in reason:
        return f"{reason}; use spaces"
    if "cannot start any token" in reason or "not allowed here" in reason:
        return f"{reason}; put text that is meant as it is in quotes"
    return reason


def read_json_map(path: Path) -> dict[str, Any]:
    """Mapping at the top of a JSON file; errors of `read_yaml`."""
    try:
        loaded = parse_json(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise SpecError(f"{path} cannot be read as JSON ({error}).") from None
    if not isinstance(loaded, dict):
        raise SpecError(f"{path} must be a mapping of keys, but it is {loaded!r:.60}.")
    return loaded


def apply_overrides(
    document: dict[str, Any],
    overrides: Iterable[str],
    model: type[BaseModel] | None = None,
) -> None:
    """Set ``a.b.c=value`` entries in place; `parse_value` reads the values.

    ``document`` has the names of today, and so have the keys that are set: ``model``
    knows the earlier names of both.
    """
    for override in overrides:
        dotted, equals, text = override.partition("=")
        if model is not None:
            dotted = rename_setting(model, dotted, "--set")
        *parents, last = dotted.split(".")
        if not equals or not all((*parents, last)):
            raise SpecError(f"--set {override!r} must look like key.subkey=value.")
        target = document
        for key in parents:
            if target.get(key) is None:
                target[key] = {}
            target = target[key]
            if not isinstance(target, dict):
                raise SpecError(
                    f"--set {override!r}: {key!r} is not a mapping of keys."
                )
        try:
            target[last] = parse_value(text)
        except RepeatedKey as error:
            raise SpecError(f"--set {override!r}: {error.problem}.") from None
        except yaml.YAMLError as error:
            reason = _reason(error)
            if text.strip().startswith(("[", "{", '"', "'")):
                reason = (
                    "the value is not valid YAML; put text that begins with a bracket "
                    "or a quotation mark in quotes of its own"
                )
            raise SpecError(f"--set {_shown(override)}: {reason}.") from None


def validate(model: type[Document], data: Mapping[str, Any], where: str) -> Document:
    """Read ``data`` as ``model``; the first fault becomes one SpecError sentence.

    Earlier names of keys are read with a warning.
    """
    try:
        if isinstance(data, Mapping):
            data = rename_keys(model, data, where)
        return model.model_validate(data)
    except ValidationError as failure:
        error = failure.errors()[0]
    place = ".".join(map(str, error["loc"])) if error["loc"] else "the document"
    if error["type"] == "extra_forbidden":
        key = str(error["loc"][-1])
        known = _known_keys(model, error["loc"][:-1])
        raise SpecError(f"{where}: unknown key {place!r}{nearest(key, known)}.")
    if error["type"] == "missing":
        raise SpecError(f"{where}: key {place!r} is missing.")
    if error["loc"][-1:] == ("[key]",):
        key = error["input"]
        parent = ".".join(map(str, error["loc"][:-2]))
        raise SpecError(
            f"{where}: {parent}: the key {key!r} must be text; put it in quotes."
        )
    raise SpecError(f"{where}: {place}: {_message(error)}.")


def _message(error: Mapping[str, Any]) -> str:
    """What pydantic's ``error`` is, what was found, and a remedy that is known."""
    kind, value = error["type"], error["input"]
    message = error["msg"].removeprefix("Value error, ").rstrip(".")
    if value is None:
        return f"{message}, found nothing (null); leave the key out for its default"
    if kind == "string_type" and isinstance(value, int | float):
        message = "the value must be text, so put it in quotes"
    elif kind in _WANTED:
        message = _WANTED[kind]
    if isinstance(value, dict):
        return message if kind == "value_error" else f"{message}, found a map"
    return f"{message}, found {_shown(value)}"


def _shown(value: Any) -> str:
    """``value`` as Python writes it, cut where it is long."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def nearest(word: str, known: Iterable[str]) -> str:
    """The nearest of ``known``, or all of them, to end an error sentence with."""
    choices = sorted(known)
    close = difflib.get_close_matches(word, choices, n=1)
    if close:
        return f", the nearest known one is {close[0]!r}"
    return f" (known: {', '.join(choices)})" if choices else ""


def expand_path(text: str, folder: Path, key: str) -> Path:
    """``text`` with environment variables filled in, relative to ``folder``.

    Raises
    ------
    SpecError
        A variable is not set, or a home folder not known; names the key.
    """
    path = Path(expand_text(text, key))
    try:
        return (folder / path.expanduser()).resolve()
    except RuntimeError:
        raise SpecError(
            f"{key} is {text!r}, but this home folder does not exist; write the full "
            "path."
        ) from None


def expand_text(text: str, key: str) -> str:
    """``text`` with environment variables filled in; errors of `expand_path`."""

    def value(match: re.Match[str]) -> str:
        name = match.group(1) or match.group(2)
        if name not in os.environ:
            raise SpecError(
                f"{key} is {text!r}, but the environment variable {name} is not set; "
                f"export {name}=... or override the key with --set {key}=PATH."
            )
        return os.environ[name]

    return _VARIABLE.sub(value, text)


def _known_keys(model: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    """Keys allowed at ``location``, following nested models and mappings of models."""
    current: Any = model
    for part in location:
        if is_model(current):
            field = current.model_fields.get(part)
            current = None if field is None else without_none(field.annotation)
        elif get_origin(current) is dict:
            current = get_args(current)[1]
    return list(current.model_fields) if is_model(current) else []


def as_json(value: Any) -> Any:
    """``value`` as it comes back from JSON, where tuples are lists."""
    return json.loads(json.dumps(value))
