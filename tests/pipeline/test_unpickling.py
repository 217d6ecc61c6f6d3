"""Hostile and broken pickles: nothing runs, everything is refused in one sentence."""

import contextlib
import io
import os
import pickle
import random
import struct
import subprocess
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.datasets.pyg_pickles import as_array, plain_integer, sample_fields
from pipeline.datasets.unpickling import UnsafePickle
from tests.pipeline.oc20_files import pyg1, pyg2, pyg_fields, slabs

FIELDS = pyg_fields(slabs(1)[0])


class Call:
    """Pickles as a call of ``function``."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.made = (function, arguments)

    def __reduce__(self) -> Any:
        return self.made


def _read_all(raw: bytes) -> None:
    """What reading a sample does at most: every field decoded."""
    for value in sample_fields(raw).values():
        if not isinstance(value, str):
            as_array(value)


def _global(module: str, name: str) -> bytes:
    texts = [module.encode(), name.encode()]
    return b"".join(b"\x8c" + bytes([len(t)]) + t for t in texts) + b"\x93"


def _text(words: str) -> bytes:
    return b"X" + struct.pack("<I", len(words)) + words.encode()


def _torch_file(payload: Any) -> bytes:
    """What torch.save wrote in its old format, with ``payload`` in it."""
    stream = io.BytesIO()
    torch.save(payload, stream, _use_new_zipfile_serialization=False)
    return stream.getvalue()


# Each: how to leave a mark at a path, and the name that must be refused.
ATTACKS: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "system": (
        lambda mark: pickle.dumps(Call(os.system, f"touch {mark}")),
        "posix.system",
    ),
    "system, protocol 2": (
        lambda mark: pickle.dumps(Call(os.system, f"touch {mark}"), protocol=2),
        "posix.system",
    ),
    "eval": (
        lambda mark: pickle.dumps(Call(eval, f"open({str(mark)!r}, 'w')")),
        "builtins.eval",
    ),
    "exec": (
        lambda mark: pickle.dumps(Call(exec, f"open({str(mark)!r}, 'w')")),
        "builtins.exec",
    ),
    "open": (lambda mark: pickle.dumps(Call(open, str(mark), "w")), "io.open"),
    "process": (
        lambda mark: pickle.dumps(Call(subprocess.check_call, ["touch", str(mark)])),
        "subprocess.check_call",
    ),
    "inside a sample": (
        lambda mark: pyg2(FIELDS | {"note": Call(os.system, f"touch {mark}")}),
        "posix.system",
    ),
    "inside an old sample": (
        lambda mark: pyg1(FIELDS | {"note": Call(os.system, f"touch {mark}")}),
        "posix.system",
    ),
    "attribute of a module": (
        lambda mark: (
            b"\x80\x04"
            + _global("torch.serialization", "os.system")
            + _text(f"touch {mark}")
            + b"\x85R."
        ),
        "torch.serialization.os.system",
    ),
    "attribute of an allowed name": (
        lambda mark: (
            b"\x80\x04"
            + _global(
                "torch_geometric.data.data", "Data.__init__.__globals__.__class__"
            )
            + b"."
            + str(mark).encode()
        ),
        "Data.__init__.__globals__.__class__",
    ),
    "state for a class": (
        lambda mark: (
            b"\x80\x04"
            + _global("copyreg", "_reconstructor")
            + _global("torch_geometric.data.data", "Data")
            + _global("builtins", "object")
            + b"N\x87R."
            + str(mark).encode()
        ),
        "copyreg._reconstructor",
    ),
    "object array": (
        lambda mark: pyg2(
            FIELDS | {"y": np.array([Call(os.system, f"touch {mark}")], object)}
        ),
        "O8",
    ),
    "file in a storage": (
        lambda mark: pyg2(
            FIELDS
            | {
                "y": Call(
                    torch.storage._load_from_bytes,
                    _torch_file(Call(os.system, f"touch {mark}")),
                )
            }
        ),
        "numbers are needed",
    ),
    "old instruction for objects": (
        lambda mark: b"(S'touch " + str(mark).encode() + b"'\nios\nsystem\n.",
        "unknown instruction 0x53",
    ),
    "registered extension": (lambda mark: b"\x80\x02\x82\x01.", "0x82"),
    "object with keywords": (
        lambda mark: b"\x80\x04" + _global("torch", "Tensor") + b")}\x92.",
        "torch.Tensor",
    ),
    "reference outside": (lambda mark: b"\x80\x02X\x01\x00\x00\x00aQ.", "outside"),
}


@pytest.mark.parametrize("name", list(ATTACKS))
def test_hostile_pickles_are_refused_and_leave_no_mark(
    name: str, tmp_path: Path
) -> None:
    attack, word = ATTACKS[name]
    mark = tmp_path / "mark"
    with pytest.raises(UnsafePickle) as refusal:
        _read_all(attack(mark))
    assert word in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert not mark.exists()


RUNS = ["system", "eval", "exec", "open", "process", "inside a sample", "object array"]
RUNS += ["inside an old sample", "attribute of a module", "system, protocol 2"]


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_attacks_are_real(name: str, tmp_path: Path) -> None:
    """Python's own reader runs them."""
    mark = tmp_path / "mark"
    pickle.loads(ATTACKS[name][0](mark))
    assert mark.exists()


def test_a_hostile_file_in_a_tensor_is_refused(tmp_path: Path) -> None:
    """The storage of a tensor is a file of its own, which torch would unpickle."""
    mark = tmp_path / "mark"
    inner = _torch_file(Call(os.system, f"touch {mark}"))
    storage = Call(torch.storage._load_from_bytes, inner)
    tensor = Call(
        torch._utils._rebuild_tensor_v2, storage, 0, (1,), (1,), False, OrderedDict()
    )
    fields = sample_fields(pyg2(FIELDS | {"y": tensor}))
    with pytest.raises(UnsafePickle, match=r"'posix\.system'"):
        as_array(fields["y"])
    assert not mark.exists()


def test_torch_files_in_the_zip_format_are_refused() -> None:
    stream = io.BytesIO()
    torch.save(torch.zeros(2).untyped_storage(), stream)
    storage = Call(torch.storage._load_from_bytes, stream.getvalue())
    with pytest.raises(UnsafePickle):
        as_array(sample_fields(pyg2(FIELDS | {"y": _tensor(storage)}))["y"])


def _tensor(
    storage: Any = None, offset: Any = 0, size: Any = (6,), stride: Any = (1,)
) -> Call:
    """A tensor over 0 to 5 that says of itself what it is told."""
    if storage is None:
        storage = torch.arange(6.0)._typed_storage()
    return Call(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False)


@pytest.mark.parametrize(
    ("size", "stride", "offset", "expected"),
    [
        ((6,), (1,), 0, [0, 1, 2, 3, 4, 5]),
        ((2, 3), (3, 1), 0, [[0, 1, 2], [3, 4, 5]]),
        ((3, 2), (1, 3), 0, [[0, 3], [1, 4], [2, 5]]),
        ((2,), (2,), 1, [1, 3]),
        ((), (), 4, 4),
        ((0,), (1,), 0, []),
    ],
)
def test_views_are_read_as_torch_reads_them(
    size: Any, stride: Any, offset: int, expected: Any
) -> None:
    raw = pyg2({"y": _tensor(None, offset, size, stride)})
    assert torch.arange(6.0).as_strided(size, stride, offset).tolist() == expected
    found = as_array(sample_fields(raw)["y"])
    assert found.tolist() == expected
    assert found.dtype == np.float32


@pytest.mark.parametrize(
    "tampered",
    [
        {"size": (7,)},
        {"offset": 1},
        {"stride": (2,)},
        {"size": (10**12,), "stride": (0,)},
        {"size": (2**62, 4), "stride": (1, 1)},
        {"size": (-1,)},
        {"size": (6,), "stride": (-1,), "offset": 5},
        {"offset": -4},
        {"size": (1,) * 40, "stride": (1,) * 40},
        {"size": (True,)},
        {"size": (6.0,)},
        {"size": [6]},
        {"size": (6,), "stride": ()},
        {"storage": b"no storage"},
        {"storage": None, "offset": None},
    ],
)
def test_tensors_beyond_their_storage_are_refused(tampered: dict[str, Any]) -> None:
    with pytest.raises(UnsafePickle):
        _read_all(pyg2({"y": _tensor(**tampered)}))


@pytest.mark.parametrize("count", [5, 7, -1, 2**40])
def test_storages_of_another_length_than_stated_are_refused(count: int) -> None:
    raw = _torch_file(torch.arange(6.0)._typed_storage())
    assert raw[-32:-24] == struct.pack("<q", 6)
    storage = Call(
        torch.storage._load_from_bytes,
        raw[:-32] + struct.pack("<q", count) + raw[-24:],
    )
    with pytest.raises(UnsafePickle, match="cut off"):
        _read_all(pyg2({"y": _tensor(storage)}))


@pytest.mark.parametrize(
    "dtype",
    ["float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8"],
)
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_numbers_of_every_kind_come_through(dtype: str, protocol: int) -> None:
    array = (np.arange(12).reshape(3, 4) * 3).astype(dtype)
    fields = {
        "tensor": torch.from_numpy(array),
        "turned": torch.from_numpy(array).T,
        "array": array,
        "fortran": np.asfortranarray(array),
        "other_bytes": array.astype(array.dtype.newbyteorder()),
        "scalar": array[2, 3],
    }
    found = sample_fields(pyg2(fields, protocol))
    assert set(found) == set(fields)
    for name, value in fields.items():
        assert np.array_equal(as_array(found[name]), np.asarray(value)), name
    boolean = sample_fields(pyg2({"b": torch.tensor([True, False])}, protocol))
    assert as_array(boolean["b"]).tolist() == [True, False]


def test_plain_values_come_through() -> None:
    values = {
        "a": 1.5,
        "b": -(2**70),
        "c": "wörter",
        "d": [1, [2, "x"]],
        "e": {"k": (1, 2, 3, 4)},
        "f": False,
        "g": 300,
        "h": -5,
        "i": list(range(2000)),
    }
    for protocol in (2, 3, 4, 5):
        assert sample_fields(pyg1(values, protocol)) == values


def test_unset_fields_are_left_out() -> None:
    assert set(sample_fields(pyg1({"y": 1.0}))) == {"y"}


@pytest.mark.parametrize("make", [pyg1, pyg2])
def test_state_with_special_names_is_only_data(make: Any) -> None:
    """Python's reader would call or set these; here they are entries."""
    odd = {"__class__": "x", "__setstate__": "y", "__reduce__": "z"}
    raw = make({"odd": odd, "y": 2.0})
    assert sample_fields(raw)["odd"] == odd


@pytest.mark.parametrize(
    "target",
    [
        _global("torch._utils", "_rebuild_tensor_v2"),
        _global("torch_geometric.data.data", "Data"),
        _global("collections", "OrderedDict"),
        b"]",
        b"}",
        b"K\x01",
    ],
)
def test_state_is_set_on_nothing_but_stand_ins(target: bytes) -> None:
    raw = b"\x80\x04" + target + b"}" + _text("__defaults__") + b")sb."
    with pytest.raises(UnsafePickle, match="sets attributes"):
        sample_fields(raw)
    # And nothing remains of it for the next sample.
    assert as_array(sample_fields(pyg2(FIELDS))["pos"]).shape == (5, 3)


@pytest.mark.parametrize(
    "function", [b"K\x01", b"]", _global("torch_geometric.data.data", "DataEdgeAttr")]
)
def test_only_known_names_are_called(function: bytes) -> None:
    with pytest.raises(UnsafePickle, match="calls"):
        sample_fields(b"\x80\x04" + function + b")R.")
    with pytest.raises(UnsafePickle, match="makes an object"):
        sample_fields(b"\x80\x04" + function + b")\x81.")


def test_a_memo_is_as_large_as_what_is_in_it() -> None:
    """Python's reader takes 32 GB for this one."""
    with pytest.raises(UnsafePickle, match="NoneType"):
        sample_fields(b"\x80\x02Nr\xff\xff\xff\x7f.")


def _doubled(times: int) -> bytes:
    """A tuple of two of the same tuple of two of ..., in few bytes."""
    return b")" + b"q\x01h\x01\x86" * times


def test_nesting_that_explodes_is_never_followed() -> None:
    as_key = b"\x80\x02}" + _doubled(200) + b"Ns."
    with pytest.raises(UnsafePickle, match="keys are no words"):
        sample_fields(as_key)
    many = _global("torch._utils", "_rebuild_tensor_v2")
    storage = _global("torch.storage", "_load_from_bytes") + b"C\x01a\x85R"
    size = _doubled(200)
    raw = b"\x80\x04" + many + b"(" + storage + b"K\x00" + size + size + b"tR."
    with pytest.raises(UnsafePickle, match="impossible shape"):
        sample_fields(raw)


def test_depth_does_not_matter() -> None:
    with pytest.raises(UnsafePickle, match="not a PyG sample"):
        sample_fields(b"\x80\x02" + b"]" + b"\x85" * 1_000_00 + b".")


def test_lengths_beyond_the_data_are_refused() -> None:
    for raw in (
        b"\x80\x04\x8e" + struct.pack("<Q", 2**60) + b"a.",
        b"\x80\x04\x96" + struct.pack("<Q", 2**60) + b"a.",
        b"\x80\x04B" + struct.pack("<I", 2**31) + b"a.",
        b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b"N.",
    ):
        with pytest.raises(UnsafePickle, match="cut off"):
            sample_fields(raw)


@pytest.mark.parametrize("make", [pyg1, pyg2])
def test_every_cut_is_refused(make: Any) -> None:
    raw = make({name: FIELDS[name] for name in ("y", "sid", "cell")})
    for end in range(len(raw)):
        with pytest.raises(UnsafePickle):
            _read_all(raw[:end])


def test_changed_bytes_are_refused_or_harmless() -> None:
    rng = random.Random(0)
    for _ in range(1500):
        make = rng.choice([pyg1, pyg2])
        raw = bytearray(make({name: FIELDS[name] for name in ("y", "cell", "fixed")}))
        for _ in range(rng.choice([1, 1, 2, 8])):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
        with contextlib.suppress(UnsafePickle):
            _read_all(bytes(raw))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_integers_and_nothing_else_are_lengths(protocol: int) -> None:
    assert plain_integer(pickle.dumps(20, protocol)) == 20
    assert plain_integer(pickle.dumps(np.int64(70000), protocol)) == 70000
    for wrong in ("20", 2.0, [20], None, Call(os.getcwd)):
        with pytest.raises(UnsafePickle):
            plain_integer(pickle.dumps(wrong, protocol))
