"""Refit a layer so that its outputs take over what is missing behind them."""

from __future__ import annotations

import torch
from torch import Tensor

from app.errors import JobFailed


class LeastSquares:
    """What is missing behind a layer's outputs, as a linear function of its inputs and, with a bias, of a constant."""

    def __init__(self, *, has_bias: bool) -> None:
        self.has_bias = has_bias
        self._gram: Tensor | None = None
        self._cross: Tensor | None = None
        self.missing = 0.0
        """Σ w ‖missing‖²."""
        self.tokens = 0

    def add(self, inputs: Tensor, missing: Tensor, weights: Tensor) -> None:
        """Take in more tokens: (tokens, features), (tokens, outputs), (tokens,)."""
        inputs, missing = inputs.float(), missing.float()
        if self.has_bias:
            inputs = torch.cat([inputs, torch.ones_like(inputs[:, :1])], dim=1)
        if self._gram is None or self._cross is None:
            features, outputs = inputs.shape[1], missing.shape[1]
            self._gram = torch.zeros(features, features, device=inputs.device)
            self._cross = torch.zeros(features, outputs, device=inputs.device)
        weighted = (inputs * weights[:, None]).T
        self._gram.addmm_(weighted, inputs)
        self._cross.addmm_(weighted, missing)
        self.missing += float((missing.square().sum(1) * weights).sum())
        self.tokens += len(inputs)

    def sums(self) -> tuple[Tensor, Tensor]:
        """Σ w x xᵀ, (features, features), and Σ w x missingᵀ, (features, outputs)."""
        if self._gram is None or self._cross is None:
            raise ValueError("no token was seen")
        return self._gram, self._cross

    def solved(self) -> tuple[Tensor, float]:
        """The change of the weights, (outputs, features) with a bias as the last feature, and Σ w ‖missing‖² with it.

        Each diagonal element of Σ w x xᵀ is raised by features over tokens of itself: what was seen seldom is chance.
        """
        gram, cross = self.sums()
        change = damped_solution(gram, cross, self.tokens)
        gained = 2 * (change * cross).sum() - (change * (gram @ change)).sum()
        return change.T, max(0.0, self.missing - float(gained))


def damped_solution(gram: Tensor, cross: Tensor, tokens: int) -> Tensor:
    """(G + damping)⁻¹ C, G (features, features) and C (features, outputs) the sums over so many tokens, as above.

    Raises JobFailed when they are not finite.
    """
    if not torch.isfinite(gram.diagonal()).all() or not torch.isfinite(cross).all():
        raise JobFailed(
            "What leaves a block is NaN or infinite on the calibration text.",
            code="non_finite_activations",
            hint="Check that the original gives sensible outputs in float32.",
        )
    diagonal = gram.diagonal()
    damped = gram.clone()
    scale = torch.where(diagonal > 0, diagonal, torch.ones_like(diagonal))
    damped.diagonal().add_(min(1.0, len(diagonal) / tokens) * scale)
    return torch.cholesky_solve(cross, torch.linalg.cholesky(damped))
