"""What a model weighs: bytes of every file, weights it stands for, bits per weight, and the share that is zero.

Counts what is stored, by reading headers; zeros are counted by streaming the weights in slabs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from app.spec.gguf_layout import GGUF_FILE
from app.spec.report import FileSize
from workers.engine.checkpoint.reader import Checkpoint
from workers.engine.checkpoint.streaming import Slab, row_slabs
from workers.engine.measure.size_gguf import count_gguf
from workers.engine.measure.size_onnx import count_onnx

_WEIGHT_SUFFIXES = (".safetensors", ".onnx", ".data", ".onnx_data", ".gguf")
_PACKED = "weight_packed"
# What a quantized layer stores beside its weights: bytes that count, numbers that are no weights.
_AUXILIARY = (
    "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx", "weight_global_scale",
    "input_scale", "input_global_scale",
    ".absmax", ".nested_absmax", ".quant_map", ".nested_quant_map", ".bitsandbytes__nf4",
)  # fmt: skip
_NF4_ZERO = 7
_SLAB_BYTES = 32 * 2**20
# The first that matches: attention.output.dense is attention's, output.dense alone the feed-forward's.
_COMPONENTS = tuple(
    (part, re.compile(words))
    for part, words in (
        ("scales", r"_scale$|_zero_point$|_shape$|_g_idx$|_scales$|absmax$|quant_map$|__nf4$"),
        ("norms", r"norm|LayerNorm|layer_norm"),
        ("embeddings", r"embed|wte|wpe|token_embd"),
        ("output head", r"lm_head|classifier|pooler|cls\.|^output\.weight"),
        ("attention", r"attn|attention"),
        ("feed-forward", r"mlp|ffn|intermediate|output\.dense|feed_forward"),
    )
)
_OTHER_TENSORS = "other tensors and headers"
COMPONENTS = (
    *("embeddings", "attention", "feed-forward", "output head", "scales"),
    *("norms", _OTHER_TENSORS, "other files"),
)
"""In the order a reader expects them."""


@dataclass(frozen=True)
class Size:
    """The size of a model directory."""

    bytes: int
    files: tuple[FileSize, ...]
    weight_bytes: int
    parameters: int
    """Weights the files stand for: of a packed tensor the logical ones."""
    low_bit_parameters: int
    """Those of them stored in 8 bits or fewer."""
    components: dict[str, int]
    """Bytes by what they hold; they add up to `bytes`."""
    zero_share: float | None
    """Share of the weights that are exactly zero; None for ONNX and GGUF, which may hold them in any form."""

    @property
    def bits_per_weight(self) -> float:
        """All bytes of the weight files, scales and headers included, over all weights."""
        return 8 * self.weight_bytes / max(1, self.parameters)


def measure_size(directory: Path) -> Size:
    """Measure a directory in Hugging Face layout, or one with an ONNX or GGUF file. Raises IntakeError if weights are damaged."""
    files = tuple(
        FileSize(path=str(path.relative_to(directory)), bytes=path.stat().st_size)
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    )
    weight_bytes = sum(file.bytes for file in files if file.path.endswith(_WEIGHT_SUFFIXES))
    zeros: float | None = None
    if (directory / "model.onnx").is_file():
        parameters, low_bit, tensors = count_onnx(directory / "model.onnx")
    elif (directory / GGUF_FILE).is_file():
        parameters, low_bit, tensors = count_gguf(directory / GGUF_FILE)
    else:
        checkpoint = Checkpoint.open(directory)
        parameters, low_bit = _count_parameters(checkpoint)
        tensors = [(entry.name, entry.nbytes) for entry in checkpoint.tensors.values()]
        zeros = sum(_count_zeros(checkpoint)) / max(1, parameters)
    total = sum(file.bytes for file in files)
    return Size(
        bytes=total,
        components=_components(tensors, weight_bytes, total),
        files=files,
        weight_bytes=weight_bytes,
        parameters=parameters,
        low_bit_parameters=low_bit,
        zero_share=zeros,
    )


def _components(tensors: list[tuple[str, int]], weight_bytes: int, total: int) -> dict[str, int]:
    sums = dict.fromkeys((*(name for name, _ in _COMPONENTS), _OTHER_TENSORS), 0)
    for name, nbytes in tensors:
        sums[next((part for part, words in _COMPONENTS if words.search(name)), _OTHER_TENSORS)] += nbytes
    sums[_OTHER_TENSORS] += weight_bytes - sum(sums.values())
    sums["other files"] = total - weight_bytes
    return {part: sums[part] for part in COMPONENTS if sums[part] > 0}


def _count_parameters(checkpoint: Checkpoint) -> tuple[int, int]:
    parameters = low_bit = 0
    for name, entry in checkpoint.tensors.items():
        if name.endswith(_AUXILIARY):
            continue
        elements = entry.fact.elements
        if _is_nf4(checkpoint, name):
            elements *= 2
        elif name.endswith(_PACKED):
            rows, columns = _logical_shape(checkpoint, name)
            elements = rows * columns
        parameters += elements
        if name.endswith(_PACKED) or entry.dtype.itemsize == 1:
            low_bit += elements
    return parameters, low_bit


def _is_nf4(checkpoint: Checkpoint, name: str) -> bool:
    return f"{name}.quant_map" in checkpoint.tensors


def _logical_shape(checkpoint: Checkpoint, packed: str) -> tuple[int, int]:
    entry = checkpoint.tensors[packed]
    if entry.dtype is torch.uint8:
        # Two E2M1 numbers a byte.
        return entry.shape[0], 2 * entry.shape[1]
    rows, columns = checkpoint.read(packed.removesuffix(_PACKED) + "weight_shape").tolist()
    return rows, columns


def _count_zeros(checkpoint: Checkpoint) -> Iterator[int]:
    for name, entry in checkpoint.tensors.items():
        if name.endswith(_AUXILIARY):
            continue
        for slab in row_slabs(entry, _SLAB_BYTES):
            rows = checkpoint.read_rows(name, slab.start, slab.stop)
            if _is_nf4(checkpoint, name):
                yield sum(int(torch.count_nonzero(half == _NF4_ZERO)) for half in (rows & 15, rows >> 4))
            elif name.endswith(_PACKED):
                yield _packed_zeros(checkpoint, slab, rows)
            else:
                values = (
                    rows if entry.dtype.itemsize > 1 or not entry.dtype.is_floating_point else rows.float()
                )
                yield values.numel() - int(torch.count_nonzero(values))


def _packed_zeros(checkpoint: Checkpoint, slab: Slab, words: Tensor) -> int:
    """Codes that stand for zero in a slab: words (rows, words per row) int32, or E2M1 halves of bytes, uint8."""
    if words.dtype is torch.uint8:
        return sum(words.numel() - int(torch.count_nonzero(words & half)) for half in (0x07, 0x70))
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    name = slab.entry.name
    all_rows, columns = _logical_shape(checkpoint, name)
    bits = 32 * words.shape[1] // columns
    codes: Tensor = unpack_from_int32(words, bits, torch.Size((len(words), columns)))
    zero_point_name = name.removesuffix(_PACKED) + "weight_zero_point"
    if zero_point_name not in checkpoint.tensors:
        return codes.numel() - int(torch.count_nonzero(codes))
    packed_points = checkpoint.read(zero_point_name)
    groups = packed_points.shape[1]
    points = unpack_from_int32(packed_points, bits, torch.Size((all_rows, groups)), packed_dim=0)
    group_size = -(-columns // groups)
    spread = points[slab.start : slab.stop].repeat_interleave(group_size, dim=1)[:, :columns]
    return int(torch.count_nonzero(codes == spread))
