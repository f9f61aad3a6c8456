"""The experts of a mixture as linear layers of their own, each given only the tokens that are its.

transformers 5 holds all experts of a block in two parameters, gate_up_proj (experts, 2·inner, hidden) and down_proj
(experts, hidden, inner), and computes with both at once. Files have three matrices for each expert, and a layer that is
looked at through hooks, or changed, must be a module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn


class SeparateExperts(nn.Module):
    """Takes the place of transformers' experts: the same arguments, the same outputs; parameters are not made yet.

    Modules are named `0.w1` and so on, as files name them.
    """

    def __init__(self, fused: nn.Module, layers: tuple[str, str, str]) -> None:
        """Build modules of the sizes in `fused`; `layers` are the names of gate, up and down projection."""
        super().__init__()
        down: Tensor = fused.get_parameter("down_proj")
        count, hidden, inner = down.shape
        self._layers = layers
        self._activation: Callable[[Tensor], Tensor] = fused.act_fn  # type: ignore[assignment]  # a module
        for index in range(count):
            expert = nn.Module()
            for layer, sizes in zip(layers, ((hidden, inner), (hidden, inner), (inner, hidden)), strict=True):
                expert.add_module(layer, nn.Linear(*sizes, bias=False, device="meta"))
            self.add_module(str(index), expert)
        self._count = count

    def experts(self) -> list[nn.Module]:
        """Each expert, its three layers named as files name them."""
        return [self.get_submodule(str(index)) for index in range(self._count)]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(tokens, hidden), which experts (tokens, k) and how much of each (tokens, k) -> (tokens, hidden)."""
        total = torch.zeros_like(hidden_states)
        for index in range(self._count):
            tokens, place = torch.where(top_k_index == index)
            # An expert without a token is called too: hooks count on every layer in the same order each time.
            gate, up, down = (self.get_submodule(f"{index}.{layer}") for layer in self._layers)
            given = hidden_states[tokens]
            output = down(self._activation(gate(given)) * up(given))
            total.index_add_(0, tokens, (output * top_k_weights[tokens, place, None]).to(total.dtype))
        return total


def separate_experts(model: nn.Module, layers: tuple[str, str, str]) -> None:
    """Give every mixture in a model on the meta device experts of their own."""
    fused = [
        name
        for name, module in model.named_modules()
        if {"gate_up_proj", "down_proj"}
        <= {n for n, p in module.named_parameters(recurse=False) if p.dim() == 3}
    ]
    for name in fused:
        model.set_submodule(name, SeparateExperts(model.get_submodule(name), layers))


def is_fused(name: str) -> bool:
    """True for a parameter that holds one matrix or two of every expert of a block."""
    return name.endswith((".experts.gate_up_proj", ".experts.down_proj"))


def separate_state(state: Mapping[str, Tensor], layers: tuple[str, str, str]) -> dict[str, Tensor]:
    """A state dict with a matrix for each expert, a view, where all shared a parameter."""
    gate, up, down = layers
    separate: dict[str, Tensor] = {}
    for name, value in state.items():
        if not is_fused(name):
            separate[name] = value
            continue
        mixture, _, kind = name.rpartition(".")
        for index, expert in enumerate(value):
            parts = (
                {down: expert} if kind == "down_proj" else dict(zip((gate, up), expert.chunk(2), strict=True))
            )
            separate |= {f"{mixture}.{index}.{layer}.weight": part for layer, part in parts.items()}
    return separate
