"""A reader of pickles that runs nothing: no import, no call, no attribute of a file's.

It knows the instructions that plain data and PyG samples need and refuses the others.
Names in a file are looked up in a table of the reader's own constructors.
"""

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

_MARK = object()
_INT, _UINT, _UINT16 = struct.Struct("<i"), struct.Struct("<I"), struct.Struct("<H")
_UINT64, _FLOAT = struct.Struct("<Q"), struct.Struct(">d")
STOP = ord(".")


class UnsafePickle(ValueError):
    """Why a pickle is not read; begins in the middle of a sentence."""


class ObjectState:
    """Attributes of an object, without the object."""

    __slots__ = ("state",)

    def __init__(self) -> None:
        self.state: dict[str, Any] = {}

    def build(self, state: Any) -> None:
        """Take the attributes over."""
        if type(state) is not dict:
            raise UnsafePickle("it holds an object whose attributes are no dictionary")
        # A link back to the owner would keep every sample alive until collected.
        self.state.update((k, v) for k, v in state.items() if k != "_parent")


@dataclass(frozen=True, slots=True)
class GlobalRef:
    """A class or function that a pickle names; ``make`` stands in for calling it."""

    text: str
    make: Callable[..., Any] | None = None
    record: bool = False


class Allowlist(NamedTuple):
    """What a reader accepts: names, and a meaning of persistent ids or None."""

    names: Mapping[str, GlobalRef]
    persistent: Callable[[Any], Any] | None = None


class PickleReader:
    """Reads the pickles that lie one after the other in ``data``."""

    def __init__(self, data: bytes, reading: Allowlist) -> None:
        self.data = data
        self.position = 0
        self.reading = reading
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def load(self) -> Any:
        """The next value: plain data, a stand-in, or a ``GlobalRef``.

        Raises
        ------
        Refusal
            The data break off, or ask for something that samples do not need.
        """
        self.stack, self.memo = [], {}
        try:
            while (code := self.data[self.position]) != STOP:
                self.position += 1
                STEPS[code](self)
            self.position += 1
            (value,) = self.stack
        except KeyError:
            raise UnsafePickle(f"it has the unknown instruction {code:#04x}") from None
        except (IndexError, struct.error, ValueError, TypeError) as error:
            if isinstance(error, UnsafePickle):
                raise
            raise UnsafePickle("it is cut off or damaged") from None
        return value

    def take(self, count: int) -> bytes:
        """The next ``count`` bytes."""
        end = self.position + count
        if end > len(self.data):
            raise UnsafePickle("it is cut off or damaged")
        piece = self.data[self.position : end]
        self.position = end
        return piece

    def number(self, form: struct.Struct) -> Any:
        """The next number, stored as ``form``."""
        (value,) = form.unpack_from(self.data, self.position)
        self.position += form.size
        return value

    def since_mark(self) -> list[Any]:
        """Values above the last mark, taken off the stack together with it."""
        stack = self.stack
        for place in range(len(stack) - 1, -1, -1):
            if stack[place] is _MARK:
                values = stack[place + 1 :]
                del stack[place:]
                return values
        raise UnsafePickle("it is cut off or damaged")

    def pop(self, *types: type) -> Any:
        """Topmost value; of one of ``types`` where any are given."""
        value = self.stack.pop()
        if value is _MARK or (types and type(value) not in types):
            raise UnsafePickle("it is cut off or damaged")
        return value


Step = Callable[[PickleReader], None]


def _name(reader: PickleReader, module: str, attribute: str) -> None:
    text = f"{module}.{attribute}"
    if text not in reader.reading.names:
        raise UnsafePickle(f"it asks for {text!r}, which could run code")
    reader.stack.append(reader.reading.names[text])


def _global(reader: PickleReader) -> None:
    end = reader.data.index(b"\n", reader.position)
    module = reader.take(end - reader.position).decode()
    reader.position += 1
    end = reader.data.index(b"\n", reader.position)
    attribute = reader.take(end - reader.position).decode()
    reader.position += 1
    _name(reader, module, attribute)


def _stack_global(reader: PickleReader) -> None:
    attribute, module = reader.pop(str), reader.pop(str)
    _name(reader, module, attribute)


def _reduce(reader: PickleReader) -> None:
    arguments, function = reader.pop(tuple), reader.pop()
    if type(function) is not GlobalRef or function.make is None:
        raise UnsafePickle(f"it calls {_describe(function)}")
    reader.stack.append(function.make(*arguments))


def _newobj(reader: PickleReader) -> None:
    arguments, kind = reader.pop(tuple), reader.pop()
    if type(kind) is not GlobalRef or not kind.record or arguments:
        raise UnsafePickle(f"it makes an object of {_describe(kind)}")
    reader.stack.append(ObjectState())


def _build(reader: PickleReader) -> None:
    state, target = reader.pop(), reader.stack[-1]
    if not hasattr(type(target), "build"):
        raise UnsafePickle(f"it sets attributes of {_describe(target)}")
    target.build(state)


def _persistent(reader: PickleReader) -> None:
    if reader.reading.persistent is None:
        raise UnsafePickle("it refers to data outside itself")
    reader.stack.append(reader.reading.persistent(reader.pop()))


def _describe(value: Any) -> str:
    return repr(value.text) if type(value) is GlobalRef else f"a {type(value).__name__}"


def _set_items(reader: PickleReader) -> None:
    flat = reader.since_mark()
    _store(reader.stack[-1], flat)


def _set_item(reader: PickleReader) -> None:
    value, key = reader.pop(), reader.pop()
    _store(reader.stack[-1], [key, value])


def _store(target: Any, flat: list[Any]) -> None:
    # Other keys, nested tuples above all, can take for ever to hash.
    if type(target) is not dict or not all(type(key) is str for key in flat[::2]):
        raise UnsafePickle("it holds a dictionary whose keys are no words")
    target.update(zip(flat[::2], flat[1::2], strict=True))


def _extend(target: Any, values: list[Any]) -> None:
    if type(target) is not list:
        raise UnsafePickle("it appends to something that is no list")
    target.extend(values)


def _append(reader: PickleReader) -> None:
    value = reader.pop()
    _extend(reader.stack[-1], [value])


def _appends(reader: PickleReader) -> None:
    values = reader.since_mark()
    _extend(reader.stack[-1], values)


def _tuple(count: int) -> Step:
    def step(reader: PickleReader) -> None:
        values = [reader.pop() for _ in range(count)]
        reader.stack.append(tuple(reversed(values)))

    return step


def _constant(value: Any) -> Step:
    return lambda reader: reader.stack.append(value)


def _counted_step(form: struct.Struct | None, convert: Callable[[bytes], Any]) -> Step:
    """Step for a length, in one byte without ``form``, and so many bytes."""

    def step(reader: PickleReader) -> None:
        length = reader.take(1)[0] if form is None else reader.number(form)
        reader.stack.append(convert(reader.take(length)))

    return step


def _number_step(form: struct.Struct) -> Step:
    return lambda reader: reader.stack.append(reader.number(form))


def _put(number: Callable[[PickleReader], int]) -> Step:
    def step(reader: PickleReader) -> None:
        reader.memo[number(reader)] = reader.stack[-1]

    return step


def _get(number: Callable[[PickleReader], int]) -> Step:
    def step(reader: PickleReader) -> None:
        place = number(reader)
        if place not in reader.memo:
            raise UnsafePickle("it is cut off or damaged")
        reader.stack.append(reader.memo[place])

    return step


def _byte(reader: PickleReader) -> int:
    return reader.take(1)[0]


def _long(raw: bytes) -> int:
    return int.from_bytes(raw, "little", signed=True)


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogatepass")


def _protocol(reader: PickleReader) -> None:
    reader.take(1)


def _frame(reader: PickleReader) -> None:
    if reader.number(_UINT64) > len(reader.data) - reader.position:
        raise UnsafePickle("it is cut off or damaged")


# By instruction of the pickle protocols 2 to 5, in the order of the protocol's list.
STEPS: dict[int, Step] = {
    ord("("): lambda reader: reader.stack.append(_MARK),
    ord("N"): _constant(None),
    0x88: _constant(True),
    0x89: _constant(False),
    ord("K"): lambda reader: reader.stack.append(_byte(reader)),
    ord("M"): _number_step(_UINT16),
    ord("J"): _number_step(_INT),
    0x8A: _counted_step(None, _long),
    ord("G"): _number_step(_FLOAT),
    ord("U"): _counted_step(None, bytes),
    ord("C"): _counted_step(None, bytes),
    ord("B"): _counted_step(_UINT, bytes),
    0x8E: _counted_step(_UINT64, bytes),
    0x96: _counted_step(_UINT64, bytes),
    0x8C: _counted_step(None, _text),
    ord("X"): _counted_step(_UINT, _text),
    0x8D: _counted_step(_UINT64, _text),
    ord("]"): lambda reader: reader.stack.append([]),
    ord("a"): _append,
    ord("e"): _appends,
    ord(")"): _constant(()),
    ord("t"): lambda reader: reader.stack.append(tuple(reader.since_mark())),
    0x85: _tuple(1),
    0x86: _tuple(2),
    0x87: _tuple(3),
    ord("}"): lambda reader: reader.stack.append({}),
    ord("s"): _set_item,
    ord("u"): _set_items,
    ord("q"): _put(_byte),
    ord("r"): _put(lambda reader: reader.number(_UINT)),
    0x94: _put(lambda reader: len(reader.memo)),
    ord("h"): _get(_byte),
    ord("j"): _get(lambda reader: reader.number(_UINT)),
    ord("c"): _global,
    0x93: _stack_global,
    ord("R"): _reduce,
    0x81: _newobj,
    ord("b"): _build,
    ord("Q"): _persistent,
    0x80: _protocol,
    0x95: _frame,
}
