"""The header of a GGUF file: metadata, and each tensor's type, shape and place. Our own parser, from the format's
description (ggml, docs/gguf.md): the library's maps the file and believes what it says.

Little-endian, versions 2 and 3. Values longer than anyone needs here are walked over, not kept.
"""

from __future__ import annotations

import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from app.intake.refusals import refused

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_METADATA = 10_000
_MAX_TENSORS = 100_000
_MAX_HEADER_BYTES = 256 * 2**20
_MAX_STRING_BYTES = 4 * 2**20
_KEPT_STRING_BYTES = 256
_MAX_ARRAY = 4_000_000
_MAX_DIMENSIONS = 4
_MAX_ALIGNMENT = 2**16
_NAME = re.compile(r"[!-~]{1,128}")

_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9

# ggml type: name, elements of a block, bytes of a block.
_TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
}  # fmt: skip

Scalar = int | float | bool | str


@dataclass(frozen=True)
class GgufTensor:
    """A tensor: its name, ggml type, and shape with the slowest dimension first, as PyTorch has it."""

    name: str
    type: str
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says about itself. Of the metadata, scalars and short strings alone; of arrays the length."""

    metadata: dict[str, Scalar]
    array_lengths: dict[str, int]
    tensors: tuple[GgufTensor, ...]


def read_gguf(path: Path, name: str) -> GgufHeader:
    """The header of a GGUF file. Raises IntakeError; `name` is what it calls the file."""
    with path.open("rb", buffering=2**20) as file:
        return _Parser(file, path.stat().st_size, name).header()


class _Parser:
    def __init__(self, file: BinaryIO, size: int, name: str) -> None:
        self._file = file
        self._size = size
        self._name = name
        self._at = 0

    def header(self) -> GgufHeader:
        if self._take(4) != MAGIC:
            raise self._wrong("does not start with GGUF")
        version = self._scalar("I")
        if version not in _VERSIONS:
            raise self._wrong(f"has version {version}; versions 2 and 3, little-endian, are read")
        tensor_count, metadata_count = self._scalar("Q"), self._scalar("Q")
        if not 0 < tensor_count <= _MAX_TENSORS or metadata_count > _MAX_METADATA:
            raise self._wrong(f"announces {tensor_count} tensors and {metadata_count} values")
        metadata, lengths = self._metadata(int(metadata_count))
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not _is_alignment(alignment):
            raise self._wrong(f"has alignment {alignment!r}")
        infos = self._tensor_infos(int(tensor_count))
        start = -(-self._at // alignment) * alignment
        return GgufHeader(metadata, lengths, self._placed(infos, start, alignment))

    def _metadata(self, count: int) -> tuple[dict[str, Scalar], dict[str, int]]:
        metadata: dict[str, Scalar] = {}
        lengths: dict[str, int] = {}
        for _ in range(count):
            key = self._key()
            if key in metadata or key in lengths:
                raise self._wrong(f"has the key {key} twice")
            kind = self._scalar("I")
            if kind == _ARRAY:
                lengths[key] = self._skip_array()
            elif kind == _STRING:
                metadata[key] = self._string()
            else:
                metadata[key] = self._scalar(self._code(kind))
        return metadata, lengths

    def _tensor_infos(self, count: int) -> list[tuple[GgufTensor, int]]:
        infos: list[tuple[GgufTensor, int]] = []
        seen: set[str] = set()
        for _ in range(count):
            name = self._key()
            if name in seen:
                raise refused("duplicate_tensor", f"{self._name} has the tensor {name} twice.")
            seen.add(name)
            infos.append(self._tensor_info(name))
        return infos

    def _tensor_info(self, name: str) -> tuple[GgufTensor, int]:
        dimensions = self._scalar("I")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise self._wrong(f"gives {name} {dimensions} dimensions")
        sizes = [int(self._scalar("Q")) for _ in range(int(dimensions))]
        kind, offset = self._scalar("I"), int(self._scalar("Q"))
        if kind not in _TYPES:
            raise refused(
                "unsupported_dtype", f"{self._name}: {name} has ggml type {kind}, which cannot be read."
            )
        type_name, block, block_bytes = _TYPES[int(kind)]
        if any(not 0 < size < 2**40 for size in sizes) or sizes[0] % block:
            raise self._wrong(f"gives {name} the shape {sizes}, which {type_name} cannot have")
        size = math.prod(sizes) // block * block_bytes
        return GgufTensor(name, type_name, tuple(reversed(sizes)), size), offset

    def _placed(
        self, infos: list[tuple[GgufTensor, int]], start: int, alignment: int
    ) -> tuple[GgufTensor, ...]:
        end = 0
        for tensor, offset in sorted(infos, key=lambda info: info[1]):
            if offset % alignment or offset < end:
                raise self._wrong(f"puts {tensor.name} where it overlaps another or is not aligned")
            end = offset + tensor.bytes
            if start + end > self._size:
                raise refused(
                    "truncated",
                    f"{self._name} has {self._size} bytes; {tensor.name} would end at {start + end}.",
                )
        return tuple(tensor for tensor, _ in infos)

    def _skip_array(self) -> int:
        kind, length = self._scalar("I"), int(self._scalar("Q"))
        if length > _MAX_ARRAY:
            raise self._wrong(f"has an array of {length} values")
        if kind == _ARRAY:
            raise self._wrong("has an array of arrays")
        if kind == _STRING:
            for _ in range(length):
                self._skip(self._string_length())
        else:
            self._skip(length * struct.calcsize("<" + self._code(kind)))
        return length

    def _key(self) -> str:
        raw = self._take(min(self._string_length(), 4 * _KEPT_STRING_BYTES))
        key = raw.decode("latin-1")
        if not _NAME.fullmatch(key):
            raise self._wrong(f"has an impossible name: {key[:50]!r}")
        return key

    def _string(self) -> str:
        """A string; the start of a long one, which no one asks for."""
        length = self._string_length()
        kept = self._take(min(length, _KEPT_STRING_BYTES))
        self._skip(length - len(kept))
        return kept.decode("utf-8", "replace")

    def _string_length(self) -> int:
        length = int(self._scalar("Q"))
        if length > _MAX_STRING_BYTES:
            raise self._wrong(f"has a string of {length} bytes")
        return length

    def _code(self, kind: Scalar) -> str:
        code = _SCALARS.get(int(kind))
        if code is None:
            raise self._wrong(f"has a value of unknown type {kind}")
        return code

    def _scalar(self, code: str) -> int | float | bool:
        (value,) = struct.unpack("<" + code, self._take(struct.calcsize("<" + code)))
        return value  # type: ignore[no-any-return]

    def _take(self, count: int) -> bytes:
        self._advance(count)
        raw = self._file.read(count)
        if len(raw) < count:
            raise self._cut()
        return raw

    def _skip(self, count: int) -> None:
        self._advance(count)
        self._file.seek(count, 1)

    def _advance(self, count: int) -> None:
        self._at += count
        if self._at > self._size:
            raise self._cut()
        if self._at > _MAX_HEADER_BYTES:
            raise self._wrong(f"has a header of more than {_MAX_HEADER_BYTES} bytes")

    def _cut(self) -> Exception:
        return refused("truncated", f"{self._name} ends inside its header, after {self._size} bytes.")

    def _wrong(self, why: str) -> Exception:
        return refused("header_invalid", f"{self._name} {why}.")


def _is_alignment(value: int) -> bool:
    return 0 < value <= _MAX_ALIGNMENT and value & (value - 1) == 0 and value % 8 == 0
