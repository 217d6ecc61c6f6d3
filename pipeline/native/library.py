"""C functions, built at their first use in a process, for its processor.

Nothing is left on the disk, so that no process can load what another one wrote.
"""

import ctypes
import functools
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import torch
from torch import Tensor

log = logging.getLogger(__name__)

_FOLDER = Path(__file__).parent
_REALS = {torch.float32: "float", torch.float64: "double"}
_FLAGS = (
    *("-O3", "-shared", "-fPIC", "-ffp-contract=fast"),
    *("-fno-math-errno", "-fno-trapping-math"),
)
# A compiler knows the first or the second, or neither.
_PROCESSORS = (("-march=native",), ("-mcpu=native",), ())
_LONGEST_BUILD = 120.0  # seconds

_wanted: ContextVar[bool] = ContextVar("native_kernels", default=False)


@contextmanager
def native_kernels(wanted: bool) -> Iterator[None]:
    """Use functions in C inside if ``wanted`` and possible, else torch operations."""
    token = _wanted.set(wanted)
    try:
        yield
    finally:
        _wanted.reset(token)


class Library:
    """Functions of one source file for one type of real numbers."""

    def __init__(self, loaded: ctypes.CDLL) -> None:
        self._loaded = loaded

    def call(self, name: str, *values: int | float | Tensor | None) -> None:
        """Call the function ``name``; it is given the addresses of tensors.

        Tensors are contiguous, numbers with a fraction are doubles, None is NULL.
        """
        self._loaded[name](*map(_argument, values))


def _argument(
    value: int | float | Tensor | None,
) -> ctypes.c_int64 | ctypes.c_double | ctypes.c_void_p:
    if isinstance(value, Tensor):
        assert value.is_contiguous()
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, int):
        return ctypes.c_int64(value)
    return ctypes.c_void_p() if value is None else ctypes.c_double(value)


def wanted_library(name: str, like: Tensor) -> Library | None:
    """Functions of ``name`` for tensors such as ``like``, if they are to be used.

    They are for the CPU, and a program that is recorded or compiled has none.
    """
    if not _wanted.get() or like.device.type != "cpu" or like.dtype not in _REALS:
        return None
    return None if torch.compiler.is_compiling() else find_library(name, like.dtype)


@functools.cache
def find_library(name: str, dtype: torch.dtype) -> Library | None:
    """Functions of ``name`` for ``dtype``; None, with a warning, if not possible."""
    compiler = shlex.split(os.environ.get("CC", "")) or [_default_compiler()]
    errors: list[Exception] = []
    for processor in _PROCESSORS:
        try:
            return _build((*compiler, *_FLAGS, *processor), name, _REALS[dtype])
        except (OSError, subprocess.SubprocessError) as error:
            errors.append(error)
    log.warning(
        "native_kernels: the C compiler %r failed (%s), so torch operations are used; "
        "install a C compiler, or set CC to the command of one",
        shlex.join(compiler),
        _first_line(errors[-1]),
    )
    return None


def _default_compiler() -> str:
    names = ("cc", "gcc", "clang")
    return next((name for name in names if shutil.which(name)), "cc")


def _build(command: tuple[str, ...], name: str, real: str) -> Library:
    with tempfile.TemporaryDirectory(prefix="kd-train-") as folder:
        built = Path(folder) / f"{name}.so"
        source = _FOLDER / f"{name}.c"
        subprocess.run(
            [*command, f"-DREAL={real}", "-o", str(built), str(source), "-lm"],
            check=True,
            capture_output=True,
            text=True,
            timeout=_LONGEST_BUILD,
        )
        # The process keeps what it has loaded when the folder is removed.
        return Library(ctypes.CDLL(str(built)))


def _first_line(error: Exception) -> str:
    text = getattr(error, "stderr", None) or str(error)
    return str(text).strip().partition("\n")[0]
