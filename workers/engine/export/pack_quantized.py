"""Write the compressed-tensors format `pack-quantized`: its tensors, its bit packing and its entry in config.json.

Codes are stored as q + 2^(bits − 1), densely, least significant bits first, in int32 words: along each row for
`weight_packed`, along each column for `weight_zero_point`. `weight_scale` keeps the checkpoint's own dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from app.spec.facts import TensorFact
from workers.engine.checkpoint.layout import TORCH_DTYPES
from workers.engine.quantize.grid import Grid
from workers.engine.quantize.layer_fit import LayerFit

FORMAT = "pack-quantized"
# 32 codes fill a whole number of words at any width: slabs of zero points must begin at a multiple of this many rows.
ROWS_PER_WORD_GROUP = 32


@dataclass(frozen=True)
class PackedLayer:
    """The tensors one quantized weight (rows, columns) becomes; `module` is its name without `.weight`."""

    module: str
    rows: int
    columns: int
    dtype: str
    """Of the scales, in safetensors' spelling."""
    bits: int
    symmetric: bool
    group_size: int | None

    @property
    def groups(self) -> int:
        """Scales per row."""
        return self.columns // self.group_size if self.group_size else 1

    @property
    def packed(self) -> TensorFact:
        """(rows, words): the codes."""
        return self._fact("packed", "I32", (self.rows, words(self.columns, self.bits)))

    @property
    def scale(self) -> TensorFact:
        """(rows, groups)."""
        return self._fact("scale", self.dtype, (self.rows, self.groups))

    @property
    def shape(self) -> TensorFact:
        """(2,): rows and columns."""
        return self._fact("shape", "I64", (2,))

    @property
    def zero_point(self) -> TensorFact:
        """(words, groups), asymmetric only."""
        return self._fact("zero_point", "I32", (words(self.rows, self.bits), self.groups))

    def facts(self) -> list[TensorFact]:
        """All its tensors."""
        always = [self.packed, self.scale, self.shape]
        return always if self.symmetric else [*always, self.zero_point]

    @property
    def grid(self) -> Grid:
        """What its codes may be."""
        return Grid(self.bits, self.symmetric)

    def tensors(self, fit: LayerFit) -> dict[str, Tensor]:
        """All its tensors, by name."""
        found = {
            self.packed.name: pack_rows(fit.codes.to(torch.int8).cpu(), self.bits),
            self.scale.name: fit.scale.to(TORCH_DTYPES[self.dtype]).cpu(),
            self.shape.name: torch.tensor([self.rows, self.columns]),
        }
        if not self.symmetric:
            found[self.zero_point.name] = pack_columns(fit.zero.to(torch.int8).cpu(), self.bits)
        return found

    def stored_bits(self) -> float:
        """Bits per weight, scales, zero points and shape included."""
        return 8 * sum(fact.nbytes for fact in self.facts()) / (self.rows * self.columns)

    def _fact(self, what: str, dtype: str, shape: tuple[int, ...]) -> TensorFact:
        return TensorFact(name=f"{self.module}.weight_{what}", dtype=dtype, shape=shape)


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


def quantization_config(
    *,
    bits: int,
    symmetric: bool,
    group_size: int | None,
    ignored_modules: list[str],
    unpack_to_load: bool = False,
) -> dict[str, Any]:
    """What `quantization_config` in config.json says, for compressed-tensors, transformers and vLLM.

    `ignored_modules` are the linear layers inside blocks left as they were; everything outside the blocks (heads,
    poolers, classifiers) is left out by pattern, under whatever prefix the loading class gives it. `unpack_to_load` asks
    transformers to dequantize while loading.
    """
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "group" if group_size else "channel",
        "group_size": group_size,
        "dynamic": False,
    }
    declared = {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": None,
                "output_activations": None,
                "format": FORMAT,
            }
        },
        "ignore": ["lm_head", r"re:^(?!.*\b(?:layers?|h)\.\d+\.).*", *ignored_modules],
    }
    # transformers 5.23 makes room for unpacked zero points when it keeps weights packed, and then refuses packed ones;
    # asked to dequantize while loading, it reads them rightly. vLLM ignores the key.
    return declared | ({"dequantize": True} if unpack_to_load or not symmetric else {})
