"""YAML documents as closed pydantic models: dotted overrides, one-sentence errors."""

import difflib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.errors import SpecError

_VARIABLE = re.compile(r"\$\{(\w+)\}|\$(\w+)")


class ClosedModel(BaseModel):
    """A document part that refuses unknown keys and cannot change once read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Document = TypeVar("Document", bound=ClosedModel)


def read_yaml(path: Path) -> dict[str, Any]:
    """Mapping at the top of a YAML file; plain data only, no YAML tags."""
    try:
        loaded = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise SpecError(f"{path} does not exist.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise SpecError(f"{path} is not valid YAML: {reason}.") from None
    if not isinstance(loaded, dict):
        raise SpecError(f"{path} must hold a mapping of keys, found {loaded!r:.60}.")
    return loaded


def apply_overrides(document: dict[str, Any], overrides: Iterable[str]) -> None:
    """Set ``a.b.c=value`` entries in place; values are read as YAML scalars."""
    for override in overrides:
        dotted, equals, text = override.partition("=")
        if not equals or not dotted:
            raise SpecError(f"--set {override!r} must look like key.subkey=value.")
        *parents, last = dotted.split(".")
        target = document
        for key in parents:
            if target.get(key) is None:
                target[key] = {}
            target = target[key]
            if not isinstance(target, dict):
                raise SpecError(f"--set {override!r}: {key!r} holds no keys.")
        try:
            target[last] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise SpecError(f"--set {override!r}: the value is not YAML.") from None


def validate(model: type[Document], data: Mapping[str, Any], where: str) -> Document:
    """``data`` as ``model``; the first thing wrong becomes one SpecError sentence."""
    try:
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
    message = error["msg"].removeprefix("Value error, ").rstrip(".")
    found = "" if isinstance(error["input"], dict) else f", found {error['input']!r}"
    raise SpecError(f"{where}: {place}: {message}{found}.")


def nearest(word: str, known: Iterable[str]) -> str:
    """``; did you mean ...`` or the list of choices, to end an error sentence with."""
    choices = sorted(known)
    close = difflib.get_close_matches(word, choices, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"[:-1]
    return f" (known: {', '.join(choices)})" if choices else ""


def expand_path(text: str, folder: Path, key: str) -> Path:
    """``text`` with environment variables filled in, relative to ``folder``.

    Raises
    ------
    SpecError
        A variable is not set; names the key and the variable.
    """

    def value(match: re.Match[str]) -> str:
        name = match.group(1) or match.group(2)
        if name not in os.environ:
            raise SpecError(
                f"{key} is {text!r} but the environment variable {name} is not set; "
                f"export {name}=... or override the key with --set {key}=PATH."
            )
        return os.environ[name]

    return (folder / Path(_VARIABLE.sub(value, text)).expanduser()).resolve()


def _known_keys(model: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    """Keys allowed at ``location``, following nested models and mappings of models."""
    current: Any = model
    for part in location:
        if isinstance(current, type) and issubclass(current, BaseModel):
            if part not in current.model_fields:
                return []
            current = current.model_fields[part].annotation
        current = _inner_model(current)
    if isinstance(current, type) and issubclass(current, BaseModel):
        return list(current.model_fields)
    return []


def _inner_model(annotation: Any) -> Any:
    """The model inside ``Model | None`` or ``dict[str, Model]``; else unchanged."""
    if isinstance(annotation, type):
        return annotation
    for argument in reversed(getattr(annotation, "__args__", ())):
        inner = _inner_model(argument)
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            return inner
    return annotation
