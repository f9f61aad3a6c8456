"""Factors per input channel that make a layer's weights easier to round: W·diag(s) is rounded, x/s is what it is given.

AWQ (Lin et al. 2023, "Activation-aware Weight Quantization", sec. 3.2, eqs. 4-5): s = m^α with m the channel's typical
magnitude, α from a grid by the error of the outputs after rounding. Here m is the root mean square, which the second
moments hold, where the paper has the mean magnitude; and the error is tr(ΔW H ΔWᵀ), which needs no forward pass.
SmoothQuant (Xiao et al. 2022, eq. 4): s = max|x|^α / max|w|^(1 − α), for activations that are rounded too. There α is one
number for the model; here it may be found for each input, by what rounding both is expected to cost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from workers.engine.quantize.compensation import output_error

# α of AWQ's grid. The first leaves the layer as it is.
AWQ_STRENGTHS = tuple(step / 8 for step in range(8))
SMOOTHING_STRENGTHS = tuple(step / 10 for step in range(11))
"""α of SmoothQuant's grid."""
# The largest ratio of a factor to their geometric middle: keeps scaled weights within what 16 bits hold.
_LARGEST = 2.0**7


def balanced(factor: Tensor) -> Tensor:
    """The same proportions around 1; channels with no factor (0, or not finite) get 1."""
    usable = torch.isfinite(factor) & (factor > 0)
    if not usable.any():
        return torch.ones_like(factor)
    middle = (factor[usable].max() * factor[usable].min()).sqrt()
    return torch.where(usable, factor / middle, 1.0).clamp(1 / _LARGEST, _LARGEST)


def awq_factor(second_moment: Tensor, strength: float) -> Tensor:
    """s = rms(x)^α for each input, from H: (inputs, inputs) -> (inputs,)."""
    moments = second_moment.diagonal()
    return balanced(torch.where(moments > 0, moments.sqrt().pow(strength), 0.0))


def smoothing_factor(input_peaks: Tensor, weight_peaks: Tensor, strength: float) -> Tensor:
    """s = max|x|^α / max|w|^(1 − α) for each input: (inputs,), (inputs,) -> (inputs,)."""
    return balanced(input_peaks.pow(strength) / weight_peaks.pow(1 - strength))


def expected_loss(
    weight: Tensor, moments: Tensor, sample: Tensor, factor: Tensor, *, per_token: bool
) -> float:
    """What outputs lose when W·diag(s) and x/s are both rounded to 8 bits, in units that all factors share.

    Rounding to steps Δ adds noise of variance Δ²/12 to each number: a row's step is its largest weight's share, a token's
    its largest feature's (without `per_token`, that of all tokens is one). So it is Σ_i max_j (W_ij s_j)² · Σ_j H_jj/s_j²
    for the weights, and E[max_j (x_j/s_j)²] · ‖W·diag(s)‖² for the inputs, times 1/(12·127²) either way.
    weight (rows, inputs), moments (inputs,), the diagonal of H, sample of inputs (tokens, inputs), factor (inputs,).
    """
    scaled = weight * factor
    of_weights = scaled.abs().amax(1).square().sum() * (moments / factor.square()).sum()
    peaks = (sample / factor).abs().amax(1).square()
    of_inputs = (peaks.mean() if per_token else peaks.max()) * scaled.square().sum()
    return float(of_weights + of_inputs)


def scaled_moment(second_moment: Tensor, factor: Tensor) -> Tensor:
    """H of x/s: (inputs, inputs), (inputs,) -> (inputs, inputs)."""
    return second_moment / factor / factor.unsqueeze(1)


Restore = Callable[[Tensor, Tensor], Tensor]
"""Round a weight (rows, inputs) under second moments (inputs, inputs), and give what a loader makes of it."""


def best_candidate(
    weights: Sequence[tuple[Tensor, Restore]], second_moment: Tensor, candidates: Sequence[Tensor]
) -> int:
    """Which candidate (inputs,) makes the weights' outputs lose least by rounding; the first wins ties."""
    errors = []
    for factor in candidates:
        moment = scaled_moment(second_moment, factor)
        # The same number as for the weights as they were: (ΔW s) (H / s sᵀ) (ΔW s)ᵀ.
        errors.append(
            sum(output_error(restore(w * factor, moment) - w * factor, moment) for w, restore in weights)
        )
    return errors.index(min(errors))
