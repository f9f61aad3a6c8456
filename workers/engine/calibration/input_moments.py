"""Second moments of what the linear layers of a block are given, one for each distinct input."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn


@dataclass
class InputSite:
    """An input that one or several layers share, such as that of the query, key and value projections."""

    layers: list[str] = field(default_factory=list)
    """Names within the block, in the order they are called."""
    total: Tensor | None = None
    """Σ x xᵀ over the tokens seen: (features, features), float32."""
    tokens: int = 0

    def add(self, inputs: Tensor) -> None:
        """Take in more tokens: (..., tokens, features)."""
        rows = inputs.reshape(-1, inputs.shape[-1]).float()
        if self.total is None:
            self.total = rows.new_zeros(rows.shape[1], rows.shape[1])
        self.total.addmm_(rows.t(), rows)
        self.tokens += len(rows)

    def second_moment(self) -> Tensor:
        """H = Σ x xᵀ / T: (features, features)."""
        if self.total is None:
            raise ValueError("this input was never seen")
        return self.total / self.tokens


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
