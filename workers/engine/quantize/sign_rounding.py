"""Rounding that follows a gradient: w ≈ s·(q − z), with q the code nearest to a latent u that is trained.

u starts within half a step of the code a solver chose, at the value that would be best for this weight if it could be
any and all others stayed: weights whose code is in doubt lie near the border. Rounding is passed straight through:
∂L/∂u = s·∂L/∂ŵ, and only the sign of it moves u (Cheng et al. 2023, "Optimize Weight Rounding via Signed Gradient
Descent", eqs. 3-5; there u = w/s + v, and v starts at 0, so at rounding to nearest). Rates fall linearly from 1/steps
to 0, so u moves by half a step at most.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workers.engine.quantize.layer_fit import LayerFit

# Not quite half a step, so that every weight starts at the code it has.
_LARGEST_DOUBT = 0.49


def best_alone(weight: Tensor, restored: Tensor, second_moment: Tensor) -> Tensor:
    """What each weight would best be with all others as they are, by the error tr(ΔW H ΔWᵀ): (rows, columns) each.

    ŵ_j + (H (w − ŵ))_j / H_jj, with H (columns, columns); what multiplies inputs that are always zero stays as it is.
    """
    moments = second_moment.diagonal()
    pull = ((weight - restored) @ second_moment) / torch.where(moments > 0, moments, torch.inf)
    return pull.add_(restored)


def doubts(fit: LayerFit, wanted: Tensor) -> Tensor:
    """By how many steps each wanted weight is off its code, at most half a step: (rows, columns)."""
    size = fit.group_size
    off = (wanted - fit.restored()).reshape(len(wanted), -1, size) / fit.scale.unsqueeze(2)
    return off.flatten(1).clamp_(-_LARGEST_DOUBT, _LARGEST_DOUBT)


def rates(steps: int) -> list[float]:
    """How far each step may move a latent, in steps of the grid: from 1/steps, linearly to 0."""
    return [(steps - step) / steps**2 for step in range(steps)]


def codes_of(fit: LayerFit, latent: Tensor) -> Tensor:
    """The codes nearest to the latents: (rows, columns)."""
    return fit.grid.nearest_(latent.clone())


def latent_signs(fit: LayerFit, gradient: Tensor) -> Tensor:
    """The sign of ∂L/∂u, from ∂L/∂ŵ: (rows, columns). Scales may be negative."""
    signs = gradient.sign().view(len(gradient), -1, fit.group_size)
    return signs.mul_(fit.scale.sign().unsqueeze(2)).flatten(1)
