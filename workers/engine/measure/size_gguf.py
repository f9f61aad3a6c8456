"""Count the weights a GGUF file stands for."""

from __future__ import annotations

from pathlib import Path

from gguf import GGMLQuantizationType

from workers.engine.checkpoint.gguf_file import read_gguf

_FLOATS = frozenset({GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16})


def count_gguf(path: Path) -> tuple[int, int, list[tuple[str, int]]]:
    """Weights of a file, those of them stored in about 8 bits or fewer, and the bytes of each tensor by name."""
    tensors = read_gguf(path).tensors
    parameters = sum(int(t.n_elements) for t in tensors)
    low_bit = sum(int(t.n_elements) for t in tensors if t.tensor_type not in _FLOATS)
    return parameters, low_bit, [(t.name, int(t.n_bytes)) for t in tensors]
