"""Read a GGUF file: its metadata, where its tensors lie, and their values, without mapping more than the header."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, ReaderTensor, dequantize
from torch import Tensor

from app.errors import IntakeError
from workers.engine.checkpoint.layout import drop_from_page_cache

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3")
_VOCABULARY_KEYS = ("tokenizer.ggml.tokens", "tokenizer.ggml.merges")


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file, known by its header. Make one with `read_gguf`."""

    file: Path
    metadata: dict[str, Any]
    """Values by key; of the arrays of strings only the vocabulary and its merges in full."""
    tensors: tuple[ReaderTensor, ...]

    @property
    def architecture(self) -> str:
        """The architecture in llama.cpp's words."""
        return str(self.metadata["general.architecture"])

    def get(self, key: str) -> Any:
        """A value of the architecture's own section, or None."""
        return self.metadata.get(f"{self.architecture}.{key}")


class _HeaderReader(GGUFReader):  # type: ignore[misc]  # the package has no types
    """The package's reader without an array object per vocabulary entry, which costs it seconds."""

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        if GGUFValueType(raw_type) is not GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        item = GGUFValueType(self._get(orig_offs, np.uint32)[0])
        count, end = int(self._get(orig_offs + 4, np.uint64)[0]), orig_offs + 12
        if item is GGUFValueType.STRING:
            header = memoryview(self.data)
            for _ in range(count):
                end += 8 + int.from_bytes(header[end : end + 8], "little")
        else:
            end += count * np.dtype(self.gguf_scalar_to_np[item]).itemsize
        return end - orig_offs, [self.data[orig_offs:end]], [], [GGUFValueType.ARRAY]


def read_gguf(gguf_file: Path) -> GgufFile:
    """Read the header. Raises IntakeError when it is damaged or of an architecture that is not converted."""
    from transformers.integrations.gguf import read_gguf_metadata

    try:
        metadata, _ = read_gguf_metadata(str(gguf_file), _VOCABULARY_KEYS)
        tensors = tuple(_HeaderReader(gguf_file).tensors)
    except (ValueError, KeyError, IndexError, struct.error) as error:
        raise IntakeError(
            f"{gguf_file.name} is not a GGUF file that can be read: {error}.",
            code="damaged_weights",
            hint="Upload the file again and compare its sha256 with the original's.",
        ) from error
    source = GgufFile(gguf_file, metadata, tensors)
    if source.architecture not in ARCHITECTURES:
        raise refused(f"the architecture {source.architecture}", code="unsupported_architecture")
    return source


def refused(what: str, *, code: str = "unsupported_gguf") -> IntakeError:
    """The error for something in a GGUF file that has no equivalent."""
    return IntakeError(
        f"The GGUF file has {what}, which cannot be converted faithfully.",
        code=code,
        hint=f"Upload the safetensors of this model instead. GGUF is read for {', '.join(ARCHITECTURES)}.",
    )


def dequantized(source: GgufFile, tensor: ReaderTensor, begin: float, end: float) -> Tensor:
    """The share of a tensor from `begin` to `end` (0 to 1, on row boundaries) in fp32, flat."""
    first, last = round(begin * tensor.n_bytes), round(end * tensor.n_bytes)
    buffer = bytearray(last - first)
    descriptor = os.open(source.file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        done = 0
        while done < len(buffer):
            count = os.preadv(descriptor, [memoryview(buffer)[done:]], int(tensor.data_offset) + first + done)
            if count == 0:
                raise refused(f"an end before its tensor {tensor.name}", code="damaged_weights")
            done += count
        drop_from_page_cache(descriptor, int(tensor.data_offset) + first, len(buffer))
    finally:
        os.close(descriptor)
    plain = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}
    raw = np.frombuffer(buffer, dtype=plain.get(tensor.tensor_type, np.uint8))
    return torch.from_numpy(np.asarray(dequantize(raw, tensor.tensor_type), dtype=np.float32)).flatten()
