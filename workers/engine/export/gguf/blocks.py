"""Bit layouts of GGUF's blocks: codes and scales of a weight -> the bytes of its rows.

Source: ggml's ggml-common.h, which declares the structs, and the layouts its dequantizers read. Low bits of the codes of
a half come before those of the other half, so that one SIMD load unpacks both. All numbers are little-endian.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from workers.engine.quantize.gguf_scales import GRIDS, BlockScales, cut


def pack_blocks(codes: Tensor, scales: BlockScales, format_name: str) -> Tensor:
    """Bytes of a weight: codes (rows, columns), unsigned, in float32 -> uint8 (rows, bytes of a row)."""
    blocks = cut(codes.to(torch.uint8), GRIDS[format_name].block)
    return _PACKERS[format_name](blocks, scales).flatten(1)


def _q8_0(codes: Tensor, scales: BlockScales) -> Tensor:
    # Stored signed; in two's complement the offset of 128 is the highest bit.
    return torch.cat((_float16(scales.d), codes ^ 0x80), dim=2)


def _q4_0(codes: Tensor, scales: BlockScales) -> Tensor:
    return torch.cat((_float16(scales.d), _nibbles(codes, 32)), dim=2)


def _q4_1(codes: Tensor, scales: BlockScales) -> Tensor:
    return torch.cat((_float16(scales.d), _float16(_required(scales.minimum)), _nibbles(codes, 32)), dim=2)


def _q5_0(codes: Tensor, scales: BlockScales) -> Tensor:
    return torch.cat((_float16(scales.d), _fifth_bits(codes), _nibbles(codes & 15, 32)), dim=2)


def _q5_1(codes: Tensor, scales: BlockScales) -> Tensor:
    floats = _float16(scales.d), _float16(_required(scales.minimum))
    return torch.cat((*floats, _fifth_bits(codes), _nibbles(codes & 15, 32)), dim=2)


def _q4_k(codes: Tensor, scales: BlockScales) -> Tensor:
    floats = _float16(scales.d), _float16(_required(scales.minimum))
    return torch.cat((*floats, _six_bits(scales), _nibbles(codes, 64)), dim=2)


def _q5_k(codes: Tensor, scales: BlockScales) -> Tensor:
    floats = _float16(scales.d), _float16(_required(scales.minimum))
    # Byte i holds the fifth bit of element i of each of the eight groups, the first group lowest.
    high = _gathered(cut(codes >> 4, 32, dim=2), step=1)
    return torch.cat((*floats, _six_bits(scales), high, _nibbles(codes & 15, 64)), dim=2)


def _q6_k(codes: Tensor, scales: BlockScales) -> Tensor:
    multipliers = cut(_required(scales.multiplier).to(torch.int8).view(torch.uint8), 16)
    low = _nibbles(codes & 15, 128)
    high = _gathered(cut(codes >> 4, 4, 32, dim=2), step=2).flatten(2)
    return torch.cat((low, high, multipliers, _float16(scales.d)), dim=2)


_PACKERS: dict[str, Callable[[Tensor, BlockScales], Tensor]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}


def _float16(values: Tensor) -> Tensor:
    """(rows, blocks) -> uint8 (rows, blocks, 2)."""
    return cut(values.half().contiguous().view(torch.uint8), 2)


def _nibbles(codes: Tensor, span: int) -> Tensor:
    """Two codes a byte: of each `span` codes the first half in the low nibbles, the second in the high ones."""
    spans = cut(codes, 2, span // 2, dim=2)
    return (spans[:, :, :, 0] | spans[:, :, :, 1] << 4).flatten(2)


def _fifth_bits(codes: Tensor) -> Tensor:
    """Bit k of a 32-bit word is the fifth bit of code k: (rows, blocks, 32) -> (rows, blocks, 4)."""
    return _gathered(cut(codes >> 4, 8, dim=2).transpose(2, 3), step=1)


def _gathered(bits: Tensor, *, step: int) -> Tensor:
    """OR the last dimension but one into bytes, entry k shifted by k·step."""
    shifted = [bits.select(-2, k) << k * step for k in range(bits.shape[-2])]
    return torch.stack(shifted, dim=-1).sum(dim=-1, dtype=torch.uint8)


def _six_bits(scales: BlockScales) -> Tensor:
    """Eight 6-bit scales and eight minimums in 12 bytes; the upper four's two highest bits lie above the lower four's."""
    sc = cut(_required(scales.multiplier).to(torch.uint8), 8)
    m = cut(_required(scales.low_multiplier).to(torch.uint8), 8)
    low = sc[..., :4] | sc[..., 4:] >> 4 << 6
    middle = m[..., :4] | m[..., 4:] >> 4 << 6
    high = sc[..., 4:] & 15 | (m[..., 4:] & 15) << 4
    return torch.cat((low, middle, high), dim=2)


def _required(values: Tensor | None) -> Tensor:
    if values is None:
        raise ValueError("the format stores a number that these scales lack")
    return values
