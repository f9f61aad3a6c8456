"""A whole layer on a grid: which group each column belongs to, and scale, zero point and codes of each row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from app.spec.quantize import ScaleSearch
from workers.engine.checkpoint.streaming import one_torch_thread
from workers.engine.quantize.grid import Fit, WeightGrid, fit_groups
from workers.engine.quantize.half_quadratic import fit_half_quadratic

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
    """(rows, columns), float32, or the grid's `code_dtype` where it is only kept."""
    held: Tensor | None = None
    """(rows, columns), bool: pruned weights, whose codes are the zero points whatever a solver would make of them."""

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
        held = None if self.held is None else self.held[rows]
        return replace(self, scale=self.scale[rows], zero=self.zero[rows], codes=self.codes[rows], held=held)

    def on(self, device: torch.device) -> LayerFit:
        """The same on another device."""
        held = None if self.held is None else self.held.to(device)
        scale, zero, codes = (t.to(device) for t in (self.scale, self.zero, self.codes))
        return replace(self, scale=scale, zero=zero, codes=codes, held=held)

    def compact(self) -> LayerFit:
        """What was found, in less memory."""
        return replace(self, codes=self.codes.to(self.grid.code_dtype), held=None)

    def _grouped(self, values: Tensor) -> Tensor:
        return values.reshape(len(values), -1, self.group_size)


def fit_layer(  # noqa: PLR0913 - all but the weight and its grid are choices with a default
    weight: Tensor,
    grid: WeightGrid,
    *,
    group_size: int | None,
    dtype: torch.dtype,
    importance: Tensor | None = None,
    search: ScaleSearch = "mse",
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
        if search == "hqq":
            return fit_half_quadratic(groups, grid, dtype)
        return fit_groups(groups, grid, dtype, search=search == "mse", importance=weights)

    parts = by_chunks(fit, weight, threads=threads)
    return LayerFit(
        grid=grid,
        dtype=dtype,
        scale=torch.cat([part.scale for part in parts]).view(rows, -1),
        zero=torch.cat([part.zero for part in parts]).view(rows, -1),
        codes=torch.cat([part.codes for part in parts]).view(rows, columns),
    )


def fit_blocks(
    weight: Tensor,
    grid: WeightGrid,
    *,
    size: int,
    dtype: torch.dtype,
    importance: Tensor | None = None,
    search: bool = True,
) -> LayerFit:
    """As `fit_layer`, with one scale for each block of `size` x `size` weights; the last rows may be fewer."""
    weights = None if importance is None else importance.view(-1, 1, size).expand(-1, size, size).flatten(1)

    def fit(band: Tensor) -> LayerFit:
        rows, columns = band.shape
        full = functional.pad(band, (0, 0, 0, size - rows)).view(size, -1, size).transpose(0, 1)
        found = fit_groups(full.flatten(1), grid, dtype, search=search, importance=weights)
        codes = found.codes.view(-1, size, size).transpose(0, 1).reshape(size, columns)[:rows]
        scale, zero = (t.view(1, -1).expand(rows, -1) for t in (found.scale, found.zero))
        return LayerFit(grid, dtype, scale, zero, codes)

    return joined([fit(band) for band in torch.split(weight, size)])


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
