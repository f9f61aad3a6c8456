"""The header of a safetensors file: 8 bytes of length, then JSON with each tensor's dtype, shape and place.

Everything the header of a file says is checked against it; nothing of the data is read.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.intake.refusals import refused
from app.intake.strict_json import parse_object
from app.spec.facts import BYTES_PER_ELEMENT, TensorFact

# A shard of 5 GB with a tensor for every 10 kB has half of this. The format itself allows 100 MB.
_MAX_HEADER_BYTES = 16 * 2**20
MAX_TENSORS = 200_000
_MAX_DIMENSIONS = 8
_NAME = re.compile(r"[!-~]{1,256}")


@dataclass(frozen=True)
class _Place:
    fact: TensorFact
    start: int
    end: int


def read_header(path: Path, name: str) -> tuple[TensorFact, ...]:
    """The tensors of a safetensors file, in order of their bytes. Raises IntakeError; `name` is what it calls the file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise refused("truncated", f"{name} has {size} bytes, too few for a safetensors header.")
        (length,) = struct.unpack("<Q", prefix)
        if length > _MAX_HEADER_BYTES:
            raise refused(
                "header_invalid",
                f"{name} announces a header of {length} bytes; at most {_MAX_HEADER_BYTES} are read.",
            )
        if 8 + length > size:
            raise refused("truncated", f"{name} ends inside its header: {size} bytes of {8 + length}.")
        header = parse_object(
            file.read(length),
            refuse=lambda why: refused("header_invalid", f"The header of {name} is wrong: {why}."),
            refuse_duplicate=lambda why: refused("duplicate_tensor", f"In the header of {name}, {why}."),
        )
    return _tensors(header, size - 8 - length, name)


def header_bytes(tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """The header of a file with these tensors, dtype and shape by name, whose bytes lie one behind the other in this order."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * BYTES_PER_ELEMENT[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return struct.pack("<Q", len(encoded)) + encoded


def _tensors(header: dict[str, Any], data_bytes: int, name: str) -> tuple[TensorFact, ...]:
    header.pop("__metadata__", None)
    if not 0 < len(header) <= MAX_TENSORS:
        raise refused("header_invalid", f"{name} has {len(header)} tensors.")
    places = sorted(
        (_place(key, entry, name) for key, entry in header.items()), key=lambda p: (p.start, p.end)
    )
    end = 0
    for place in places:
        if place.start != end:
            what = "overlap" if place.start < end else "leave a gap"
            raise refused(
                "header_invalid", f"In {name}, the bytes of tensors {what} before {place.fact.name}."
            )
        end = place.end
    if end > data_bytes:
        raise refused("truncated", f"{name} has {data_bytes} bytes of tensors; its header promises {end}.")
    if end < data_bytes:
        raise refused("header_invalid", f"{name} has {data_bytes - end} bytes behind its last tensor.")
    return tuple(place.fact for place in places)


def _place(key: str, entry: Any, name: str) -> _Place:
    if not _NAME.fullmatch(key):
        raise refused("header_invalid", f"{name} has a tensor with an impossible name: {key[:50]!r}.")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise refused("header_invalid", f"{name}: the entry of {key} is not dtype, shape and data_offsets.")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or not dtype.isascii() or len(dtype) > 32:
        raise refused("header_invalid", f"{name}: the dtype of {key} is no name.")
    if dtype not in BYTES_PER_ELEMENT:
        raise refused(
            "unsupported_dtype", f"{name}: {key} has dtype {dtype}, which Modelpress cannot work on."
        )
    if not _are_sizes(shape) or len(shape) > _MAX_DIMENSIONS:
        raise refused("header_invalid", f"{name}: the shape of {key} is no list of sizes.")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise refused("header_invalid", f"{name}: the data_offsets of {key} are no range.")
    start, end = offsets
    if math.prod(shape) * BYTES_PER_ELEMENT[dtype] != end - start:
        raise refused(
            "header_invalid", f"{name}: {key} is {dtype} {shape}, which does not take {end - start} bytes."
        )
    return _Place(TensorFact(name=key, dtype=dtype, shape=tuple(shape)), start, end)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 2**53 for v in value)
