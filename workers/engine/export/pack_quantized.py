"""Write the compressed-tensors format `pack-quantized`: integers of 2 to 8 bits, packed; inputs are not rounded.

Codes are stored as q + 2^(bits − 1), densely, least significant bits first, in int32 words: along each row for
`weight_packed`, along each column for `weight_zero_point`. `weight_scale` keeps the checkpoint's own dtype.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from app.spec.facts import TensorFact
from workers.engine.export.stored_layer import Parts, StoredLayer
from workers.engine.quantize.grid import Grid
from workers.engine.quantize.layer_fit import LayerFit

FORMAT = "pack-quantized"
# 32 codes fill a whole number of words at any width: slabs of zero points must begin at a multiple of this many rows.
ROWS_PER_WORD_GROUP = 32


@dataclass(frozen=True)
class PackedLayer(StoredLayer):
    """Integers in words, scales in the checkpoint's dtype, and the shape."""

    symmetric: bool

    @property
    def row_multiple(self) -> int:
        """Zero points of this many rows fill whole words."""
        return ROWS_PER_WORD_GROUP

    @property
    def alike(self) -> Hashable:
        """All but name and rows."""
        return replace(self, module="", rows=0)

    @property
    def groups(self) -> int:
        """Scales per row."""
        return self.columns // self.group_size if self.group_size else 1

    @property
    def packed(self) -> TensorFact:
        """(rows, words): the codes."""
        return self._fact("weight_packed", "I32", (self.rows, words(self.columns, self.bits)))

    @property
    def scale(self) -> TensorFact:
        """(rows, groups)."""
        return self._fact("weight_scale", self.dtype, (self.rows, self.groups))

    @property
    def shape(self) -> TensorFact:
        """(2,): rows and columns."""
        return self._fact("weight_shape", "I64", (2,))

    @property
    def zero_point(self) -> TensorFact:
        """(words, groups), asymmetric only."""
        return self._fact("weight_zero_point", "I32", (words(self.rows, self.bits), self.groups))

    def facts(self) -> list[TensorFact]:
        """All its tensors."""
        always = [self.packed, self.scale, self.shape]
        return always if self.symmetric else [*always, self.zero_point]

    def grid(self, peak: float) -> Grid:  # noqa: ARG002 - the same for all weights
        """What its codes may be."""
        return Grid(self.bits, self.symmetric)

    def parts(self, fit: LayerFit, start: int) -> Parts:
        """What some rows, from `start` on, become."""
        found: Parts = {
            self.packed.name: (start, pack_rows(fit.codes.to(torch.int8), self.bits).cpu()),
            self.scale.name: (start, self._in_dtype(fit.scale)),
        }
        if start == 0:
            found[self.shape.name] = (0, torch.tensor([self.rows, self.columns]))
        if not self.symmetric:
            zeros = pack_columns(fit.zero.to(torch.int8), self.bits).cpu()
            found[self.zero_point.name] = (start * self.bits // 32, zeros)
        return found

    def scheme(self) -> dict[str, Any]:
        """Its entry in `config_groups`, without the targets."""
        weights = {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": self.symmetric,
            "strategy": "group" if self.group_size else "channel",
            "group_size": self.group_size,
            "dynamic": False,
        }
        return {"weights": weights, "input_activations": None, "format": FORMAT}


def words(codes: int, bits: int) -> int:
    """How many int32 words hold that many codes."""
    return -(-codes * bits // 32)


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Pack codes of −2^(bits − 1) … 2^(bits − 1) − 1, of any dtype: (rows, columns) -> (rows, words), int32."""
    rows, columns = codes.shape
    # A transposed row counts as contiguous with strides no wider view accepts: flatten and shape it anew.
    raised = (codes + (1 << (bits - 1))).to(torch.uint8).reshape(-1).view(rows, columns)
    if columns % 32:
        raised = functional.pad(raised, (0, -columns % 32))
    packed = raised if bits == 8 else _squeeze(raised.view(torch.int64), bits)
    return packed.view(torch.int32)[:, : words(columns, bits)].contiguous()


def _squeeze(octets: Tensor, bits: int) -> Tensor:
    """Keep the low `bits` bits of each of the 8 bytes of an int64: (rows, n) -> (rows, n·bits) bytes.

    Neighbours close ranks in three doublings: pairs, then fours, then all eight.
    """
    for width in (8, 16, 32):
        kept = width * bits // 8
        mask = sum(((1 << 2 * kept) - 1) << shift for shift in range(0, 64, 2 * width))
        octets = (octets | (octets >> (width - kept))) & mask
    return octets.view(torch.uint8).view(*octets.shape, 8)[..., :bits].flatten(1)


def pack_columns(zeros: Tensor, bits: int) -> Tensor:
    """Pack zero points along dim 0: (rows, groups) -> (words, groups), int32."""
    return pack_rows(zeros.t(), bits).t().contiguous()
