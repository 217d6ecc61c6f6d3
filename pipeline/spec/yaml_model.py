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
        reason = " ".join(str(error).split())
        raise SpecError(f"{path} is not valid YAML: {reason}.") from None
    if not isinstance(loaded, dict):
        raise SpecError(f"{path} must hold a mapping of keys, found {loaded!r:.60}.")
    return loaded


def read_json_map(path: Path) -> dict[str, Any]:
    """Mapping at the top of a JSON file; errors of `read_yaml`."""
    try:
        loaded = parse_json(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise SpecError(f"{path} cannot be read as JSON ({error}).") from None
    if not isinstance(loaded, dict):
        raise SpecError(f"{path} must hold a mapping of keys, found {loaded!r:.60}.")
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
        if not equals or not dotted:
            raise SpecError(f"--set {override!r} must look like key.subkey=value.")
        if model is not None:
            dotted = rename_setting(model, dotted, "--set")
        *parents, last = dotted.split(".")
        target = document
        for key in parents:
            if target.get(key) is None:
                target[key] = {}
            target = target[key]
            if not isinstance(target, dict):
                raise SpecError(f"--set {override!r}: {key!r} holds no keys.")
        try:
            target[last] = parse_value(text)
        except RepeatedKey as error:
            raise SpecError(f"--set {override!r}: {error.problem}.") from None
        except yaml.YAMLError:
            raise SpecError(
                f"--set {override!r}: the value is not YAML; put text that begins with "
                "a bracket or a quotation mark in quotes of its own."
            ) from None


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
    place = ".".join(str(part) for part in error["loc"]) or "the document"
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
    message = error["msg"].removeprefix("Value error, ").rstrip(".")
    if error["type"] == "string_type" and isinstance(error["input"], int | float):
        message = "text is wanted, so put the value in quotes"
    found = "" if isinstance(error["input"], dict) else f", found {error['input']!r}"
    raise SpecError(f"{where}: {place}: {message}{found}.")


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
            f"{key} is {text!r}, but there is no such home folder; give the whole path."
        ) from None


def expand_text(text: str, key: str) -> str:
    """``text`` with environment variables filled in; errors of `expand_path`."""

    def value(match: re.Match[str]) -> str:
        name = match.group(1) or match.group(2)
        if name not in os.environ:
            raise SpecError(
                f"{key} is {text!r} but the environment variable {name} is not set; "
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
