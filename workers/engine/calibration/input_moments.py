"""Second moments of what the linear layers of a block are given, one for each distinct input."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from workers.engine.calibration.block_stream import EnoughSeen, LiveBlock

Hook = Callable[[nn.Module, tuple[Any, ...]], None]

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
    largest: Tensor | None = None
    """The largest magnitude of each feature over the tokens seen: (features,)."""
    sums: Tensor | None = None
    """Σ x over the tokens seen: (features,), float32."""

    def add(self, inputs: Tensor) -> None:
        """Take in more tokens: (..., tokens, features)."""
        rows = inputs.reshape(-1, inputs.shape[-1])
        if self.total is None:
            self.total = torch.zeros(rows.shape[1], rows.shape[1], device=rows.device)
        add_gram(self.total, rows)
        self.tokens += len(rows)
        sums = rows.sum(0, dtype=torch.float32)
        self.sums = sums if self.sums is None else self.sums + sums
        peaks = rows.abs().amax(0)
        self.largest = peaks if self.largest is None else torch.maximum(self.largest, peaks)

    def mean(self) -> Tensor:
        """E[x]: (features,), float32."""
        if self.sums is None:
            raise ValueError("this input was never seen")
        return self.sums / self.tokens

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


def input_sites(block: LiveBlock, names: Iterable[str]) -> list[InputSite]:
    """The distinct inputs of the named layers, in the order they are called, from the first window alone.

    Layers called with the very same tensor share a site; a layer that is never called is in none.
    """
    sites: list[tuple[Tensor, InputSite]] = []

    def look(name: str) -> Hook:
        def hook(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            (given,) = inputs
            # The tensors are held, so that their identities stay their own.
            site = next((known for tensor, known in sites if tensor is given), None)
            if site is None:
                site = InputSite()
                sites.append((given, site))
            site.layers.append(name)

        return hook

    with _hooked(block, {name: look(name) for name in names}):
        block.run(windows=1)
    return [site for _, site in sites]


def gather_moments(block: LiveBlock, sites: Sequence[InputSite]) -> None:
    """Run the block on every window as far as the last of the sites, and add up what each is given."""

    def add(site: InputSite) -> Hook:
        def hook(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            site.add(inputs[0])
            if site is sites[-1]:
                raise EnoughSeen

        return hook

    with _hooked(block, {site.layers[0]: add(site) for site in sites}):
        block.run()


@contextmanager
def _hooked(block: LiveBlock, hooks: dict[str, Hook]) -> Iterator[None]:
    handles = [
        block.module.get_submodule(name).register_forward_pre_hook(hook) for name, hook in hooks.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
