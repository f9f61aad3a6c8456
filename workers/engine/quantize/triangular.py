"""Factor and invert a triangle of a square matrix in its own memory, and leave what is above the diagonal as it is.

LAPACK does either in place, but torch offers no way there: its own Cholesky clears the other triangle, and an inverse is
a second matrix. At 14,336 inputs each copy is 784 MiB. Blocked right-looking Cholesky and inversion by halves (Golub and
Van Loan, Matrix Computations, sec. 4.2.9 and 3.1).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_LEAF = 256
_BLOCK = 512


def factor_lower_(matrix: Tensor) -> bool:
    """Put L of A = L Lᵀ in the place of A's lower triangle: (n, n). False, and no use any more, if there is none."""
    for block in _blocks(len(matrix)):
        rest = slice(block.stop, len(matrix))
        factor, failed = torch.linalg.cholesky_ex(matrix[block, block])
        if int(failed):
            return False
        _put_lower_(matrix[block, block], factor)
        below = matrix[rest, block]
        below.copy_(torch.linalg.solve_triangular(factor.t(), below, upper=True, left=False))
        for part in _blocks(len(below)):
            given = below[part]
            later = matrix[rest, rest][:, part]
            later[part].sub_((given @ given.t()).tril_())
            later[part.stop :].addmm_(below[part.stop :], given.t(), alpha=-1)
    return True


def invert_lower_(lower: Tensor) -> None:
    """Put L⁻¹ in the place of L: (n, n).

    By halves: the inverse of [[A, 0], [B, C]] is [[A⁻¹, 0], [−C⁻¹ B A⁻¹, C⁻¹]].
    """
    n = len(lower)
    if n <= _LEAF:
        identity = torch.eye(n, dtype=lower.dtype, device=lower.device)
        _put_lower_(lower, torch.linalg.solve_triangular(lower, identity, upper=False))
        return
    middle = n // 2
    first, second, below = lower[:middle, :middle], lower[middle:, middle:], lower[middle:, :middle]
    invert_lower_(first)
    invert_lower_(second)
    # Each product only needs what has not been replaced yet.
    for part in _blocks(middle):
        below[:, part] = (below[:, part.start :] @ first[part.start :, part].tril()).neg_()
    for part in reversed(list(_blocks(n - middle))):
        below[part] = second[part, : part.stop].tril(part.start) @ below[: part.stop]


def mirror_upper_(matrix: Tensor) -> None:
    """Make a matrix symmetric by what is above its diagonal: (n, n)."""
    for block in _blocks(len(matrix)):
        own = matrix[block, block]
        _put_lower_(own, own.triu().t())
        matrix[block.stop :, block] = matrix[block, block.stop :].t()


def rearrange_(matrix: Tensor, order: Tensor) -> None:
    """Put rows and columns of a symmetric matrix in that order: (n, n), (n,)."""
    # Columns, a transposition in between, and the other side's columns are its rows.
    for _ in range(2):
        for block in _blocks(len(matrix)):
            matrix[block] = matrix[block].index_select(1, order)
        for block in _blocks(len(matrix)):
            matrix[block, block] = matrix[block, block].t().clone()
            right = matrix[block, block.stop :].clone()
            matrix[block, block.stop :] = matrix[block.stop :, block].t()
            matrix[block.stop :, block] = right.t()


def _put_lower_(matrix: Tensor, lower: Tensor) -> None:
    matrix.copy_(matrix.triu(1).add_(lower.tril()))


def _blocks(n: int) -> Iterator[slice]:
    return (slice(start, min(n, start + _BLOCK)) for start in range(0, n, _BLOCK))
