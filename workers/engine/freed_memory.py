"""Give memory that was freed back to the system.

The C library keeps what it thinks will be asked for again: with tensors of many sizes, that grew to a third of the
memory of quantizing a wide layer.
"""

from __future__ import annotations

import ctypes

_LIBRARY = ctypes.CDLL(None)


def release_freed_memory() -> None:
    """Return whole free pages of all heaps (glibc's malloc_trim; other C libraries are left alone)."""
    trim = getattr(_LIBRARY, "malloc_trim", None)
    if trim is not None:
        trim(0)
