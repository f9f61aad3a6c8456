"""Take channels out of a network, and have those that stay make up for them.

A channel that goes is replaced, in every layer that reads it, by a combination of those that stay: x_D ≈ M x_S + c, least
squares over places of the calibration images, so W'_S = W_S + W_D M and c goes into the bias. The same combination at all
places of a kernel: exact for 1 × 1 and linear layers, and else up to the border's padding. As in He et al. 2017, "Channel
Pruning for Accelerating Very Deep Neural Networks", sec. 3.1, with the channels as the regressors. Batch norms after it
are estimated anew, on the same images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from workers.engine.onnx_network import Network
from workers.engine.prune.channel_layout import Axis, Channels, stands_in
from workers.engine.prune.channel_statistics import Moments, Observed

_DAMPING = 1e-3
_TINY = 1e-12
_IMAGES_AT_ONCE = 64


@torch.no_grad()
def cut(network: Network, channels: Channels, kept: Mapping[int, Tensor]) -> None:
    """Leave the channels `kept` of each space that is named, in place."""
    for axis in channels.axes:
        if stands_in(kept, axis.layout):
            index = channels.index(axis.layout, kept)
            network.set_array(axis.array, network.array(axis.array).index_select(axis.axis, index))
    depthwise = {layer.call.output for layer in channels.layers if layer.reads is None}
    network.calls = [
        replace(call, attributes=call.attributes | {"group": len(network.array(call.weight or ""))})
        if call.output in depthwise
        else call
        for call in network.calls
    ]


@torch.no_grad()
def repair(network: Network, channels: Channels, kept: Mapping[int, Tensor], seen: Observed) -> None:
    """Before the cut: add to the weights of what stays their share in what goes, and to biases the rest."""
    biases = {layer.call.weight: layer.call.bias for layer in channels.layers}
    for axis in channels.axes:
        moments = seen.moments.get(axis.array) if axis.role == "reads" else None
        if moments is not None and stands_in(kept, axis.layout):
            stay = channels.index(tuple(replace(segment, repeat=1) for segment in axis.layout), kept)
            _repair_reader(network, axis, moments, stay, biases[axis.array])


def _repair_reader(network: Network, axis: Axis, moments: Moments, stay: Tensor, bias: str | None) -> None:
    """Move W (in place) so that its outputs change least once the other channels are gone."""
    goes = torch.ones(len(moments.first), dtype=torch.bool)
    goes[stay] = False
    mixing, rest = _replacement(moments, stay, goes, with_mean=bias is not None)
    rows = network.array(axis.array).movedim(axis.axis, 0)
    # The numbers of each channel, in the same order for all.
    by_channel = rows.reshape(len(goes), -1)
    moved = by_channel.clone()
    moved[stay] += mixing.t() @ by_channel[goes]
    network.set_array(axis.array, moved.view(rows.shape).movedim(0, axis.axis))
    if bias is not None:
        # (channels, outputs), over the places of a kernel or of a flattened channel.
        summed = rows.reshape(len(goes), -1, rows.shape[1], rows[0, 0].numel()).sum((1, 3))
        network.set_array(bias, network.array(bias) + rest @ summed[goes])


def _replacement(moments: Moments, stay: Tensor, goes: Tensor, *, with_mean: bool) -> tuple[Tensor, Tensor]:
    """M (gone, kept) and c (gone,), float32, of x_D ≈ M x_S + c; c is for layers with a bias."""
    mean, second = moments.first / moments.count, moments.second / moments.count
    if with_mean:
        second = second - mean[:, None] * mean
    inner = second[stay][:, stay]
    inner.diagonal().add_(_DAMPING * inner.diagonal().mean().clamp_min(_TINY))
    mixing = torch.linalg.solve(inner, second[stay][:, goes]).t()
    return mixing.float(), (mean[goes] - mixing @ mean[stay]).float()


@torch.no_grad()
def estimate_norms(network: Network, images: Tensor) -> None:
    """Have batch norms take the mean of the statistics of the batches of these images, in place of their own."""
    calls = network.calls
    network.train()
    for number, start in enumerate(range(0, len(images), _IMAGES_AT_ONCE), start=1):
        network.calls = [
            replace(call, attributes=call.attributes | {"momentum": 1 - 1 / number})
            if call.operator == "BatchNormalization"
            else call
            for call in calls
        ]
        network(images[start : start + _IMAGES_AT_ONCE])
    network.calls = calls
    network.eval()
