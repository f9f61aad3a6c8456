"""The inverse of a triangular matrix in its own memory, which LAPACK has and torch does not."""

from __future__ import annotations

import torch
from torch import Tensor

_LEAF = 256


def invert_lower_(lower: Tensor) -> None:
    """Replace L by L⁻¹, both lower triangular: (n, n); what is above the diagonal becomes zero.

    By halves: the inverse of [[A, 0], [B, C]] is [[A⁻¹, 0], [−C⁻¹ B A⁻¹, C⁻¹]]. Needs a quarter of its memory beside it.
    """
    n = len(lower)
    if n <= _LEAF:
        identity = torch.eye(n, dtype=lower.dtype, device=lower.device)
        lower.copy_(torch.linalg.solve_triangular(lower, identity, upper=False))
        return
    middle = n // 2
    first, second, below = lower[:middle, :middle], lower[middle:, middle:], lower[middle:, :middle]
    invert_lower_(first)
    invert_lower_(second)
    below.copy_(second @ (below @ first).neg_())
    lower[:middle, middle:].zero_()
