"""Read-only memory maps that keep no file descriptor open.

Python's ``mmap`` duplicates the descriptor for the life of the map; a store has
thousands of shards and the usual limit is 1024 open files.
"""

import ctypes
import errno
import mmap
import os
import resource
import weakref
from pathlib import Path

import numpy as np

from pipeline.store.shard import Bytes

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_ssize_t,
]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_FAILED = ctypes.c_void_p(-1).value


def map_file(file: Path) -> Bytes:
    """Bytes of a file as a read-only array; unmapped when no view is left."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        size = os.fstat(descriptor).st_size
        if size == 0:
            return np.empty(0, np.uint8)
        address = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
    finally:
        os.close(descriptor)
    if address == _FAILED:
        code = ctypes.get_errno() or errno.ENOMEM
        raise OSError(code, os.strerror(code), str(file))
    owner = (ctypes.c_ubyte * size).from_address(address)
    # At exit the process frees its maps itself, while other threads may still read.
    weakref.finalize(owner, _libc.munmap, address, size).atexit = False
    view = np.frombuffer(memoryview(owner), np.uint8)
    view.flags.writeable = False
    return view


def advise_will_need(view: Bytes) -> None:
    """Ask the kernel to read a mapped view ahead; returns at once."""
    address = view.ctypes.data
    begin = address - address % mmap.PAGESIZE
    _libc.madvise(begin, address + len(view) - begin, mmap.MADV_WILLNEED)


def disk_reads() -> int:
    """Page faults that waited for a disk and blocks read, since this process began.

    Read-ahead that works spares the faults, so these alone would not tell.
    """
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_majflt + usage.ru_inblock
