"""Second moments of what the linear layers of a block are given, one for each distinct input.

Experts see only the tokens that are routed to them. Of one that saw too few its own statistics say nothing: it is taken
for one whose inputs are white noise, H = I, for which every calibrated method does what it does without calibration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from app.spec.architectures import is_expert

# Tokens per input feature: with fewer, H has so low a rank that compensating by it fits the noise.
_ENOUGH = 1 / 8
# Blocks of columns of the symmetric product: those below the diagonal need not be computed.
_GRAM_BLOCKS = 4
_SMALLEST_GRAM_BLOCK = 128


@dataclass
class InputSite:
    """An input that one or several layers share, such as that of the query, key and value projections."""

    layers: list[str] = field(default_factory=list)
    """Names within the block, in the order they are called."""
    total: Tensor | None = None
    """The upper triangle of Σ x xᵀ over the tokens seen: (features, features), float32; below it is no use."""
    tokens: int = 0
    is_guess: bool = False
    """An expert's input on too few tokens: H is the identity."""

    def add(self, inputs: Tensor) -> None:
        """Take in more tokens: (..., tokens, features)."""
        rows = inputs.reshape(-1, inputs.shape[-1])
        if self.total is None:
            self.total = torch.zeros(rows.shape[1], rows.shape[1], device=rows.device)
        add_gram(self.total, rows)
        self.tokens += len(rows)

    def second_moment(self) -> Tensor:
        """H = Σ x xᵀ / T: (features, features). Takes the memory of the sum: to be called once, at the end."""
        if self.total is None:
            raise ValueError("this input was never seen")
        if self.is_guess:
            return torch.eye(len(self.total), device=self.total.device)
        moment, self.total = self.total.div_(self.tokens), None
        for start, stop in _spans(len(moment)):
            moment[stop:, start:stop] = moment[start:stop, stop:].t()
        return moment


def add_gram(total: Tensor, rows: Tensor) -> None:
    """Add xᵀ x to the blocks of `total` (features, features) on and above its diagonal: rows (tokens, features).

    Products of 16-bit inputs are summed in float32 over the tokens given at once, and over all calls.
    """
    columns = rows.t()
    for start, stop in _spans(len(total)):
        product = columns[start:stop] @ rows[:, start:]
        total[start:stop, start:] += product


def _spans(features: int) -> list[tuple[int, int]]:
    size = max(_SMALLEST_GRAM_BLOCK, -(-features // _GRAM_BLOCKS))
    return [(start, min(features, start + size)) for start in range(0, features, size)]


def input_moments(block: nn.Module, names: Iterable[str], run: Callable[[], None]) -> list[InputSite]:
    """Run the block and gather H for every input of the named layers.

    A layer that is never called is in no site, but for an expert's, whose input is guessed.
    """
    names = list(names)
    sites: dict[str, InputSite] = {}
    last: list[tuple[Tensor, InputSite]] = []

    def look(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            (given,) = inputs
            site = sites.get(name)
            if site is None:
                # Layers called with the very same tensor share its moments; the tensor is held, so its id is its own.
                site = next((known for tensor, known in last if tensor is given), None) or InputSite()
                sites[name] = site
                site.layers.append(name)
                last.append((given, site))
            if site.layers[0] == name:
                site.add(given)

        return hook

    handles = [block.get_submodule(name).register_forward_pre_hook(look(name)) for name in names]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    for name in names:
        if is_expert(name):
            _guess_if_seldom(block.get_submodule(name), sites.setdefault(name, InputSite([name])))
    return list({id(site): site for site in sites.values()}.values())


def _guess_if_seldom(layer: nn.Module, site: InputSite) -> None:
    weight = layer.get_parameter("weight")
    if site.tokens < _ENOUGH * weight.shape[1]:
        site.total = weight.new_zeros(weight.shape[1], weight.shape[1])
        site.is_guess = True


def seldom_used(sites: Iterable[InputSite], stored: Callable[[str], str]) -> dict[str, int]:
    """Names in the checkpoint of the experts whose input was guessed, and how many tokens each saw.

    `stored` gives a layer's name in the checkpoint by that within the block.
    """
    guessed = [(stored(site.layers[0]), site.tokens) for site in sites if site.is_guess]
    return {_expert_of(name): tokens for name, tokens in guessed}


def _expert_of(layer: str) -> str:
    """`model.layers.0.mlp.experts.3` of `model.layers.0.mlp.experts.3.up_proj.weight`."""
    mixture, _, rest = layer.partition(".experts.")
    return f"{mixture}.experts.{rest.partition('.')[0]}"


def warning_of_seldom_used(experts: dict[str, int]) -> list[str]:
    """One warning that names the experts, those without a token first; none where there are none."""
    unseen = [name for name, tokens in experts.items() if tokens == 0]
    few = [f"{name} ({tokens})" for name, tokens in experts.items() if tokens]
    parts = [
        f"{what}: {', '.join(names)}"
        for what, names in (("experts that saw no token", unseen), ("experts that saw too few tokens", few))
        if names
    ]
    if not parts:
        return []
    return [f"rounded to nearest for want of calibration, {'; '.join(parts)}. Raise calibration_tokens."]
