"""Second moments of what the linear layers of a block are given, one for each distinct input."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

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
    """Run the block and gather H for every input of the named layers; a layer that is never called is in no site."""
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
    return list({id(site): site for site in sites.values()}.values())
