"""Which weights go, given scores: a share of all, an equal share of each row, or N of each M neighbours."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pattern:
    """How many weights go, and from where."""

    share: float
    """Of all weights, 0 to 1."""
    group: int | None = None
    """Neighbouring inputs that each lose the same number; None: it does not matter where."""

    @classmethod
    def named(cls, name: str, sparsity: float) -> Pattern:
        """`unstructured` with a sparsity, or `N:M`, N of M zero."""
        if name == "unstructured":
            return cls(sparsity)
        zeros, group = (int(part) for part in name.split(":"))
        return cls(zeros / group, group)

    def lowest(self, scores: Tensor, *, by_row: bool) -> Tensor:
        """True for what goes: scores (rows, columns) -> (rows, columns), bool.

        `by_row`: where there are no groups, equally many go of each row; else it is the lowest of all.
        """
        rows, columns = scores.shape
        grouped = scores.reshape(-1, self.group or (columns if by_row else scores.numel()))
        gone = torch.zeros(grouped.shape, dtype=torch.bool, device=scores.device)
        count = round(self.share * grouped.shape[1])
        gone.scatter_(1, grouped.topk(count, dim=1, largest=False, sorted=False).indices, value=True)
        return gone.view(rows, columns)
