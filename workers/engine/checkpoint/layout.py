"""The safetensors container: dtype names, headers, and which files of a directory hold a model's weights.

Layout of a file: 8 bytes little-endian header length, a JSON header, then the tensors without gaps.
Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from app.errors import IntakeError
from app.spec.facts import BYTES_PER_ELEMENT, TensorFact

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# The format's own limit: no honest header comes near it.
_MAX_HEADER_BYTES = 100_000_000

TORCH_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
DTYPE_NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in TORCH_DTYPES.items()}


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies: `nbytes` bytes from `offset` in `file`, row-major."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int

    @property
    def rows(self) -> int:
        """Size of the first dimension; a scalar is one row."""
        return self.shape[0] if self.shape else 1

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape without the first dimension."""
        return self.shape[1:]

    @property
    def row_nbytes(self) -> int:
        """Bytes of one row; 0 for a tensor without rows."""
        return self.nbytes // self.rows if self.rows else 0

    @property
    def fact(self) -> TensorFact:
        """What the header says of it, without the place."""
        return TensorFact(name=self.name, dtype=DTYPE_NAMES[self.dtype], shape=self.shape)


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files that transformers would load from a directory, in order. Raises IntakeError if none."""
    single, index = directory / SINGLE_FILE, directory / INDEX_FILE
    if single.is_file():
        return [single]
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        return [directory / name for name in names]
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise IntakeError(
            "The model has no safetensors files.",
            code="no_weights",
            hint="Save the model with save_pretrained(), which writes safetensors.",
        )
    return files


def read_entries(file: Path) -> Iterator[TensorEntry]:
    """The tensors of one safetensors file in the order they are stored. Raises IntakeError if the header lies."""
    try:
        size = file.stat().st_size
        with file.open("rb", buffering=0) as opened:
            length = int.from_bytes(opened.read(8), "little")
            if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
                raise _damaged(file, "its header is longer than the file")
            header = json.loads(opened.read(length))
    except (OSError, ValueError) as error:
        raise _damaged(file, str(error)) from error
    header.pop("__metadata__", None)
    position = 0
    for name, fields in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        entry = _entry(name, fields, file, data_start=8 + length)
        if entry.offset != 8 + length + position:
            raise _damaged(file, f"{name} does not begin where the tensor before it ends")
        position += entry.nbytes
        yield entry
    if 8 + length + position != size:
        raise _damaged(file, f"it should have {8 + length + position} bytes and has {size}")


def _entry(name: str, fields: dict[str, Any], file: Path, *, data_start: int) -> TensorEntry:
    dtype = TORCH_DTYPES.get(fields["dtype"])
    if dtype is None:
        raise IntakeError(
            f"{name} in {file.name} has dtype {fields['dtype']}, which Modelpress does not read.",
            code="unsupported_dtype",
            hint=f"Convert the model to one of {', '.join(BYTES_PER_ELEMENT)}.",
        )
    begin, end = fields["data_offsets"]
    fact = TensorFact(name=name, dtype=fields["dtype"], shape=tuple(fields["shape"]))
    if end - begin != fact.nbytes:
        raise _damaged(file, f"{name} has {end - begin} bytes, its shape and dtype say {fact.nbytes}")
    return TensorEntry(name, dtype, fact.shape, file, data_start + begin, fact.nbytes)


def _damaged(file: Path, what: str) -> IntakeError:
    return IntakeError(
        f"{file.name} is damaged: {what}.",
        code="damaged_weights",
        hint="Upload the file again and compare its sha256 with the original's.",
    )


def encode_header(tensors: list[TensorFact]) -> tuple[bytes, dict[str, int]]:
    """The bytes before the first tensor, and each tensor's offset from the start of the file."""
    fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begins: dict[str, int] = {}
    position = 0
    for tensor in tensors:
        begins[tensor.name] = position
        span = [position, position + tensor.nbytes]
        fields[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": span}
        position += tensor.nbytes
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: start + begin for name, begin in begins.items()}


def drop_from_page_cache(descriptor: int, offset: int, length: int) -> None:
    """Tell the kernel that a range of a file is not needed again; its boundary pages go with their neighbours."""
    page = os.sysconf("SC_PAGE_SIZE")
    start = offset // page * page
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, start, offset + length - start, os.POSIX_FADV_DONTNEED)
