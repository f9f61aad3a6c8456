"""A whole layer on a grid: which group each column belongs to, and scale, zero point and codes of each row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from workers.engine.checkpoint.streaming import one_torch_thread
from workers.engine.quantize.grid import Fit, WeightGrid, fit_groups

# Weights fitted at once: the float32 buffers of a search stay in a core's own cache.
_CHUNK_WEIGHTS = 2**17

T = TypeVar("T")


@dataclass(frozen=True)
class LayerFit:
    """w ≈ scale · (code − zero) for a weight of (rows, columns), in equal groups of neighbouring columns."""

    grid: WeightGrid
    dtype: torch.dtype
    """Of the checkpoint, which bears on what the scale can be."""
    scale: Tensor
    """(rows, groups), float32, exactly as it will be read."""
    zero: Tensor
    """(rows, groups), float32."""
    codes: Tensor
    """(rows, columns), float32, or float16 where it is only kept."""

    @property
    def group_size(self) -> int:
        """Columns that share a scale."""
        return self.codes.shape[1] // self.scale.shape[1]

    @property
    def group_of(self) -> Tensor:
        """(columns,), int64: the group of each column."""
        return torch.arange(self.codes.shape[1], device=self.codes.device) // self.group_size

    def levels(self) -> Tensor:
        """Codes less zero points: (rows, columns)."""
        return (self._grouped(self.codes) - self.zero.unsqueeze(2)).flatten(1)

    def restored(self) -> Tensor:
        """The weights as a loader makes them: (rows, columns), float32."""
        levels = self._grouped(self.codes) - self.zero.unsqueeze(2)
        return levels.mul_(self.scale.unsqueeze(2)).flatten(1)

    def of_rows(self, rows: slice) -> LayerFit:
        """Some rows of it."""
        return replace(self, scale=self.scale[rows], zero=self.zero[rows], codes=self.codes[rows])

    def compact(self) -> LayerFit:
        """The same in less memory: the codes of all grids are few, and exact in float16."""
        return replace(self, codes=self.codes.half())

    def _grouped(self, values: Tensor) -> Tensor:
        return values.reshape(len(values), -1, self.group_size)


def fit_layer(
    weight: Tensor,
    grid: WeightGrid,
    *,
    group_size: int | None,
    dtype: torch.dtype,
    importance: Tensor | None = None,
    threads: int = 1,
) -> LayerFit:
    """Search scales group by group and round to the nearest codes: (rows, columns), float32.

    `importance`: (columns,), weighs the errors. `group_size` None: one scale per row.
    """
    rows, columns = weight.shape
    size = group_size or columns
    weights = None if importance is None else importance.view(1, -1, size)

    def fit(part: Tensor) -> Fit:
        groups = part.reshape(len(part), -1, size)
        return fit_groups(groups, grid, dtype, search=True, importance=weights)

    parts = by_chunks(fit, weight, threads=threads)
    return LayerFit(
        grid=grid,
        dtype=dtype,
        scale=torch.cat([part.scale for part in parts]).view(rows, -1),
        zero=torch.cat([part.zero for part in parts]).view(rows, -1),
        codes=torch.cat([part.codes for part in parts]).view(rows, columns),
    )


def joined(parts: Sequence[LayerFit]) -> LayerFit:
    """Rows of one layer, put together again."""
    return replace(
        parts[0],
        scale=torch.cat([part.scale for part in parts]),
        zero=torch.cat([part.zero for part in parts]),
        codes=torch.cat([part.codes for part in parts]),
    )


def by_chunks(work: Callable[[Tensor], T], weight: Tensor, *, threads: int) -> list[T]:
    """Work on a few rows at a time, one chunk a thread on a CPU; a GPU takes more at once."""
    on_cpu = weight.device.type == "cpu"
    at_once = _CHUNK_WEIGHTS if on_cpu else 2**25
    chunk = max(1, at_once // weight.shape[1])

    @torch.inference_mode()
    def run(part: Tensor) -> T:
        return work(part)

    with one_torch_thread(), ThreadPoolExecutor(threads if on_cpu else 1) as pool:
        return list(pool.map(run, torch.split(weight, chunk)))
