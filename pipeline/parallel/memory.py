"""What the C library does with memory that tensors on the CPU give back."""

import ctypes
import functools

# Names of options in the C library's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
# Larger blocks go back to the system when they are freed.
_LARGEST_KEPT = 32 << 20
# A larger free end of the heap goes back to the system.
_MOST_KEPT = 512 << 20


@functools.cache
def reuse_freed_memory() -> bool:
    """Let this process keep freed memory for its next tensors, if it can.

    By default glibc returns blocks of a few hundred KB at once. The system then
    clears every page again, which takes a fifth of a small network's training step.
    Returns whether the C library has the options; others are left as they are.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    kept = mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT)
    return bool(kept and mallopt(_TRIM_THRESHOLD, _MOST_KEPT))
