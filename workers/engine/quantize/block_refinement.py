"""After rounding with compensation: the scales, and then the codes, that are best on the layer's inputs as a whole.

With codes fixed, a row of the weight is linear in its float16 scales and minimums θ: ŵ = Σ_k θ_k φ_k, and
(w − ŵ) H (w − ŵ)ᵀ is least where (Φ H Φᵀ) θ = Φ H w. With scales fixed, each code in turn is moved to where the error
of the row, given all others, is least: coordinate descent. Both only ever lower the error.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from workers.engine.checkpoint.streaming import one_torch_thread
from workers.engine.quantize.block_scales import BlockScales, concatenated
from workers.engine.quantize.compensation import BLOCK_COLUMNS

_RIDGE = 1e-3
_ROWS_AT_ONCE = 768


def refined(
    weight: Tensor, codes: Tensor, scales: BlockScales, moments: Tensor, *, threads: int = 1
) -> tuple[Tensor, BlockScales]:
    """Codes and scales of a weight (rows, columns), improved in turns; each thread takes some of the rows."""

    def improve(rows: Tensor) -> tuple[Tensor, BlockScales]:
        part, found, of_rows = weight[rows], codes[rows], scales.of_rows(rows)
        of_rows = refit_scales(part, found, of_rows, moments)
        found = descend(part, found, of_rows, moments)
        return found, refit_scales(part, found, of_rows, moments)

    # Steps are too small for torch's own threads: waking them takes longer than one does.
    with one_torch_thread(), ThreadPoolExecutor(threads) as pool:
        done = list(pool.map(improve, torch.arange(len(weight)).split(_ROWS_AT_ONCE)))
    return torch.cat([found for found, _ in done]), concatenated([of_rows for _, of_rows in done])


@torch.inference_mode()
def refit_scales(weight: Tensor, codes: Tensor, scales: BlockScales, moments: Tensor) -> BlockScales:
    """The float16 numbers of the best fit to fixed codes and integers, where they are better: weight (rows, columns)."""
    basis = _basis(codes, scales)
    present = torch.stack([scales.d, *([] if scales.minimum is None else [scales.minimum])], dim=2)
    found = _solved(weight, basis, present, moments)
    minimum = None if scales.minimum is None else found[..., 1]
    if scales.low_multiplier is not None and minimum is not None:
        minimum = minimum.clamp(min=0)
    tried = scales.with_floats(found[..., 0], minimum)
    better = row_errors(weight - tried.weights(codes), moments) < row_errors(
        weight - scales.weights(codes), moments
    )
    keep = better[:, None]
    return scales.with_floats(
        torch.where(keep, tried.d, scales.d),
        None
        if tried.minimum is None or scales.minimum is None
        else torch.where(keep, tried.minimum, scales.minimum),
    )


@torch.inference_mode()
def descend(weight: Tensor, codes: Tensor, scales: BlockScales, moments: Tensor) -> Tensor:
    """One round of coordinate descent over all columns: codes (rows, columns) -> codes, with errors no larger."""
    scale = scales.scale().repeat_interleave(scales.grid.group, dim=1).t().contiguous()
    current = scales.weights(codes).t().contiguous()
    offset = codes.t() * scale - current
    # Rows of the transposed weight are contiguous, so a column is read and written as a whole.
    pull = moments @ (weight.t() - current)
    diagonal = moments.diagonal()
    found = codes.t().contiguous()
    for start in range(0, len(found), BLOCK_COLUMNS):
        stop = min(start + BLOCK_COLUMNS, len(found))
        block, moved = pull[start:stop], torch.zeros_like(found[start:stop])
        for j in range(start, stop):
            if diagonal[j] <= 0:
                continue
            wanted = current[j] + block[j - start] / diagonal[j]
            code = ((wanted + offset[j]) / scale[j]).round_().clamp_(0, scales.grid.levels - 1)
            step = (code - found[j]) * scale[j]
            block.addr_(moments[start:stop, j], step, alpha=-1)
            found[j], moved[j - start] = code, step
        pull[stop:].addmm_(moments[stop:, start:stop], moved, alpha=-1)
        pull[:start].addmm_(moments[:start, start:stop], moved, alpha=-1)
    return found.t().contiguous()


def row_errors(difference: Tensor, moments: Tensor) -> Tensor:
    """diag(D H Dᵀ): (rows, columns), (columns, columns) -> (rows,)."""
    return ((difference @ moments) * difference).sum(1)


def _basis(codes: Tensor, scales: BlockScales) -> list[Tensor]:
    """What each stored float multiplies: (rows, columns) for d and, if there is one, for the minimum."""
    grid = scales.grid

    def wide(groups: Tensor) -> Tensor:
        return groups.repeat_interleave(grid.group, dim=1)

    of_codes = codes if scales.minimum is not None else codes - grid.levels // 2
    first = of_codes if scales.multiplier is None else of_codes * wide(scales.multiplier)
    if scales.minimum is None:
        return [first]
    if scales.low_multiplier is None:
        return [first, torch.ones_like(codes)]
    return [first, -wide(scales.low_multiplier)]


def _solved(weight: Tensor, basis: list[Tensor], present: Tensor, moments: Tensor) -> Tensor:
    """Solve for all floats of each row: present and result (rows, blocks, floats of a block)."""
    rows, blocks, kinds = present.shape
    size = weight.shape[1] // blocks
    pulled = weight @ moments
    right = torch.stack([(pulled * phi).view(rows, blocks, size).sum(2) for phi in basis], dim=2)
    gram = torch.empty(rows, blocks, kinds, blocks, kinds, dtype=weight.dtype, device=weight.device)
    for block in range(blocks):
        columns = slice(block * size, (block + 1) * size)
        for kind, phi in enumerate(basis):
            reached = phi[:, columns] @ moments[columns]
            for other, psi in enumerate(basis):
                gram[:, block, kind, :, other] = (reached * psi).view(rows, blocks, size).sum(2)
    matrix = gram.view(rows, blocks * kinds, -1)
    residual = right.view(rows, -1, 1) - matrix @ present.view(rows, -1, 1)
    # A ridge towards what is there: a block whose codes are all the middle one leaves its scale open.
    diagonal = matrix.diagonal(dim1=1, dim2=2)
    matrix = matrix + torch.diag_embed(_RIDGE * diagonal + 1e-12 * diagonal.amax(1, keepdim=True) + 1e-30)
    step, failed = torch.linalg.solve_ex(matrix, residual)
    usable = (failed == 0)[:, None, None] & step.isfinite().all(1, keepdim=True)
    return present + torch.where(usable, step, 0).view_as(present)
