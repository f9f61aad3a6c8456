"""One pass over the columns of a weight in which rounding one moves the targets of those that follow.

A column k that comes after j is moved by −coupling(k, j) times what column j gave: GPTQ gives its rounding error,
coordinate descent the change of its weight. Ranges are halved down to a few columns: between halves the targets move by
one matrix product, within the last few by outer products that stay in a core's cache, or on a GPU in one kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from workers.engine.checkpoint.streaming import one_torch_thread
from workers.engine.quantize.column_kernel import COLUMNS, ColumnKernel, column_kernel
from workers.engine.quantize.grid import WeightGrid
from workers.engine.quantize.layer_fit import LayerFit

Coupling = Callable[[slice, slice], Tensor]
"""(rows, columns), both ranges of places in the order: how far each of the rows moves for one of each column."""

_LEAF_COLUMNS = 16
# Of a half whose coupling is made at once: half of a large H would be made anew otherwise.
_COLUMNS_AT_ONCE = 512
# With fewer, threads wait for each other longer than they save: two threads took 0.6 of the time of one at 4096 rows of
# 4096 columns, and twice the time at 960 rows of 576.
_ROWS_PER_THREAD = 2048
# Of a large layer: five float32 copies of them are alive in a thread.
_WEIGHTS_AT_ONCE = 2**24


def round_in_order(
    targets: Tensor,
    coupling: Coupling,
    order: Tensor,
    fit: LayerFit,
    *,
    previous: Tensor | None = None,
    threads: int = 1,
) -> Tensor:
    """Codes (rows, columns) for targets (rows, columns), both in the checkpoint's order of columns.

    `order` (columns,): in which columns are rounded. `previous` (rows, columns): the weights before; with it a column
    gives its change, without it its rounding error. Rows do not depend on each other: each of `threads` threads takes
    some if it is worth it, and a few at a time, to bound memory.
    """
    slices = _row_slices(targets, threads)
    codes = torch.empty_like(targets)

    @torch.inference_mode()
    def run(rows: slice) -> None:
        before = None if previous is None else _by_columns(previous[rows], order)
        sweep = _Sweep.over(_by_columns(targets[rows], order), coupling, order, fit.of_rows(rows), before)
        sweep.range(0, len(order))
        codes[rows] = torch.empty_like(sweep.codes).index_copy_(0, order, sweep.codes).t()

    # Steps are too small for torch's own threads: waking them takes longer than one does.
    with one_torch_thread(), ThreadPoolExecutor(min(threads, len(slices))) as pool:
        list(pool.map(run, slices))
    return codes


def _row_slices(weight: Tensor, threads: int) -> list[slice]:
    rows, columns = weight.shape
    if weight.device.type != "cpu":
        # Whoever calls bounds the memory; the more rows, the more of a GPU works.
        return [slice(0, rows)]
    parts = max(1, min(threads, rows // _ROWS_PER_THREAD), -(-rows * columns // _WEIGHTS_AT_ONCE))
    step = -(-rows // parts)
    return [slice(start, min(rows, start + step)) for start in range(0, rows, step)]


def _by_columns(weight: Tensor, order: Tensor) -> Tensor:
    """Columns in order, each together in memory: (rows, columns) -> (columns, rows)."""
    return weight.t()[order].contiguous()


@dataclass(frozen=True)
class _Sweep:
    """All transposed: (columns, rows). Scales and zero points: (groups, rows)."""

    grid: WeightGrid
    targets: Tensor
    coupling: Coupling
    previous: Tensor | None
    held: Tensor | None
    codes: Tensor
    given: Tensor
    scale: Tensor
    inverse: Tensor
    zero: Tensor
    groups: Tensor
    """(columns,), int64."""
    kernel: ColumnKernel | None
    """Of the last few columns, on a GPU."""

    @classmethod
    def over(
        cls, targets: Tensor, coupling: Coupling, order: Tensor, fit: LayerFit, previous: Tensor | None
    ) -> _Sweep:
        scale = fit.scale.t().contiguous()
        return cls(
            grid=fit.grid,
            targets=targets,
            coupling=coupling,
            previous=previous,
            held=None if fit.held is None else _by_columns(fit.held, order),
            codes=torch.empty_like(targets),
            given=torch.empty_like(targets),
            scale=scale,
            inverse=scale.reciprocal(),
            zero=fit.zero.t().contiguous(),
            groups=fit.group_of[order],
            kernel=column_kernel(fit.grid, targets.device),
        )

    @cached_property
    def _of_columns(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Scale, its inverse and zero point of each column: (rows,) each."""
        by_group = list(zip(self.scale, self.inverse, self.zero, strict=True))
        return [by_group[group] for group in self.groups.tolist()]

    def range(self, start: int, stop: int) -> None:
        """Round columns `start` to `stop`, whose targets are up to date with all columns before them."""
        if stop - start <= (_LEAF_COLUMNS if self.kernel is None else COLUMNS):
            self._leaf(start, stop)
            return
        middle = (start + stop) // 2
        self.range(start, middle)
        later = slice(middle, stop)
        for first in range(start, middle, _COLUMNS_AT_ONCE):
            columns = slice(first, min(middle, first + _COLUMNS_AT_ONCE))
            self.targets[later].addmm_(self.coupling(later, columns), self.given[columns], alpha=-1)
        self.range(middle, stop)

    def _leaf(self, start: int, stop: int) -> None:
        coupling = self.coupling(slice(start, stop), slice(start, stop))
        if self.kernel is None:
            self._round_one_by_one(start, stop, coupling.t().contiguous())
            return
        columns = slice(start, stop)
        self.kernel(
            targets=self.targets[columns],
            codes=self.codes[columns],
            given=self.given[columns],
            previous=None if self.previous is None else self.previous[columns],
            held=None if self.held is None else self.held[columns],
            coupling=coupling,
            scale=self.scale,
            inverse=self.inverse,
            zero=self.zero,
            groups=self.groups[columns],
        )

    def _round_one_by_one(self, start: int, stop: int, coupling: Tensor) -> None:
        """`coupling` (columns, columns): column k of row j is how far k moves for one of j."""
        targets, codes, given = (t[start:stop].unbind() for t in (self.targets, self.codes, self.given))
        for j, (scale, inverse, zero) in enumerate(self._of_columns[start:stop]):
            code = codes[j]
            if self.grid.symmetric:
                self.grid.nearest_(torch.mul(targets[j], inverse, out=code))
                if self.held is not None:
                    code.masked_fill_(self.held[start + j], 0)
                weight = code * scale
            else:
                self.grid.nearest_(torch.addcmul(zero, targets[j], inverse, out=code))
                if self.held is not None:
                    torch.where(self.held[start + j], zero, code, out=code)
                weight = code.sub(zero).mul_(scale)
            if self.previous is None:
                torch.sub(targets[j], weight, out=given[j])
            else:
                torch.sub(weight, self.previous[start + j], out=given[j])
            if start + j + 1 < stop:
                rest = self.targets[start + j + 1 : stop]
                rest.addr_(coupling[j, j + 1 :], given[j], alpha=-1)
