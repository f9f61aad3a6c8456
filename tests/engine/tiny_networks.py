"""Tiny convolutional networks as ONNX: with residual additions, depthwise convolutions, gates and concatenations."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.nn import functional

from workers.engine.export.onnx import export_program

IMAGE = (3, 16, 16)
CLASSES = 5


class _Stage(nn.Module):
    """Convolution, rectifier, batch norm: in this order, exporters do not fold the norm."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(functional.relu(self.conv(x)))


class Plain(nn.Module):
    """Two convolutions, and rows of 8 × 8 places for the classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.first = _Stage(3, 16)
        self.second = _Stage(16, 24)
        self.hidden = nn.Linear(24 * 64, 32)
        self.classifier = nn.Linear(32, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = functional.max_pool2d(self.second(self.first(images)), 2)
        return self.classifier(functional.relu(self.hidden(x.flatten(1))))


class Residual(nn.Module):
    """An inverted residual with a gate (squeeze and excitation), and a concatenation after it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _Stage(3, 16, stride=2)
        self.wide = _Stage(16, 32, kernel=1)
        self.depthwise = _Stage(32, 32, groups=32)
        self.squeeze = nn.Conv2d(32, 8, 1)
        self.excite = nn.Conv2d(8, 32, 1)
        self.narrow = nn.Conv2d(32, 16, 1)
        self.branch = _Stage(16, 8)
        self.last = _Stage(24, 24)
        self.classifier = nn.Linear(24, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        stem = self.stem(images)
        x = self.depthwise(self.wide(stem))
        gate = self.excite(functional.silu(self.squeeze(x.mean((2, 3), keepdim=True))))
        x = stem + self.narrow(x * gate.sigmoid())
        x = torch.cat([x, self.branch(x)], 1)
        return self.classifier(self.last(x).mean((2, 3)))


class Grouped(nn.Module):
    """A grouped convolution, whose channels stay."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _Stage(3, 16)
        self.grouped = _Stage(16, 16, groups=4)
        self.last = _Stage(16, 24)
        self.classifier = nn.Linear(24, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.last(self.grouped(self.stem(images))).mean((2, 3)))


def write_tiny(network: type[nn.Module], path: Path, *, seed: int = 0) -> Path:
    """Write a random network, its batch norms with statistics and scales of their own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = network()
        with torch.no_grad():
            for layer in module.modules():
                if isinstance(layer, nn.BatchNorm2d):
                    for vector in (layer.weight, layer.bias, layer.running_mean):
                        vector.add_(0.3 * torch.randn_like(vector))
                    layer.running_var.uniform_(0.2, 0.6)
    graph = export_program(
        module.eval(),
        {"images": torch.zeros(2, *IMAGE)},
        output="logits",
        free={"images": {0: torch.export.Dim.DYNAMIC}},
        architecture=network.__name__,
    )
    ir.save(graph, path)
    return path
