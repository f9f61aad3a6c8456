"""Training for a grid: the student computes with rounded weights, and learns to live with them.

Idea: in each forward pass a layer's weights are rounded to the symmetric integers that quantization will store, scales
from the largest weight of each group; gradients pass as if nothing had been rounded (straight-through, Bengio et al.
2013, "Estimating or Propagating Gradients Through Stochastic Neurons"). At the end the weights are put where they were
rounded to. `quantize.weights` with the same bits and groups then finds these very integers.
Paper: Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
section 3. Left out: rounded activations, asymmetric grids and floats, learned scales.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from app.spec.architectures import is_compressible, is_router
from workers.engine.quantize.grid import Grid
from workers.engine.quantize.layer_fit import fit_layer


class OnGrid:
    """The linear layers in the blocks of a model, computing with rounded weights from now on."""

    def __init__(self, model: Any, *, bits: int, group_size: int | None, dtype: torch.dtype) -> None:
        self._grid, self._group_size, self._dtype = Grid(bits, symmetric=True), group_size, dtype
        self._layers: list[Any] = [
            model.get_submodule(name.removesuffix(".weight"))
            for name, weight in model.named_parameters()
            if is_compressible(name, tuple(weight.shape)) and not is_router(name)
        ]
        for layer in self._layers:
            layer.register_forward_pre_hook(self._round)
            layer.register_forward_hook(_let_go, always_call=True)

    @torch.no_grad()
    def settle(self) -> None:
        """Put the weights where they were rounded to."""
        for layer in self._layers:
            layer.weight.copy_(self._rounded(layer.weight))

    def _rounded(self, weight: Tensor) -> Tensor:
        fit = fit_layer(
            weight.detach(), self._grid, group_size=self._group_size, dtype=self._dtype, search="absmax"
        )
        return fit.restored()

    def _round(self, layer: Any, _arguments: Any) -> None:
        weight = layer.weight
        # An attribute of the instance hides the parameter of that name while the layer computes.
        layer.__dict__["weight"] = weight + (self._rounded(weight) - weight).detach()


def _let_go(layer: nn.Module, _arguments: Any, _output: Any) -> None:
    del layer.__dict__["weight"]
