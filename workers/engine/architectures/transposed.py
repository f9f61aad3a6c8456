"""GPT-2's linear layers, which store their weights as (in, out)."""

from __future__ import annotations

from torch import nn


def use_linear_layers(model: nn.Module) -> None:
    """Put an nn.Linear, weight (out, in), in the place of every Conv1D of a model, under the same name."""
    from transformers.pytorch_utils import Conv1D

    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            inputs, outputs = module.weight.shape
            linear = nn.Linear(inputs, outputs, device="meta")
            linear.weight = nn.Parameter(module.weight.detach().t().contiguous(), requires_grad=False)
            linear.bias = nn.Parameter(module.bias.detach(), requires_grad=False)
            model.set_submodule(name, linear)
