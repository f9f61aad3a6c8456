"""Improve scales and codes of a layer that is quantized already, by the error of its outputs tr(ΔW H ΔWᵀ).

Two moves that each can only lower it: with the codes fixed, the scales of a row solve a small linear system,
(Dᵀ H D)·s = Dᵀ H w, where D holds the codes' levels by group; with the scales fixed, exact coordinate descent on the
codes: the best value of one weight, all others fixed, is w_j + (H (w − ŵ))_j / H_jj, and the nearest code to it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from workers.engine.quantize.column_sweep import round_in_order
from workers.engine.quantize.layer_fit import LayerFit

# Floats of the rows' systems that are solved at once.
_SYSTEM_FLOATS = 2**22
# Of small layers: a dozen float32 copies of them are alive.
_ROWS_AT_ONCE = 512
_GPU_SYSTEM_FLOATS = 2**26
# As a share of the mean of a system's diagonal: keeps groups with few levels solvable in float32.
_RIDGE = 1e-6


def refined(
    weight: Tensor, fit: LayerFit, second_moment: Tensor, order: Tensor, *, rounds: int, threads: int = 1
) -> LayerFit:
    """Descend on the codes and refit the scales, `rounds` times: weight (rows, columns), H (columns, columns)."""
    for _ in range(rounds):
        fit = descended(weight, fit, second_moment, order, threads=threads)
        fit = refit_scales(weight, fit, second_moment)
    return fit


def descended(
    weight: Tensor, fit: LayerFit, second_moment: Tensor, order: Tensor, *, threads: int = 1
) -> LayerFit:
    """One sweep of coordinate descent over all columns in `order` (columns,); scales stay."""
    diagonal = second_moment.diagonal()

    def coupling(rows: slice, columns: slice) -> Tensor:
        # H is symmetric, and the columns are the fewer.
        part = second_moment[order[columns]].index_select(1, order[rows])
        return part.div_(diagonal[order[rows]]).t()

    before = fit.restored()
    targets = ((weight - before) @ second_moment).div_(diagonal).add_(before)
    codes = round_in_order(targets, coupling, order, fit, previous=before, threads=threads)
    return replace(fit, codes=codes)


def refit_scales(weight: Tensor, fit: LayerFit, second_moment: Tensor) -> LayerFit:
    """The scales that fit the codes best, row by row; a row keeps its own where rounding undoes the gain."""
    groups = fit.scale.shape[1]
    floats = max(groups * groups, weight.shape[1])
    on_cpu = weight.device.type == "cpu"
    chunk = max(1, min(_ROWS_AT_ONCE, _SYSTEM_FLOATS // floats) if on_cpu else _GPU_SYSTEM_FLOATS // floats)
    starts = range(0, len(weight), chunk)
    parts = [
        _refit_rows(weight[start : start + chunk], fit.of_rows(slice(start, start + chunk)), second_moment)
        for start in starts
    ]
    return replace(fit, scale=torch.cat(parts))


def _refit_rows(weight: Tensor, fit: LayerFit, second_moment: Tensor) -> Tensor:
    system, right = scale_system(weight, fit.levels(), second_moment, fit.group_size)
    damped = system.clone()
    diagonal = damped.diagonal(dim1=1, dim2=2)
    unused = diagonal == 0
    diagonal.add_(_RIDGE * diagonal.mean(1, keepdim=True)).masked_fill_(unused, 1.0)
    solved, failed = torch.linalg.solve_ex(damped, right)
    usable = torch.isfinite(solved) & ~unused & (failed == 0).unsqueeze(1)
    scale = fit.grid.stored(torch.where(usable, solved, fit.scale), fit.dtype)
    after, before = (_error_of_scales(s, system, right) for s in (scale, fit.scale))
    return torch.where((after < before).unsqueeze(1), scale, fit.scale)


def _error_of_scales(scale: Tensor, system: Tensor, right: Tensor) -> Tensor:
    """sᵀ(Dᵀ H D)s − 2 sᵀ Dᵀ H w, the error of each row less what no scale changes: (rows, groups), … -> (rows,)."""
    return (((system @ scale.unsqueeze(2)).squeeze(2) - 2 * right) * scale).sum(1)


def scale_system(
    weight: Tensor, levels: Tensor, second_moment: Tensor, group_size: int
) -> tuple[Tensor, Tensor]:
    """Dᵀ H D and Dᵀ H w of each row: (rows, columns) twice, (columns, columns) -> (rows, groups, groups), (rows, groups)."""
    rows, columns = levels.shape
    groups = columns // group_size

    def by_group(values: Tensor) -> Tensor:
        return values.view(rows, -1, group_size).sum(2)

    right = by_group((weight @ second_moment).mul_(levels))
    system = torch.empty(rows, groups, groups, device=levels.device)
    for group in range(groups):
        start, stop = group * group_size, (group + 1) * group_size
        # Symmetric: the groups before have their part already.
        products = (levels[:, start:stop] @ second_moment[start:stop, start:]).mul_(levels[:, start:])
        system[:, group, group:] = by_group(products)
        system[:, group + 1 :, group] = system[:, group, group + 1 :].clone()
    return system, right
