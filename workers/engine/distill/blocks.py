"""The blocks of a loaded model, as training sees them."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from app.spec.architectures import blocks_name


def blocks_of(model: Any) -> nn.ModuleList:
    """The list of blocks of a model."""
    name = next(found for n, _ in model.named_parameters() if (found := blocks_name(n)) is not None)
    blocks = model.get_submodule(name)
    if not isinstance(blocks, nn.ModuleList):
        raise TypeError(f"{name} is no list of blocks")
    return blocks


def recompute_activations(model: Any) -> None:
    """Keep what enters each block alone, and compute the rest again for the gradient (Chen et al. 2016)."""
    for block in blocks_of(model):
        # transformers' own switch does so in training mode alone, which would turn dropout on.
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
