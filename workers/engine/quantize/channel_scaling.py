"""Scale the channels of a block before its layers are quantized, and fold the factors into what feeds those layers.

Papers: Lin et al. 2023, "AWQ"; Xiao et al. 2022, "SmoothQuant"; formulas in channel_factors.py. The block gives what it
gave, so any solver can follow. Left out: AWQ's search for clipped ranges, since scales are searched anyway.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from app.errors import JobFailed
from app.spec.quantize import QuantizeCalibrated
from workers.engine.architectures.feeding import Feed, feeds_of, fold
from workers.engine.calibration.block_stream import EnoughSeen, LiveBlock
from workers.engine.calibration.input_moments import InputSite, gather_moments, input_sites
from workers.engine.checkpoint.layout import TORCH_DTYPES
from workers.engine.export.stored_layer import StoredLayer
from workers.engine.quantize.channel_factors import (
    AWQ_STRENGTHS,
    SMOOTHING_STRENGTHS,
    Restore,
    awq_factor,
    balanced,
    best_candidate,
    expected_loss,
    smoothing_factor,
)

# Of what the block adds to its input. Folding costs roundings of 16-bit weights, far less than this; a module that
# feeds more than it is known to feed costs far more.
_LARGEST_CHANGE = 0.05
# Tokens whose largest features are looked at.
_SAMPLED_TOKENS = 2048
# SmoothQuant's own, where there are no rounded inputs to find one by.
_USUAL_STRENGTH = 0.5


@dataclass
class Scaled:
    """What scaling has changed beside the layers that are still to be quantized."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    """By their names in the checkpoint, as they are to be stored."""
    warnings: list[str] = field(default_factory=list)


def scale_channels(
    block: LiveBlock, step: QuantizeCalibrated, layers: dict[str, StoredLayer], *, threads: int
) -> Scaled:
    """Scale what can be scaled, in place; `layers` are those to be quantized, by the names of their weights.

    Raises JobFailed when the block does not give what it gave: then this architecture is not as it is taken to be.
    """
    chosen = {
        name.removesuffix(".weight"): layers[stored]
        for name, stored in block.stored_names.items()
        if stored in layers
    }
    feeds = [feed for feed in feeds_of(block.module) if any(name in chosen for name in feed.layers)]
    scaled = Scaled(warnings=_left_out(block, feeds, list(chosen)))
    if not feeds:
        return scaled
    hidden = block.window(0)
    before = block.call.run(block.module, hidden)
    sites = input_sites(block, [feed.layers[0] for feed in feeds])
    gather_moments(block, sites)
    by_layer = {site.layers[0]: site for site in sites}
    factors = [_factor(block, feed, by_layer.pop(feed.layers[0]), step, chosen, threads) for feed in feeds]
    changed = [
        name for feed, factor in zip(feeds, factors, strict=True) for name in fold(block.module, feed, factor)
    ]
    dtype = TORCH_DTYPES[next(iter(chosen.values())).dtype]
    for name in changed:
        stored = block.stored_names[name]
        if stored not in layers:
            parameter = block.module.get_parameter(name)
            scaled.tensors[stored] = parameter.to(dtype).cpu()
            parameter.copy_(scaled.tensors[stored])
    _check_unchanged(block, hidden, before)
    return scaled


def _factor(
    block: LiveBlock,
    feed: Feed,
    site: InputSite,
    step: QuantizeCalibrated,
    chosen: dict[str, StoredLayer],
    threads: int,
) -> Tensor:
    """The factor of each channel of a feed's source: (channels,)."""
    if step.scaling == "smoothquant":
        if site.largest is None:
            raise ValueError("an input that feeds a whole block is never empty")
        weights = [block.module.get_parameter(f"{name}.weight").float() for name in feed.layers]
        peaks = feed.shared(torch.stack([weight.abs().amax(0) for weight in weights]).amax(0))
        inputs = feed.shared(site.largest.float())
        if step.smoothing_strength is not None or step.activations == "none" or step.number_format != "int":
            return smoothing_factor(
                inputs, peaks, _USUAL_STRENGTH if step.smoothing_strength is None else step.smoothing_strength
            )
        return _smoothest(
            [smoothing_factor(inputs, peaks, strength) for strength in SMOOTHING_STRENGTHS],
            feed,
            weights,
            site.second_moment().diagonal(),
            # One range for all tokens is that of the largest inputs there were.
            _sample(block, feed.layers[0]) if step.activations == "dynamic" else site.largest.float()[None],
            per_token=step.activations == "dynamic",
        )
    second_moment = site.second_moment()
    candidates = [balanced(feed.shared(awq_factor(second_moment, strength))) for strength in AWQ_STRENGTHS]
    found = best_candidate(
        list(_restorable(block, feed, chosen, threads)), second_moment, [feed.repeated(c) for c in candidates]
    )
    return candidates[found]


def _smoothest(
    candidates: list[Tensor],
    feed: Feed,
    weights: list[Tensor],
    moments: Tensor,
    sample: Tensor,
    *,
    per_token: bool,
) -> Tensor:
    """The candidate (channels,) with which a feed's layers are expected to lose least; the first wins ties."""
    losses = [
        sum(expected_loss(w, moments, sample, feed.repeated(factor), per_token=per_token) for w in weights)
        for factor in candidates
    ]
    return candidates[losses.index(min(losses))]


def _sample(block: LiveBlock, layer: str) -> Tensor:
    """What a layer is given for the first tokens: (tokens, features), float32."""
    seen: list[Tensor] = []

    def look(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0].flatten(0, -2).float())
        raise EnoughSeen

    handle = block.module.get_submodule(layer).register_forward_pre_hook(look)
    try:
        for number in range(block.windows):
            with suppress(EnoughSeen):
                block.call.run(block.module, block.window(number))
            if sum(map(len, seen)) >= _SAMPLED_TOKENS:
                break
    finally:
        handle.remove()
    return torch.cat(seen)


def _restorable(
    block: LiveBlock, feed: Feed, chosen: dict[str, StoredLayer], threads: int
) -> Iterator[tuple[Tensor, Restore]]:
    """The weights of a feed's layers that are to be quantized, and how each is rounded."""
    for name in feed.layers:
        if (layer := chosen.get(name)) is None:
            continue

        def restore(weight: Tensor, moment: Tensor, layer: StoredLayer = layer) -> Tensor:
            grid = layer.grid(float(weight.abs().max()))
            return layer.nearest(weight, grid, importance=moment.diagonal(), threads=threads).restored()

        yield block.module.get_parameter(f"{name}.weight").float(), restore


def _left_out(block: LiveBlock, feeds: list[Feed], names: list[str]) -> list[str]:
    """A warning that names the layers nothing can be folded for; said of the first block, since all are alike."""
    fed = {name for feed in feeds for name in feed.layers}
    left = [name for name in names if name not in fed]
    if not left or block.index:
        return []
    return [f"not scaled in any block, since nothing before them can take the factors: {', '.join(left)}"]


def _check_unchanged(block: LiveBlock, hidden: Tensor, before: Tensor) -> None:
    after = block.call.run(block.module, hidden)
    change = torch.linalg.vector_norm((after - before).float())
    if not change <= _LARGEST_CHANGE * torch.linalg.vector_norm((before - hidden).float()):
        raise JobFailed(
            f"Scaling the channels of block {block.index} has changed what it gives.",
            code="scaling_not_exact",
            hint="Set scaling to none for this model.",
        )
