"""Low-rank recovery: the weights stand still, and a product of two thin matrices is trained beside each linear layer.

Paper: Hu et al. 2022, "LoRA: Low-Rank Adaptation of Large Language Models", section 4. Optimizer state and gradients are
those of the thin matrices alone; at the end their products are added to the weights, and nothing of them is left.
Left out: adapters of embeddings, heads and fused experts.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from app.spec.architectures import is_compressible, is_router

# Twice the product, as adapters whose alpha is two times their rank.
_SCALE = 2.0


class LowRank(nn.Module):
    """Adapters of a model's linear layers in its blocks; the model's own parameters are frozen.

    ΔW = 2·B·A: A (rank, inputs) is drawn, B (outputs, rank) zero, so that the model is at first what it was.
    """

    def __init__(self, model: Any, rank: int) -> None:
        super().__init__()
        model.requires_grad_(False)
        self._layers: dict[str, Any] = {}
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        for name, weight in model.named_parameters():
            if not is_compressible(name, tuple(weight.shape)) or is_router(name):
                continue
            layer = model.get_submodule(name.removesuffix(".weight"))
            outputs, inputs = weight.shape if isinstance(layer, nn.Linear) else weight.shape[::-1]
            # Names of parameters may hold no dots.
            key = name.replace(".", "/")
            self._layers[key] = layer
            bound = 1 / math.sqrt(inputs)
            self.down[key] = nn.Parameter(
                torch.empty(rank, inputs, device=weight.device).uniform_(-bound, bound)
            )
            self.up[key] = nn.Parameter(torch.zeros(outputs, rank, device=weight.device))
            layer.register_forward_hook(partial(self._add, key))

    def _add(self, key: str, _layer: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        narrow = nn.functional.linear(arguments[0], self.down[key])
        return output + _SCALE * nn.functional.linear(narrow, self.up[key])

    @torch.no_grad()
    def merge(self) -> None:
        """Add the products to the weights, and be zero from then on."""
        for key, layer in self._layers.items():
            product = _SCALE * self.up[key] @ self.down[key]
            layer.weight.add_(product if isinstance(layer, nn.Linear) else product.T)
            self.up[key].zero_()
