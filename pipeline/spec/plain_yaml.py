"""YAML as it is read and written here: plain data, few spellings, no key twice.

Numbers are decimal (``10``, ``1_000``, ``1e1``, ``-.5``), and true and false are the
only booleans. What YAML 1.1 makes of ``010``, ``1:30``, ``yes`` and ``2024-01-01`` is
text here, so that a key that wants a number refuses it.
"""

import re
from collections.abc import Callable, Hashable
from typing import Any, ClassVar

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

_TAG = "tag:yaml.org,2002:"
_MERGE = _TAG + "merge"
# Of a document whose aliases are written out.
_MOST_NODES = 1_000_000
# Underscores stand between digits only.
_WHOLE = r"(?:0|[1-9][0-9]*(?:_[0-9]+)*)"
_SPELLINGS = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", rf"[-+]?{_WHOLE}", list("-+0123456789")),
    (
        "float",
        rf"[-+]?(?:\.[0-9]+|{_WHOLE}(?:\.(?:[0-9]+(?:_[0-9]+)*)?)?)(?:[eE][-+]?[0-9]+)?"
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

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._flat: set[int] = set()

    def get_single_node(self) -> Node | None:
        """The node of the only document, of a size that can be read."""
        node = super().get_single_node()
        if node is not None and _written_out(node, {}) > _MOST_NODES:
            raise yaml.YAMLError("its aliases stand for too much; write less of them")
        return node

    def flatten_mapping(self, node: MappingNode) -> None:
        """Put what ``<<`` merges behind the keys of ``node``, of which none is twice.

        A key of the mapping itself comes first, then the earlier of what is merged. An
        anchored mapping may be merged elsewhere before it is made itself.
        """
        if id(node) in self._flat:
            return
        self._flat.add(id(node))
        self._refuse_repeated(node)
        merged = [value for key, value in node.value if key.tag == _MERGE]
        node.value = [pair for pair in node.value if pair[0].tag != _MERGE]
        known = {self.construct_object(key) for key, _ in node.value}
        for part in (part for value in merged for part in _mappings(value)):
            self.flatten_mapping(part)
            for key, value in part.value:
                if (name := self.construct_object(key)) not in known:
                    known.add(name)
                    node.value.append((key, value))

    def _refuse_repeated(self, node: MappingNode) -> None:
        first: dict[Hashable, int] = {}
        for key, _ in node.value:
            if not isinstance(key, ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, "a list or map cannot be a key", key.start_mark
                )
            line = key.start_mark.line + 1
            name = "<<" if key.tag == _MERGE else self.construct_object(key)
            if name in first:
                raise RepeatedKey(
                    problem=f"the key {key.value!r} is in lines {first[name]} and "
                    f"{line}; remove one of the two",
                    problem_mark=key.start_mark,
                )
            first[name] = line


def _mappings(node: Node) -> list[MappingNode]:
    """The mappings that ``<<: node`` merges."""
    found = []
    for part in node.value if isinstance(node, SequenceNode) else [node]:
        if not isinstance(part, MappingNode):
            raise yaml.constructor.ConstructorError(
                None, None, "<< merges mappings only", part.start_mark
            )
        found.append(part)
    return found


def _written_out(node: Node, known: dict[int, int | None]) -> int:
    """Number of nodes of ``node`` with its aliases written out; fills ``known``."""
    if id(node) in known:
        size = known[id(node)]
        if size is None:
            raise yaml.composer.ComposerError(
                None, None, "an alias stands inside what it stands for", node.start_mark
            )
        return size
    known[id(node)] = None
    parts: list[Node] = []
    if isinstance(node, MappingNode):
        parts = [part for pair in node.value for part in pair]
    elif isinstance(node, SequenceNode):
        parts = node.value
    known[id(node)] = size = 1 + sum(_written_out(part, known) for part in parts)
    return size


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


def _reader(
    kind: Callable[[str], Any], noun: str = "number"
) -> Callable[[PlainLoader, ScalarNode], Any]:
    def construct(loader: PlainLoader, node: ScalarNode) -> Any:
        text = node.value.replace("_", "").lower()
        try:
            return kind(re.sub(r"^([-+]?)\.(inf|nan)$", r"\1\2", text))
        except (ValueError, KeyError):
            what = f"{node.value:.40} is not a readable {noun}"
            raise yaml.constructor.ConstructorError(
                None, None, what, node.start_mark
            ) from None

    return construct


def _text(loader: PlainLoader, node: ScalarNode) -> str:
    """Text that can be written to a file: no halves of characters."""
    text: str = loader.construct_scalar(node)
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise yaml.constructor.ConstructorError(
            None, None, "text has half a character (\\ud800)", node.start_mark
        )
    return text


PlainLoader.add_constructor(_TAG + "str", _text)
PlainLoader.add_constructor(_TAG + "int", _reader(int))
PlainLoader.add_constructor(_TAG + "float", _reader(float))
PlainLoader.add_constructor(
    _TAG + "bool", _reader({"true": True, "false": False}.__getitem__, "boolean")
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
    value = parse_yaml(text)
    node = yaml.compose(text, Loader=PlainLoader)
    quoted = isinstance(node, ScalarNode) == (text[0] in "\"'")
    if node is None or not quoted or node.end_mark.index < len(text):
        raise yaml.YAMLError("something follows the value")
    return value


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
