"""The header of an array in NumPy's .npy format, read without NumPy: a prefix, then a Python literal that is checked.

Nothing of it is run: `ast.literal_eval` knows constants alone, and pickled arrays (dtype object) are refused by name.
https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
"""

from __future__ import annotations

import ast
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from app.intake.refusals import refused

_MAGIC = b"\x93NUMPY"
_MAX_HEADER_BYTES = 10_000
_MAX_DIMENSIONS = 8
# The sizes of integers; one byte needs no byte order, and of the others only this machine's is read.
_DTYPES = {
    "|u1": "U8", "|i1": "I8", "<u2": "U16", "<i2": "I16", "<u4": "U32", "<i4": "I32", "<u8": "U64", "<i8": "I64",
}  # fmt: skip
ITEM_BYTES = {"U8": 1, "I8": 1, "U16": 2, "I16": 2, "U32": 4, "I32": 4, "U64": 8, "I64": 8}


@dataclass(frozen=True)
class ArrayHeader:
    """An array of integers, C order."""

    dtype: str
    """In safetensors' spelling."""
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def read_npy_header(read: Callable[[int], bytes], name: str) -> ArrayHeader:
    """The header at the start of a stream; `read` gives exactly so many bytes, or fewer at the end. Raises IntakeError."""
    prefix = read(8)
    if len(prefix) < 8 or prefix[:6] != _MAGIC or prefix[6] not in (1, 2, 3):
        raise refused("images_invalid", f"{name} is no array in NumPy's format.")
    width = 2 if prefix[6] == 1 else 4
    raw = read(width)
    length = struct.unpack("<H" if width == 2 else "<I", raw)[0] if len(raw) == width else 0
    if not 0 < length <= _MAX_HEADER_BYTES:
        raise refused("images_invalid", f"{name} announces a header of {length} bytes.")
    header = _literal(read(length), name)
    dtype, shape = header["descr"], header["shape"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise refused(
            "images_invalid", f"{name} has dtype {str(dtype)[:50]!r}; images are uint8, labels integers."
        )
    if header["fortran_order"] is not False:
        raise refused("images_invalid", f"{name} is in Fortran order: save np.ascontiguousarray of it.")
    is_shape = isinstance(shape, tuple) and all(type(size) is int and 0 <= size < 2**40 for size in shape)
    if not is_shape or len(shape) > _MAX_DIMENSIONS:
        raise refused("images_invalid", f"{name} has an impossible shape.")
    return ArrayHeader(_DTYPES[dtype], shape)


def _literal(raw: bytes, name: str) -> dict[str, Any]:
    try:
        header = ast.literal_eval(raw.decode("latin-1").strip())
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        header = None
    if not isinstance(header, dict) or set(header) != {"descr", "fortran_order", "shape"}:
        raise refused("images_invalid", f"The header of {name} cannot be read.")
    return header
