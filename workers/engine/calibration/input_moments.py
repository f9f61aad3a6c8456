"""Second moments of what the linear layers of a block are given, one for each distinct input.

Experts see only the tokens that are routed to them. Of one that saw too few its own statistics say nothing: it is taken
for one whose inputs are white noise, H = I, for which every calibrated method does what it does without calibration.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from app.errors import JobFailed
from app.spec.architectures import is_expert
from workers.engine.calibration.block_stream import EnoughSeen, LiveBlock
from workers.engine.calibration.device_shares import on_all

Hook = Callable[[nn.Module, tuple[Any, ...]], None]

_IGNORE_IT = "Put these layers on the step's ignore list, or use quantize.weights."
# Tokens per input feature: with fewer, H has so low a rank that compensating by it fits the noise.
_ENOUGH = 1 / 8
# Blocks of columns of the symmetric product: those below the diagonal need not be computed.
_GRAM_BLOCKS = 4
_SMALLEST_GRAM_BLOCK = 128
# The precision of products is one for all threads, each of which feeds a device.
_PRECISION = Lock()


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

    @property
    def is_guess(self) -> bool:
        """Whether it is an expert's and saw too few tokens, so that H is the identity; to be asked before H."""
        return (
            self.total is not None and is_expert(self.layers[0]) and self.tokens < _ENOUGH * len(self.total)
        )

    def add(self, inputs: Tensor) -> None:
        """Take in more tokens: (..., tokens, features)."""
        rows = inputs.reshape(-1, inputs.shape[-1])
        if self.total is None:
            self.total = torch.zeros(rows.shape[1], rows.shape[1], device=rows.device)
        add_gram(self.total, rows)
        self.tokens += len(rows)
        if not len(rows):
            return
        sums = rows.sum(0, dtype=torch.float32)
        self.sums = sums if self.sums is None else self.sums + sums
        peaks = rows.abs().amax(0)
        self.largest = peaks if self.largest is None else torch.maximum(self.largest, peaks)

    def absorb(self, other: InputSite) -> None:
        """Take in what was seen on another device."""
        if other.total is None:
            return
        if self.total is None:
            raise ValueError("the first device sees windows if any does")
        self.total += other.total.to(self.total.device)
        self.tokens += other.tokens
        if other.sums is None or other.largest is None:
            return
        sums, largest = other.sums.to(self.total.device), other.largest.to(self.total.device)
        self.sums = sums if self.sums is None else self.sums + sums
        self.largest = largest if self.largest is None else torch.maximum(self.largest, largest)

    def peak(self) -> float:
        """The largest magnitude of all; 0 where no token was seen."""
        return 0.0 if self.largest is None else float(self.largest.max())

    def mean(self) -> Tensor:
        """E[x]: (features,), float32; zeros where no token was seen."""
        if self.total is None:
            raise ValueError("this input was never seen")
        return torch.zeros_like(self.total[0]) if self.sums is None else self.sums / self.tokens

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

    Products of 16-bit inputs are exact, and summed in float32.
    """
    with _PRECISION, _products_in_16_bits(rows):
        rows = rows.float()
        columns = rows.t()
        for start, stop in _spans(len(total)):
            total[start:stop, start:].addmm_(columns[start:stop], rows[:, start:])


@contextmanager
def _products_in_16_bits(rows: Tensor) -> Iterator[None]:
    """Let float32 operands that came from bfloat16 be multiplied as that, or as TF32 on a GPU: faster, and nothing lost.

    A product in bfloat16 itself would be rounded to bfloat16: then H of many features may have no factor.
    """
    on_cpu = rows.device.type == "cpu"
    matmul = torch.backends.mkldnn.matmul if on_cpu else torch.backends.cuda.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    if rows.dtype is torch.bfloat16:
        matmul.fp32_precision = "bf16" if on_cpu else "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _spans(features: int) -> list[tuple[int, int]]:
    size = max(_SMALLEST_GRAM_BLOCK, -(-features // _GRAM_BLOCKS))
    return [(start, min(features, start + size)) for start in range(0, features, size)]


def input_sites(block: LiveBlock, names: Iterable[str]) -> list[InputSite]:
    """The distinct inputs of the named layers, in the order they are called, from the first window alone.

    Layers called with the very same tensor share a site; a layer that is never called is in none. Experts are always
    called, if with no token.
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
        block.run_first()
    return [site for _, site in sites]


def reached_sites(
    block: LiveBlock, wanted: Container[str], *, hint: str = _IGNORE_IT
) -> tuple[dict[str, str], list[InputSite]]:
    """The block's layers whose weights' stored names are wanted, with these by the layers' names, and their inputs.

    Raises JobFailed, with `hint`, when calibration never reaches one.
    """
    chosen = {
        name.removesuffix(".weight"): stored
        for name, stored in block.stored_names.items()
        if stored in wanted
    }
    sites = input_sites(block, chosen) if chosen else []
    unseen = chosen.keys() - {layer for site in sites for layer in site.layers}
    if unseen:
        raise JobFailed(
            f"Calibration never reached {', '.join(sorted(chosen[name] for name in unseen))}.",
            code="layer_never_called",
            hint=hint,
        )
    return chosen, sites


def gather_moments(block: LiveBlock, sites: Sequence[InputSite]) -> None:
    """Run the block on every window as far as the last of the sites, and add up what each is given."""
    if block.shared is None:
        _gather(block, sites)
        return
    shares = block.shared()
    found = [sites, *([InputSite(list(site.layers)) for site in sites] for _ in shares[1:])]
    on_all(lambda number: _gather(shares[number], found[number]), range(len(shares)), block.devices)
    for others in found[1:]:
        for site, other in zip(sites, others, strict=True):
            site.absorb(other)


def _gather(block: LiveBlock, sites: Sequence[InputSite]) -> None:
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


def expert_of(layer: str) -> str:
    """`model.layers.0.mlp.experts.3` of `model.layers.0.mlp.experts.3.up_proj.weight`."""
    mixture, _, rest = layer.partition(".experts.")
    return f"{mixture}.experts.{rest.partition('.')[0]}"


def warning_of_seldom_used(experts: dict[str, int], *, consequence: str) -> list[str]:
    """One warning that names experts and the tokens they saw, those without any first; none where there are none.

    `consequence`: what was done to them, e.g. "rounded to nearest".
    """
    unseen = [name for name, tokens in experts.items() if tokens == 0]
    few = [f"{name} ({tokens})" for name, tokens in experts.items() if tokens]
    parts = [
        f"{what}: {', '.join(names)}"
        for what, names in (("experts that saw no token", unseen), ("experts that saw too few tokens", few))
        if names
    ]
    if not parts:
        return []
    return [f"{consequence} for want of calibration, {'; '.join(parts)}. Raise calibration_tokens."]
