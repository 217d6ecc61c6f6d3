"""The model of a part of a document: closed, frozen, strict about numbers."""

from collections.abc import Mapping
from types import UnionType
from typing import Annotated, Any, ClassVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, field_validator
from pydantic_core.core_schema import ValidationInfo

# Integers beyond have no place in arrays, generators and files.
_LARGEST = 2**63 - 1


class ClosedModel(BaseModel):
    """A part of a document that refuses unknown keys and cannot change once read.

    If a key needs a number, booleans and text are refused, and so are integers that do
    not fit into 64 bits. Only ``true`` and ``false`` are booleans.

    ``earlier_keys`` and ``earlier_values`` map old names of keys and of values to the
    names of today; :mod:`pipeline.spec.renamed_keys` reads the old names and warns.
    ``key_aliases`` maps second names, which are read without a warning.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    earlier_keys: ClassVar[Mapping[str, str]] = {}
    earlier_values: ClassVar[Mapping[str, Mapping[str, str]]] = {}
    key_aliases: ClassVar[Mapping[str, str]] = {}

    @field_validator("*", mode="before")
    @classmethod
    def _plain_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        assert info.field_name is not None
        _check_numbers(cls.model_fields[info.field_name].annotation, value)
        return value


def is_model(annotation: Any) -> bool:
    """Return whether ``annotation`` is a class of models."""
    plain = isinstance(annotation, type) and get_origin(annotation) is None
    return plain and issubclass(annotation, BaseModel)


def without_none(annotation: Any) -> Any:
    """Return ``X`` of ``X | None``, and any other annotation unchanged."""
    if get_origin(annotation) is not UnionType:
        return annotation
    return next(a for a in get_args(annotation) if a is not type(None))


def _check_numbers(annotation: Any, value: Any) -> None:
    """Raise ValueError for what is no number where ``annotation`` wants one."""
    kinds = [kind for kind in _alternatives(annotation) if kind is not type(None)]
    if value is None or len(kinds) != 1:
        return
    (kind,) = kinds
    if kind is bool and not isinstance(value, bool):
        raise ValueError("must be true or false")
    if kind in (int, float):
        _check_number(value)
    elif get_origin(kind) is tuple and isinstance(value, list | tuple):
        for item in value:
            _check_numbers(get_args(kind)[0], item)
    elif get_origin(kind) is dict and isinstance(value, Mapping):
        for item in value.values():
            _check_numbers(get_args(kind)[1], item)


def _check_number(value: Any) -> None:
    if isinstance(value, bool | str):
        raise ValueError("must be a plain decimal number")
    if isinstance(value, int) and abs(value) > _LARGEST:
        raise ValueError(f"the number is too large, {_LARGEST} is the largest")


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    """Kinds that ``annotation`` allows, without what annotates them."""
    if get_origin(annotation) is Annotated:
        return _alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return tuple(k for a in get_args(annotation) for k in _alternatives(a))
    return (annotation,)
