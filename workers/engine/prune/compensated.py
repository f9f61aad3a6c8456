"""Remove weights column by column, and let those still there make up for what is lost.

With H = Σ x xᵀ / T of a layer's inputs and H⁻¹ = Uᵀ U, removing weight w of column j moves the columns after it by
−w·U_{j,j+1:} / U_jj (Frantar and Alistarh 2023, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot",
algorithm 1): the sweep of GPTQ with zero in the place of the nearest code. Which weights go is decided some columns
before they are reached, on weights as they have become.

Then the weights that are left are fitted once more, all of a row together, to give what the row gave before: least squares
on a fixed support, by conjugate gradients (as in Meng et al. 2024, "ALPS", sec. 3.2, with H's diagonal to precondition).
"""

from __future__ import annotations

import torch
from torch import Tensor

from workers.engine.prune.criteria import Criterion, LayerStatistics
from workers.engine.prune.masks import Pattern
from workers.engine.quantize.compensation import Factor

# Columns whose mask is decided together; see SparseGPT, sec. 3.3 and its figure on the size.
_MASK_COLUMNS = 128
# Of which the coupling is made at once.
_COLUMNS_AT_ONCE = 512


@torch.no_grad()
def removed_in_order(
    weight: Tensor, factor: Factor, pattern: Pattern, criterion: Criterion, statistics: LayerStatistics
) -> Tensor:
    """The weight with what goes set to zero and the rest moved: (rows, columns), float32 -> (rows, columns).

    `factor` must go through the columns in their own order, for neighbours to be neighbours.
    """
    # A copy, also of what lies transposed already.
    targets = weight.t().clone(memory_format=torch.contiguous_format)
    columns = len(targets)
    for start in range(0, columns, _MASK_COLUMNS):
        span = slice(start, min(columns, start + _MASK_COLUMNS))
        block = targets[span]
        gone = pattern.lowest(criterion(block.t(), statistics.of(span)), by_row=False).t()
        lost = torch.zeros_like(block)
        own = factor.coupling(span, span)
        for j in range(len(block)):
            torch.mul(block[j], gone[j], out=lost[j])
            block[j + 1 :].addr_(own[j + 1 :, j], lost[j], alpha=-1)
        block.masked_fill_(gone, 0)
        for first in range(span.stop, columns, _COLUMNS_AT_ONCE):
            later = slice(first, min(columns, first + _COLUMNS_AT_ONCE))
            targets[later].addmm_(factor.coupling(later, span), lost, alpha=-1)
    return targets.t()


@torch.no_grad()
def refitted(weight: Tensor, sparse: Tensor, second_moment: Tensor, *, steps: int) -> Tensor:
    """Weights on the support of `sparse` whose outputs come closest to those of `weight`: all (rows, columns), float32.

    Minimises tr((W − X) H (W − X)ᵀ) row by row from X = `sparse` on, by so many steps of conjugate gradients: never worse
    than where it began, and in theory exact after as many steps as a row has weights.
    """
    kept = sparse != 0
    fitted = sparse.clone()
    inverse = second_moment.diagonal().clamp_min(torch.finfo(torch.float32).tiny).reciprocal()
    residual = ((weight - fitted) @ second_moment).mul_(kept)
    direction = residual * inverse
    was = (residual * direction).sum(1, keepdim=True)
    for _ in range(steps):
        moved = (direction @ second_moment).mul_(kept)
        curvature = (direction * moved).sum(1, keepdim=True)
        # A row that is fitted exactly has no direction left.
        length = torch.where(curvature > 0, was / curvature, torch.zeros_like(was))
        fitted.addcmul_(length, direction)
        residual.addcmul_(length, moved, value=-1)
        preconditioned = residual * inverse
        now = (residual * preconditioned).sum(1, keepdim=True)
        direction.mul_(torch.where(was > 0, now / was, torch.zeros_like(was))).add_(preconditioned)
        was = now
    return fitted
