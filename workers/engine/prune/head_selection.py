"""Which groups of a layer's inputs can go, each as a whole, when those that stay make up for them.

As in channel_selection, for the inputs D of a group together: leaving them out costs tr(W_D H_DD W_Dᵀ), and once the rest is
refitted tr(W_D ([H⁻¹]_DD)⁻¹ W_Dᵀ) (Kurtic et al. 2023, "ZipLM", section 3.1). Groups are few: one goes at a time, and those left
are scored anew.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workers.engine.prune.channel_selection import eliminate_


def strongest_groups(weight: Tensor, second_moment: Tensor, size: int, count: int) -> Tensor:
    """The `count` groups of `size` neighbouring inputs whose own part of the outputs has most energy: ascending.

    weight (out, in), H (in, in). The earlier group wins a tie.
    """
    energy = torch.stack(
        [
            ((weight[:, span] @ second_moment[span, span]) * weight[:, span]).sum()
            for span in _spans(weight.shape[1], size)
        ]
    )
    return torch.argsort(energy, descending=True, stable=True)[:count].sort().values


def groups_hardest_to_replace(weight: Tensor, inverse: Tensor, size: int, count: int) -> Tensor:
    """The `count` groups left when those whose loss is made up for best have gone one by one: ascending.

    weight (out, in) and inverse = H⁻¹ (in, in), float32, are both used up.
    """
    spans = _spans(len(inverse), size)
    left = list(range(len(spans)))
    while len(left) > count:
        losses = [_loss(weight[:, spans[group]], inverse[spans[group], spans[group]]) for group in left]
        goes = left.pop(losses.index(min(losses)))
        chosen = torch.arange(spans[goes].start, spans[goes].stop, device=inverse.device)
        eliminate_(weight, inverse, chosen)
    return torch.tensor(left, device=inverse.device)


def inputs_of_groups(groups: Tensor, size: int) -> Tensor:
    """The indices of all inputs of groups: (n,) -> (n * size,)."""
    return (groups[:, None] * size + torch.arange(size, device=groups.device)).flatten()


def _loss(weight: Tensor, inverse: Tensor) -> float:
    return float((torch.linalg.solve(inverse, weight.t()) * weight.t()).sum())


def _spans(inputs: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, inputs, size)]
