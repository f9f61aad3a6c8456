"""Write NF4 as bitsandbytes serializes it: two weights a byte in blocks of 64 along the flattened weight.

The earlier of two weights is in the high half; a half is the number's place among the 16 that there are, in ascending
order. `absmax` is the scale of each block. Double-quantized, it is a place among 256 numbers that lie in
`nested_quant_map`, whose scale for each 256 blocks is `nested_absmax`; bitsandbytes adds the mean of all scales to that,
which would take a pass over the weight to know, and here adds nothing: the numbers are dense enough without. A JSON text
in bytes says the rest. Source: bitsandbytes 0.50, functional.py (`QuantState`, `quantize_4bit`, `create_dynamic_map`).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from app.spec.facts import TensorFact
from app.spec.nf4 import BLOCK, SCALES_PER_BLOCK, compute_dtype, nf4_tensors, quant_state
from app.spec.quantize import ScaleSearch
from workers.engine.export.stored_layer import OUTSIDE_BLOCKS, Parts, StoredLayer
from workers.engine.quantize.float_grids import NF4_LEVELS, Nf4Grid
from workers.engine.quantize.grid import WeightGrid, divisor
from workers.engine.quantize.layer_fit import LayerFit


@dataclass(frozen=True)
class Nf4Layer(StoredLayer):
    """Halves of bytes and scales. `bits` is 4, `group_size` 64."""

    double_quantized: bool

    @property
    def block_rows(self) -> int:
        """With double quantization scales of this many rows share their own."""
        return SCALES_PER_BLOCK // math.gcd(SCALES_PER_BLOCK, self._groups) if self.double_quantized else 1

    @property
    def refits_scales(self) -> bool:
        """With double quantization a scale is what its neighbours leave, of one row or of many."""
        return not self.double_quantized

    @property
    def row_multiple(self) -> int:
        """Blocks of scales are not cut."""
        return self.block_rows

    @property
    def alike(self) -> Hashable:
        """All but name and rows; blocks of scales begin anew with each layer."""
        return self if self.double_quantized else replace(self, module="", rows=0)

    def facts(self) -> list[TensorFact]:
        """All its tensors."""
        return list(nf4_tensors(self._weight, double_quantized=self.double_quantized))

    def grid(self, peak: float) -> Nf4Grid:  # noqa: ARG002 - the same for all weights
        """What its codes may be."""
        return Nf4Grid()

    def nearest(
        self,
        weight: Tensor,
        grid: WeightGrid,
        *,
        importance: Tensor | None = None,
        search: ScaleSearch = "mse",
        threads: int = 1,
    ) -> LayerFit:
        """See StoredLayer; scales are rounded after they are found, and the codes are the nearest under those."""
        fit = super().nearest(weight, grid, importance=importance, search=search, threads=threads)
        return doubly_quantized(weight, fit) if self.double_quantized else fit

    def parts(self, fit: LayerFit, start: int) -> Parts:
        """What some rows, from `start` on, become."""
        name, first = self._weight.name, start * self._groups
        found: Parts = {name: (start * self.columns // 2, pack_nf4(fit.codes))}
        if self.double_quantized:
            places, nested = stored_scales(fit.scale)
            found[f"{name}.absmax"] = (first, places.cpu())
            found[f"{name}.nested_absmax"] = (first // SCALES_PER_BLOCK, nested.cpu())
        else:
            found[f"{name}.absmax"] = (first, fit.scale.flatten().cpu())
        return found | (self._tables() if start == 0 else {})

    def scheme(self) -> dict[str, Any]:
        """What config.json says of it and of all like it."""
        return {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": self.double_quantized}

    @property
    def _weight(self) -> TensorFact:
        """As it was."""
        return self._fact("weight", self.dtype, (self.rows, self.columns))

    @property
    def _groups(self) -> int:
        return self.columns // BLOCK

    def _tables(self) -> Parts:
        """What the weight has once."""
        name, nested = self._weight.name, self.double_quantized
        text = quant_state(self._weight, double_quantized=nested)
        tables = {
            f"{name}.quant_map": torch.tensor(NF4_LEVELS),
            f"{name}.quant_state.bitsandbytes__nf4": torch.frombuffer(bytearray(text), dtype=torch.uint8),
        } | ({f"{name}.nested_quant_map": dynamic_map().clone()} if nested else {})
        return {what: (0, table) for what, table in tables.items()}


def declaration(layers: Mapping[str, Nf4Layer], skipped: Sequence[str]) -> dict[str, Any]:
    """The `quantization_config` for transformers, peft and vLLM; `skipped`: modules inside blocks that stay as they were.

    What is in no block stays too: transformers takes the last entry for a pattern, vLLM passes over it.
    """
    first = next(iter(layers.values()))
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_compute_dtype": compute_dtype(first.dtype),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": [*skipped, "lm_head", f"{OUTSIDE_BLOCKS}.+"],
    } | first.scheme()


def pack_nf4(codes: Tensor) -> Tensor:
    """Two weights a byte: (rows, columns) of NF4 numbers -> (rows · columns / 2, 1), uint8, on the CPU."""
    places = Nf4Grid().places(codes.float()).flatten().to(torch.uint8)
    return (places[::2] << 4 | places[1::2]).unsqueeze(1).cpu()


def doubly_quantized(weight: Tensor, fit: LayerFit) -> LayerFit:
    """The same with scales as they can be stored in 8 bits, and the nearest codes: weight (rows, columns), float32."""
    live = fit.codes.view(*fit.scale.shape, -1).any(2)
    places, nested = stored_scales(fit.scale * live)
    scale = _restored_scales(places, nested).view_as(fit.scale)
    # A group without a scale, or with one too small to store, divides by the largest: it changes none of the others.
    largest = nested.repeat_interleave(SCALES_PER_BLOCK)[: scale.numel()].view_as(scale)
    scale = divisor(torch.where(scale > 0, scale, largest))
    exact = weight.view(*scale.shape, -1) / scale.unsqueeze(2)
    return replace(fit, scale=scale, codes=fit.grid.nearest_(exact).view_as(weight))


def stored_scales(scale: Tensor) -> tuple[Tensor, Tensor]:
    """What stands for scales (rows, groups), not negative: places (rows · groups,), uint8, and their scales, float32.

    Of scales that were restored from such places, the same places again.
    """
    flat = scale.flatten()
    blocks = functional.pad(flat, (0, -len(flat) % SCALES_PER_BLOCK)).view(-1, SCALES_PER_BLOCK)
    nested = blocks.amax(1)
    levels = dynamic_map().to(scale.device)
    bounds = (levels[1:] + levels[:-1]) / 2
    places = torch.bucketize(blocks / divisor(nested).unsqueeze(1), bounds, out_int32=True)
    return places.flatten()[: len(flat)].to(torch.uint8), nested


def _restored_scales(places: Tensor, nested: Tensor) -> Tensor:
    """(n,), uint8, and (⌈n / 256⌉,) -> (n,), float32."""
    levels = dynamic_map().to(places.device)
    return levels[places.int()] * nested.repeat_interleave(SCALES_PER_BLOCK)[: len(places)]


@cache
def dynamic_map() -> Tensor:
    """The numbers an 8-bit scale may be: (256,), float32, ascending; do not change it.

    One bit of sign; then as many zeros as the number has decades below one, and a fraction linear within the decade in the
    bits that are left (Dettmers 2016, "8-Bit Approximations for Parallelism in Deep Learning", sec. 2.2).
    """
    positive: list[float] = []
    for decade in range(7):
        ends = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        positive += (10.0 ** (decade - 6) * (ends[:-1] + ends[1:]) / 2).tolist()
    return torch.tensor([-value for value in positive] + [0.0] + positive + [1.0]).sort().values
