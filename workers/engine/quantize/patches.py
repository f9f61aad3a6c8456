"""What the weights of a layer are multiplied by: rows of a linear layer's input, patches of a convolution's (im2col)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

# Numbers of unfolded patches held at once.
_AT_ONCE = 2**24


def groups_of(layer: nn.Module) -> int:
    """How many groups a layer's outputs fall into, each with inputs of its own."""
    return layer.groups if isinstance(layer, nn.Conv2d) else 1


def second_moments(layer: nn.Module, inputs: Tensor) -> Tensor:
    """H = Σ p pᵀ / T over the patches p of each group: (groups, columns, columns), float32.

    Of a convolution, inputs are (images, channels, height, width) and columns channels / groups × rows × columns of its
    kernel; of a linear layer (…, features) and features.
    """
    total, count = None, 0
    for patches in _patches(layer, inputs):
        if total is None:
            total = torch.zeros(len(patches), patches.shape[1], patches.shape[1], device=patches.device)
        total.baddbmm_(patches, patches.transpose(1, 2))
        count += patches.shape[2]
    if total is None:
        raise ValueError("no inputs")
    return total.div_(count)


def _patches(layer: nn.Module, inputs: Tensor) -> Iterator[Tensor]:
    """(groups, columns, patches), some images at a time."""
    if not isinstance(layer, nn.Conv2d):
        rows = inputs.reshape(-1, inputs.shape[-1])
        for part in torch.split(rows, max(1, _AT_ONCE // rows.shape[1])):
            yield part.t().unsqueeze(0)
        return
    size = inputs[0].numel() * layer.kernel_size[0] * layer.kernel_size[1]
    for part in torch.split(inputs, max(1, _AT_ONCE // size)):
        unfolded = functional.unfold(part, layer.kernel_size, layer.dilation, _padding(layer), layer.stride)
        images, columns, places = unfolded.shape
        grouped = unfolded.view(images, layer.groups, columns // layer.groups, places)
        yield grouped.permute(1, 2, 0, 3).flatten(2)


def _padding(layer: nn.Conv2d) -> tuple[int, ...]:
    if isinstance(layer.padding, str) or layer.padding_mode != "zeros":
        raise ValueError(f"padding {layer.padding!r} by {layer.padding_mode} is not known")
    return layer.padding
