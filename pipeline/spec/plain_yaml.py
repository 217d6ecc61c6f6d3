"""YAML as it is read and written here: plain data, few spellings, no key twice.

Numbers are decimal (``10``, ``1_000``, ``1e1``, ``-.5``), and true and false are the
only booleans. What YAML 1.1 makes of ``010``, ``1:30``, ``yes`` and ``2024-01-01`` is
text here, so that a key that wants a number refuses it.
"""

import re
from collections.abc import Callable, Hashable
from typing import Any, ClassVar

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode

_TAG = "tag:yaml.org,2002:"
_SPELLINGS = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|(?:0|[1-9][0-9_]*)(?:\.[0-9_]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+0123456789."),
    ),
    ("merge", r"<<", ["<"]),
)


class RepeatedKey(yaml.MarkedYAMLError):
    """A key that a mapping has twice; ``problem`` is a clause that names both lines."""


class PlainLoader(yaml.SafeLoader):
    """Reads plain data in the spellings of this module.

    Tags other than those of JSON's types are refused, and so are repeated keys.
    """

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012
    yaml_constructors: ClassVar[dict[str | None, Any]] = {
        tag: maker
        for tag, maker in yaml.SafeLoader.yaml_constructors.items()
        if tag in (None, *(_TAG + name for name in ("null", "str", "seq", "map")))
    }

    def construct_mapping(self, node: Node, deep: bool = False) -> dict[Hashable, Any]:
        """The mapping of ``node``, none of whose keys is there twice."""
        if isinstance(node, MappingNode):
            self._refuse_repeated(node)
        return super().construct_mapping(node, deep)  # type: ignore[arg-type]

    def _refuse_repeated(self, node: MappingNode) -> None:
        first: dict[Hashable, int] = {}
        for key, _ in node.value:
            if not isinstance(key, ScalarNode) or key.tag == _TAG + "merge":
                continue
            name, line = self.construct_object(key), key.start_mark.line + 1
            if name in first:
                raise RepeatedKey(
                    problem=f"the key {key.value!r} is in lines {first[name]} and "
                    f"{line}; remove one of the two",
                    problem_mark=key.start_mark,
                )
            first[name] = line


class _PlainDumper(yaml.SafeDumper):
    """Quotes text that `PlainLoader` would read as something else."""

    # Text that YAML 1.1 reads as a number is quoted too, for other programs.
    yaml_implicit_resolvers: dict[str, Any] = {  # noqa: RUF012
        first: list(known)
        for first, known in yaml.SafeDumper.yaml_implicit_resolvers.items()
    }

    def ignore_aliases(self, data: Any) -> bool:
        """Equal parts are written out, not referred to."""
        return True


for _name, _pattern, _first in _SPELLINGS:
    for _class in (PlainLoader, _PlainDumper):
        _class.add_implicit_resolver(
            _TAG + _name, re.compile(f"^(?:{_pattern})$"), _first
        )


def _number(kind: Callable[[str], Any]) -> Callable[[PlainLoader, ScalarNode], Any]:
    def construct(loader: PlainLoader, node: ScalarNode) -> Any:
        text = node.value.replace("_", "").lower()
        try:
            return kind(re.sub(r"^([-+]?)\.(inf|nan)$", r"\1\2", text))
        except (ValueError, KeyError):
            what = f"{node.value:.40} is not a readable number"
            raise yaml.constructor.ConstructorError(
                None, None, what, node.start_mark
            ) from None

    return construct


PlainLoader.add_constructor(_TAG + "int", _number(int))
PlainLoader.add_constructor(_TAG + "float", _number(float))
PlainLoader.add_constructor(
    _TAG + "bool", _number({"true": True, "false": False}.__getitem__)
)


def parse_yaml(text: str) -> Any:
    """The plain data that ``text`` holds.

    Raises
    ------
    RepeatedKey
        A mapping has a key twice.
    yaml.YAMLError
        The text is no YAML, or holds tags or nests too deeply.
    """
    try:
        # No object but plain data can come of this loader.
        return yaml.load(text, Loader=PlainLoader)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None


def parse_value(text: str) -> Any:
    """The value that ``text`` stands for where it is the whole value, as in a flag.

    ``[…]``, ``{…}`` and quoted text are YAML; all other text is one plain scalar, in
    which ``#``, ``:`` and the like mean nothing.

    Raises
    ------
    yaml.YAMLError
        A bracket or quotation mark is open, or something follows what it closes.
    """
    text = text.strip()
    if not text.startswith(("[", "{", '"', "'")):
        resolver = PlainLoader("")
        tag = resolver.resolve(ScalarNode, text, (text != "<<", True))
        return resolver.construct_object(ScalarNode(tag, text))
    node = yaml.compose(text, Loader=PlainLoader)
    if node is None or node.end_mark.index < len(text):
        raise yaml.YAMLError("something follows the value")
    return parse_yaml(text)


def yaml_text(value: Any, *, flow: bool | None = False) -> str:
    """``value`` as YAML that `parse_yaml` reads back as the same value."""
    return yaml.dump(
        value,
        Dumper=_PlainDumper,
        sort_keys=False,
        default_flow_style=flow,
        allow_unicode=True,
        width=float("inf"),
    )
