"""Gather what criteria ask of channels, and the second moments that the repair solves with, on calibration images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from workers.engine.onnx_network import Call, Network
from workers.engine.prune.channel_criteria import ChannelStatistics
from workers.engine.prune.channel_layout import Axis, Channels, stands_in

_IMAGES_AT_ONCE = 32
_IMAGES_PER_GRADIENT = 8
"""The mean of squares over single images, as far as batches can tell."""
_RECTIFIERS = frozenset({"Relu", "Clip", "HardSwish", "LeakyRelu", "Sigmoid", "HardSigmoid", "Tanh"})
Tick = Callable[[float], None]


@dataclass
class Moments:
    """Of a value over images and places, channel by channel: Σ x xᵀ and Σ x, float64, and how many were summed."""

    second: Tensor
    first: Tensor
    count: int = 0

    def add(self, value: Tensor, channels: int) -> None:
        """Count a value of (images, channels × repeat, …)."""
        samples = value.reshape(len(value), channels, -1).transpose(0, 1).flatten(1)
        self.second += samples @ samples.t()
        self.first += samples.sum(1)
        self.count += samples.shape[1]


@dataclass
class _Activations:
    size: Tensor
    zeros: Tensor
    count: int = 0


@dataclass
class Observed:
    """What one pass over the images has seen."""

    moments: dict[str, Moments] = field(default_factory=dict)
    """Of what each layer reads, by the name of its weight."""
    activations: dict[str, _Activations] = field(default_factory=dict)
    """Of what rectifiers give, by the name of the value."""


def observe(network: Network, channels: Channels, images: Tensor, tick: Tick) -> Observed:
    """Run images, ready for the network, through it, and count what its layers read and its rectifiers give."""
    seen = Observed()
    readers = {axis.array: axis for axis in channels.axes if axis.role == "reads"}

    def note(call: Call, inputs: Sequence[Tensor | None], output: Tensor) -> None:
        axis = readers.get(call.weight or "")
        if axis is not None and inputs[0] is not None:
            _count_reader(seen, channels, axis, inputs[0])
        elif call.operator in _RECTIFIERS and output.dim() > 1:
            _count_activations(seen, call.output, output)

    network.eval()
    with torch.no_grad():
        for start in range(0, len(images), _IMAGES_AT_ONCE):
            network(images[start : start + _IMAGES_AT_ONCE], note)
            tick(min(1.0, (start + _IMAGES_AT_ONCE) / len(images)))
    return seen


def _count_reader(seen: Observed, channels: Channels, axis: Axis, value: Tensor) -> None:
    # Flattened places are samples of their channel.
    width = sum(channels.sizes[segment.space] for segment in axis.layout)
    if len({segment.repeat for segment in axis.layout}) > 1:
        return
    if axis.array not in seen.moments:
        zeros = torch.zeros(width, width, dtype=torch.float64, device=value.device)
        seen.moments[axis.array] = Moments(zeros, torch.zeros_like(zeros[0]))
    seen.moments[axis.array].add(value, width)


def _count_activations(seen: Observed, name: str, value: Tensor) -> None:
    by_channel = value.transpose(0, 1).flatten(1)
    found = seen.activations.setdefault(
        name, _Activations(torch.zeros(len(by_channel)), torch.zeros(len(by_channel)))
    )
    found.size += by_channel.abs().sum(1).cpu()
    found.zeros += (by_channel == 0).sum(1).cpu()
    found.count += by_channel.shape[1]


def loss_changes(
    network: Network, channels: Channels, images: Tensor, labels: Tensor, tick: Tick
) -> dict[int, Tensor]:
    """E[(Σ w · ∂L/∂w)²] over the weights that read each channel, by space; L is the cross-entropy to the labels."""
    totals = {space: torch.zeros(channels.sizes[space]) for space in channels.free}
    network.eval()
    for start in range(0, len(images), _IMAGES_PER_GRADIENT):
        part = slice(start, start + _IMAGES_PER_GRADIENT)
        network.zero_grad()
        functional.cross_entropy(network(images[part]), labels[part]).backward()  # type: ignore[no-untyped-call]
        for space in totals:
            totals[space] += _gate_gradients(network, channels, space).square().cpu()
        tick(min(1.0, (start + _IMAGES_PER_GRADIENT) / len(images)))
    network.zero_grad()
    return totals


@torch.no_grad()
def _gate_gradients(network: Network, channels: Channels, space: int) -> Tensor:
    found = torch.zeros(channels.sizes[space])
    for axis in channels.axes_of(space, "reads"):
        weight = network.array(axis.array)
        if weight.grad is not None:
            found += channels.rows(axis, weight * weight.grad, space).sum(1).cpu()
    return found


@torch.no_grad()
def statistics_of(
    network: Network,
    channels: Channels,
    space: int,
    seen: Observed,
    changes: dict[int, Tensor] | None,
    generator: torch.Generator,
) -> ChannelStatistics:
    """What was found out about the channels of one space."""
    weights = [
        channels.rows(axis, network.array(axis.array), space).square().sum(1)
        for axis in channels.axes_of(space, "reads", "writes")
    ]
    scales = [
        channels.rows(axis, network.array(axis.array), space).abs().mean(1)
        for axis in channels.axes_of(space, "norm_scale")
    ]
    sizes, zeros = _activations_of(channels, space, seen)
    return ChannelStatistics(
        squares=torch.stack(weights).sum(0).cpu(),
        norm_scale=torch.stack(scales).mean(0).cpu() if scales else None,
        mean_size=sizes,
        zero_share=zeros,
        loss_change=None if changes is None else changes[space],
        generator=generator,
    )


def _activations_of(channels: Channels, space: int, seen: Observed) -> tuple[Tensor | None, Tensor | None]:
    """Mean size and share of zeros over the rectified values that the channels of a space stand in."""
    sizes, zeros = [], []
    for name, found in seen.activations.items():
        layout = channels.layouts.get(name, ())
        if stands_in({space}, layout):
            axis = Axis(name, 0, layout, "follows")
            sizes.append(channels.rows(axis, found.size / found.count, space).mean(1))
            zeros.append(channels.rows(axis, found.zeros / found.count, space).mean(1))
    if not sizes:
        return None, None
    return torch.stack(sizes).mean(0), torch.stack(zeros).mean(0)
