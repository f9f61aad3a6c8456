"""Scales of GGUF's block formats: what is stored of them, and what they make of a weight.

A block of 32 or 256 weights has one float16 scale `d` and, in some formats, one float16 minimum. Blocks of 256 are cut
into groups of 32 (16 in Q6_K), each with a small integer that multiplies the block's scale, and one for its minimum.
In all of them a weight is scale·code − low, with an unsigned code; symmetric formats have low = scale·levels/2.
Bit layouts are in export/gguf/blocks.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

Lows = Literal["centre", "any", "negative"]

SMALLEST_HALF = 2.0**-24
"""The smallest float16 above zero: scales are never zero, so that codes can be found by dividing."""


@dataclass(frozen=True)
class Grid:
    """The codes of a format, and how finely its scales are cut."""

    levels: int
    """Codes go from 0 to levels − 1."""
    group: int
    """Weights that share scale and low."""
    lows: Lows
    """`centre`: the middle code is zero. `any`: each block has a minimum. `negative`: it is zero or below."""
    groups: int = 1
    """Groups in a block."""
    largest_multiplier: int = 1
    """Of a group's integer scale; 1 where blocks are not cut into groups."""

    @property
    def block(self) -> int:
        """Weights of a block."""
        return self.group * self.groups


GRIDS = {
    "Q4_0": Grid(16, 32, "centre"),
    "Q5_0": Grid(32, 32, "centre"),
    "Q8_0": Grid(256, 32, "centre"),
    "Q4_1": Grid(16, 32, "any"),
    "Q5_1": Grid(32, 32, "any"),
    "Q4_K": Grid(16, 32, "negative", 8, 63),
    "Q5_K": Grid(32, 32, "negative", 8, 63),
    "Q6_K": Grid(64, 16, "centre", 16, 127),
}


@dataclass(frozen=True)
class BlockScales:
    """The scales of a weight (rows, columns); all float32, and exactly what the file will hold."""

    grid: Grid
    d: Tensor
    """(rows, blocks): of float16."""
    minimum: Tensor | None = None
    """(rows, blocks), of float16: added to the weights in Q4_1 and Q5_1, subtracted after the multiplier in Q4_K and Q5_K."""
    multiplier: Tensor | None = None
    """(rows, blocks·groups): integers."""
    low_multiplier: Tensor | None = None
    """(rows, blocks·groups): integers."""

    def scale(self) -> Tensor:
        """(rows, groups): what a step of a code is worth."""
        return self.d if self.multiplier is None else _spread(self.d, self.grid) * self.multiplier

    def low(self) -> Tensor:
        """(rows, groups): what is subtracted."""
        if self.minimum is None:
            return self.scale() * (self.grid.levels // 2)
        if self.low_multiplier is None:
            return -self.minimum
        return _spread(self.minimum, self.grid) * self.low_multiplier

    def codes(self, weight: Tensor) -> Tensor:
        """The nearest codes: (rows, columns) -> (rows, columns), float32."""
        groups = cut(weight, self.grid.group)
        return encode(groups, self.scale()[..., None], self.low()[..., None], self.grid).flatten(1)

    def weights(self, codes: Tensor) -> Tensor:
        """What codes stand for: (rows, columns) -> (rows, columns), float32."""
        groups = cut(codes, self.grid.group)
        return (groups * self.scale()[..., None] - self.low()[..., None]).flatten(1)

    def cpu(self) -> BlockScales:
        """The same in the memory of the CPU."""
        return self._each(lambda values: values.cpu())

    def of_rows(self, rows: Tensor) -> BlockScales:
        """The scales of some rows."""
        return self._each(lambda values: values[rows])

    def _each(self, change: Callable[[Tensor], Tensor]) -> BlockScales:
        def if_there(values: Tensor | None) -> Tensor | None:
            return None if values is None else change(values)

        return BlockScales(
            self.grid,
            change(self.d),
            if_there(self.minimum),
            if_there(self.multiplier),
            if_there(self.low_multiplier),
        )

    def with_floats(self, d: Tensor, minimum: Tensor | None) -> BlockScales:
        """The same integers under other floating-point numbers, rounded to float16."""
        return replace(self, d=half(d), minimum=None if minimum is None else as_half(minimum))


def cut(values: Tensor, *sizes: int, dim: int = 1) -> Tensor:
    """Cut a dimension into as many parts of these sizes as it holds: (rows, columns) -> (rows, parts, *sizes)."""
    return values.reshape(*values.shape[:dim], -1, *sizes, *values.shape[dim + 1 :])


def concatenated(parts: list[BlockScales]) -> BlockScales:
    """Scales of more rows from those of fewer."""
    first = parts[0]
    optional = ("minimum", "multiplier", "low_multiplier")
    joined = {
        name: torch.cat([getattr(part, name) for part in parts])
        for name in optional
        if getattr(first, name) is not None
    }
    return BlockScales(first.grid, torch.cat([part.d for part in parts]), **joined)


def encode(groups: Tensor, scale: Tensor, low: Tensor, grid: Grid) -> Tensor:
    """The nearest codes of weights (..., group size) under a scale and low (..., 1) of each group."""
    return ((groups + low) / scale).round_().clamp_(0, grid.levels - 1)


def as_half(values: Tensor) -> Tensor:
    """Rounded to float16, in float32."""
    return values.half().float()


def half(scales: Tensor) -> Tensor:
    """Rounded to float16 and never zero, in float32."""
    rounded = as_half(scales)
    return torch.where(rounded == 0, torch.full_like(rounded, SMALLEST_HALF), rounded)


def _spread(blocks: Tensor, grid: Grid) -> Tensor:
    """(rows, blocks) -> (rows, groups)."""
    return blocks.repeat_interleave(grid.groups, dim=1)
