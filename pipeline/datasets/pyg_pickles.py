"""Stand-ins for the tensors and arrays in pickled PyG samples, decoded by numpy."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.datasets.unpickling import (
    Allowlist,
    GlobalRef,
    ObjectState,
    PickleReader,
    UnsafePickle,
)

MAX_DIMENSIONS = 4
MAX_PROLOGUES = 4
_STORAGES = {
    "torch.DoubleStorage": "<f8",
    "torch.FloatStorage": "<f4",
    "torch.HalfStorage": "<f2",
    "torch.LongStorage": "<i8",
    "torch.IntStorage": "<i4",
    "torch.ShortStorage": "<i2",
    "torch.CharStorage": "i1",
    "torch.ByteStorage": "u1",
    "torch.BoolStorage": "?",
}
_TORCH_MAGIC = 0x1950A86A20F9469CFC6C
_TORCH_PROTOCOL = 1001
_COUNT = np.dtype("<i8")
_NUMPY_TYPES = {"b1", *(f"{kind}{n}" for kind in "iu" for n in (1, 2, 4, 8))}
_NUMPY_TYPES |= {"f2", "f4", "f8"}

Array = npt.NDArray[Any]


class Tensor:
    """A view into the bytes of a torch storage; nothing is decoded before ``array``."""

    def __init__(
        self,
        storage: Any,
        offset: Any,
        size: Any,
        stride: Any,
        requires_grad: Any = False,
        hooks: Any = None,
        metadata: Any = None,
    ) -> None:
        if not isinstance(storage, Storage) or not _are_counts(offset):
            raise UnsafePickle("it holds a tensor without a storage")
        if not (type(size) is type(stride) is tuple and len(size) == len(stride)):
            raise UnsafePickle("it holds a tensor without a shape")
        if len(size) > MAX_DIMENSIONS or not _are_counts(*size, *stride):
            raise UnsafePickle(f"it holds a tensor of impossible shape {_short(size)}")
        self.storage, self.offset = storage, offset
        self.size, self.stride = size, stride

    def array(self) -> Array:
        """Its values."""
        flat = self.storage.values()
        count = math.prod(self.size)
        last = self.offset + sum(
            (n - 1) * s for n, s in zip(self.size, self.stride, strict=True)
        )
        # Strides of zero would let a few bytes stand for any number of values.
        if count > len(flat) or (count and last >= len(flat)):
            raise UnsafePickle(
                f"it holds a tensor of shape {_short(self.size)} whose storage has "
                f"{len(flat)} values"
            )
        if not count:
            return np.zeros(0, flat.dtype)
        steps = [step * flat.itemsize for step in self.stride]
        return np.ndarray(
            self.size, flat.dtype, flat, self.offset * flat.itemsize, steps
        )


class Storage:
    """A torch storage as the file that ``torch.save`` makes of it."""

    def __init__(self, raw: Any) -> None:
        if type(raw) is not bytes:
            raise UnsafePickle("it holds a tensor without a storage")
        self.raw = raw

    def values(self) -> Array:
        """The values, 1-D."""
        reader = PickleReader(self.raw, _IN_STORAGES)
        _skip_prologue(reader)
        head, _ = reader.load(), reader.load()
        if type(head) is not np.ndarray:
            raise UnsafePickle("it holds a tensor without a storage")
        start = reader.position + _COUNT.itemsize
        body = self.raw[start:]
        stated = np.frombuffer(self.raw[reader.position : start], _COUNT)
        if stated.tolist() != [head.size] or len(body) != head.nbytes:
            raise UnsafePickle(f"it holds a tensor cut off at {len(body)} bytes")
        return np.frombuffer(body, head.dtype)


# Every storage of a dataset begins with the same bytes; those were checked before.
_prologues: list[bytes] = []


def _skip_prologue(reader: PickleReader) -> None:
    for known in _prologues:
        if reader.data.startswith(known):
            reader.position = len(known)
            return
    magic, protocol, system = reader.load(), reader.load(), reader.load()
    if magic != _TORCH_MAGIC or protocol != _TORCH_PROTOCOL:
        raise UnsafePickle("it holds a tensor of an unknown format")
    if type(system) is not dict or system.get("little_endian") is not True:
        raise UnsafePickle("it holds a tensor of a big-endian machine")
    if len(_prologues) < MAX_PROLOGUES:
        _prologues.append(reader.data[: reader.position])


def _storage_head(reference: Any) -> Array:
    """An array without memory of its own that has a storage's type and length."""
    words = reference if type(reference) is tuple else ()
    if len(words) < 5 or words[0] != "storage" or type(words[1]) is not GlobalRef:
        raise UnsafePickle("it holds a tensor without a storage")
    if not _are_counts(words[4]) or words[4] >= 1 << 40:
        raise UnsafePickle("it holds a tensor of impossible length")
    blank = np.zeros(1, _STORAGES[words[1].text])
    return np.lib.stride_tricks.as_strided(blank, (words[4],), (0,))


class DType:
    """A numpy data type; only numbers and booleans."""

    def __init__(self, code: Any, align: Any = False, copy: Any = True) -> None:
        if type(code) is not str or code not in _NUMPY_TYPES:
            raise UnsafePickle(
                f"it holds an array of type {_short(code)}, not of numbers"
            )
        self.dtype = np.dtype(code)

    def build(self, state: Any) -> None:
        """Take the byte order over; everything else must be as for plain numbers."""
        if type(state) is not tuple or len(state) < 5 or state[2:5] != (None,) * 3:
            raise UnsafePickle("it holds an array of a compound type")
        if state[1] not in ("<", ">", "|", "="):
            raise UnsafePickle("it holds an array of unknown byte order")
        self.dtype = self.dtype.newbyteorder(state[1])


class NumpyArray:
    """The bytes of a numpy array; nothing is decoded before ``array``."""

    def __init__(self, *_: Any) -> None:
        self.content: tuple[Any, ...] | None = None

    def build(self, state: Any) -> None:
        """Take (version, shape, type, Fortran order, bytes) over."""
        if type(state) is not tuple or len(state) != 5:
            raise UnsafePickle("it holds an array of an unknown format")
        _, shape, dtype, fortran, raw = state
        self.content = (raw, dtype, shape, "F" if fortran else "C")

    def array(self) -> Array:
        """Its values."""
        raw, dtype, shape, order = self.content or (None, None, None, None)
        if type(raw) is not bytes or not isinstance(dtype, DType):
            raise UnsafePickle("it holds an array of objects, not of numbers")
        if type(shape) is not tuple or not _are_counts(*shape):
            raise UnsafePickle("it holds an array of impossible shape")
        size = dtype.dtype.itemsize
        if len(shape) > MAX_DIMENSIONS or math.prod(shape) * size != len(raw):
            raise UnsafePickle(
                f"it holds an array of shape {_short(shape)} in {len(raw)} bytes"
            )
        flat = np.frombuffer(raw, dtype.dtype)
        return flat.reshape(shape, order="F" if order == "F" else "C")


def _from_buffer(raw: Any, dtype: Any, shape: Any, order: Any) -> NumpyArray:
    made = NumpyArray()
    made.content = (raw, dtype, shape, order)
    return made


def _scalar(dtype: Any, raw: Any = None) -> NumpyArray:
    return _from_buffer(raw, dtype, (), "C")


def _latin1(text: Any, encoding: Any) -> bytes:
    """The bytes that protocol 2 writes as text."""
    if type(text) is not str or encoding != "latin1":
        raise UnsafePickle("it holds text of an unknown encoding")
    return text.encode("latin1")


def _no_hooks(*items: Any) -> dict[str, Any]:
    if items:
        raise UnsafePickle("it holds an ordered dictionary with contents")
    return {}


def _table(*names: GlobalRef) -> Mapping[str, GlobalRef]:
    return {name.text: name for name in names}


_DATA = "torch_geometric.data"
_SAMPLES = Allowlist(
    _table(
        GlobalRef(f"{_DATA}.data.Data", record=True),
        GlobalRef(f"{_DATA}.storage.GlobalStorage", record=True),
        GlobalRef(f"{_DATA}.data.DataEdgeAttr"),
        GlobalRef(f"{_DATA}.data.DataTensorAttr"),
        GlobalRef("collections.OrderedDict", _no_hooks),
        GlobalRef("_codecs.encode", _latin1),
        GlobalRef("torch._utils._rebuild_tensor_v2", Tensor),
        GlobalRef("torch.storage._load_from_bytes", Storage),
        GlobalRef("numpy.dtype", DType),
        GlobalRef("numpy.ndarray"),
        # numpy 2 moved its parts to numpy._core.
        GlobalRef("numpy.core.multiarray._reconstruct", NumpyArray),
        GlobalRef("numpy._core.multiarray._reconstruct", NumpyArray),
        GlobalRef("numpy.core.multiarray.scalar", _scalar),
        GlobalRef("numpy._core.multiarray.scalar", _scalar),
        GlobalRef("numpy.core.numeric._frombuffer", _from_buffer),
        GlobalRef("numpy._core.numeric._frombuffer", _from_buffer),
    )
)
_IN_STORAGES = Allowlist(_table(*map(GlobalRef, _STORAGES)), _storage_head)


def sample_fields(raw: bytes) -> dict[str, Any]:
    """Attributes of a pickled PyG sample of any version; those that are None left out.

    Values are plain data or stand-ins that ``as_array`` decodes.

    Raises
    ------
    Refusal
        It is no such sample, is damaged, or asks for anything that could run code.
    """
    value = PickleReader(raw, _SAMPLES).load()
    if type(value) is not ObjectState:
        raise UnsafePickle(f"it holds a {type(value).__name__}, not a PyG sample")
    fields = value.state
    # PyG 2 keeps the attributes one object further down.
    if type(store := fields.get("_store")) is ObjectState:
        fields = store.state.get("_mapping")  # type: ignore[assignment]
    if type(fields) is not dict:
        raise UnsafePickle("it holds a PyG sample without attributes")
    return {name: part for name, part in fields.items() if part is not None}


def plain_integer(raw: bytes) -> int:
    """The integer that ``raw`` is a pickle of.

    Raises
    ------
    Refusal
        It is something else.
    """
    value = as_array(PickleReader(raw, _SAMPLES).load())
    if value.size != 1 or value.dtype.kind not in "iu":
        raise UnsafePickle("it is no integer")
    return int(value.reshape(()))


def as_array(value: Any) -> Array:
    """``value`` of a sample as numbers.

    Raises
    ------
    Refusal
        It is no number, tensor or array, or its bytes are not as they say.
    """
    if isinstance(value, Tensor | NumpyArray):
        return value.array()
    if type(value) in (bool, int, float):
        return np.asarray(value)
    raise UnsafePickle(f"it holds a {type(value).__name__} where numbers are needed")


def _are_counts(*values: Any) -> bool:
    return all(type(value) is int and value >= 0 for value in values)


def _short(value: Any) -> str:
    # Nested tuples can share their parts, and then take for ever to print.
    parts = value if type(value) is tuple else (value,)
    plain = all(type(part) in (int, str) for part in parts)
    return f"{value!r:.40}" if plain else f"({type(value).__name__})"
