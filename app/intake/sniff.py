"""What kind of file it is, by its first bytes. Its name is never asked: names lie."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Literal

Kind = Literal[
    "zip",
    "tar",
    "tar.gz",
    "gguf",
    "safetensors",
    "pickle",
    "hdf5",
    "parquet",
    "numpy",
    "other_archive",
    "unknown",
]

_PREFIXES: tuple[tuple[bytes, Kind], ...] = (
    (b"GGUF", "gguf"),
    (b"PK\x03\x04", "zip"),
    (b"PK\x05\x06", "zip"),
    (b"\x1f\x8b", "tar.gz"),
    (b"\x89HDF", "hdf5"),
    (b"PAR1", "parquet"),
    (b"\x93NUMPY", "numpy"),
    (b"BZh", "other_archive"),
    (b"\xfd7zXZ", "other_archive"),
    (b"\x28\xb5\x2f\xfd", "other_archive"),
    (b"7z\xbc\xaf", "other_archive"),
    (b"Rar!", "other_archive"),
)
_TAR_MAGIC_AT = 257


def sniff(path: Path) -> Kind:
    """The kind of a file."""
    with path.open("rb") as file:
        head = file.read(512)
    for prefix, kind in _PREFIXES:
        if head.startswith(prefix):
            return kind
    if head[_TAR_MAGIC_AT : _TAR_MAGIC_AT + 5] == b"ustar":
        return "tar"
    # Pickles of protocol 2 and later start so; torch's old format wraps one.
    if len(head) > 2 and head[0] == 0x80 and head[1] in range(2, 6):
        return "pickle"
    if len(head) >= 9 and head[8:9] == b"{" and struct.unpack_from("<Q", head)[0] < 2**32:
        return "safetensors"
    return "unknown"
