"""An image classifier as one float32 ONNX graph: `pixel_values` of a free batch and a fixed size in, `logits` out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from workers.engine.export.onnx import check_valid, export_program, first_outputs, invalid_graph
from workers.engine.export.onnx_graph import clean, name_dimensions, remove_unused

PIXELS = "pixel_values"
_WRAPPED = "model."


class _Forward(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Any:
        """Logits: (images, channels, height, width) -> (images, classes)."""
        return self.model(pixel_values=pixel_values, return_dict=True)[0]


def export_image_graph(model: Any, architecture: str, shape: Sequence[int]) -> ir.Model:
    """Export a float32 model in evaluation mode for images of `shape`, (channels, height, width).

    Raises JobFailed (`onnx_export_failed`) for a model that torch.onnx cannot express.
    """
    if not model.config.model_type.startswith(("resnet", "mobilenet")):
        model.set_attn_implementation("eager")
    graph = export_program(
        _Forward(model).eval(),
        {PIXELS: torch.zeros(2, *shape)},
        output="logits",
        free={PIXELS: {0: torch.export.Dim.DYNAMIC}},
        architecture=architecture,
    )
    clean(graph, prefix=_WRAPPED)
    _pad_in_convolutions(graph.graph)
    remove_unused(graph)
    name_dimensions(graph.graph)
    graph.producer_name = "modelpress"
    return graph


def check_image_graph(directory: Path, shape: Sequence[int], *, threads: int) -> None:
    """Check a written graph: valid by onnx's rules, loaded by onnxruntime, and free in its batch. Raises VerificationFailed."""
    check_valid(directory)
    feeds = [{PIXELS: np.zeros((batch, *shape), dtype=np.float32)} for batch in (1, 3)]
    for feed, output in zip(feeds, first_outputs(directory, feeds, threads), strict=True):
        if output.ndim != 2 or len(output) != len(feed[PIXELS]):
            raise invalid_graph(f"for {len(feed[PIXELS])} images it returns {output.shape}")
        if not np.isfinite(output).all():
            raise invalid_graph("its output is not finite")


def _pad_in_convolutions(graph: ir.Graph) -> None:
    """Let a convolution pad by itself what is padded with zeros before it, as MobileNet's are for TensorFlow's sake.

    onnxruntime does the same to graphs in float, and cannot once the padded values are rounded.
    """
    for node in list(graph):
        pad = node.inputs[0].producer() if node.op_type == "Conv" and node.inputs[0] is not None else None
        added = None if pad is None else _zero_padding(pad)
        if pad is None or added is None or len(pad.outputs[0].uses()) > 1:
            continue
        have = node.attributes.get_ints("pads", [0, 0, 0, 0])
        node.attributes["pads"] = ir.AttrInt64s("pads", [a + b for a, b in zip(have, added, strict=True)])
        node.replace_input_with(0, pad.inputs[0])


def _zero_padding(node: ir.Node) -> list[int] | None:
    """Rows and columns that a Pad adds before and after, in the order of a convolution's `pads`; None for any other."""
    if node.op_type != "Pad" or node.attributes.get_string("mode", "constant") != "constant":
        return None
    amounts, value = (_constant(node.inputs[index]) if len(node.inputs) > index else None for index in (1, 2))
    if (
        amounts is None
        or len(amounts) != 8
        or amounts[[0, 1, 4, 5]].any()
        or (value is not None and value.any())
    ):
        return None
    return [int(amounts[index]) for index in (2, 3, 6, 7)]


def _constant(value: ir.Value | None) -> Any:
    return None if value is None or value.const_value is None else value.const_value.numpy()
