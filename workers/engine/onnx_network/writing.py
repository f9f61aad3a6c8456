"""From a network back to a file: the same calls, with the tensors as they are now."""

from __future__ import annotations

from pathlib import Path

import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from workers.engine.onnx_network.network import Network

_IR_VERSION = 10


def write_network(network: Network, path: Path) -> None:
    """Write a graph that takes (batch, *image) and gives (batch, classes), the batch free."""
    signature = network.signature
    with torch.no_grad():
        classes = network(torch.zeros(1, *signature.image)).shape[1]
    graph = helper.make_graph(
        [
            helper.make_node(
                call.operator,
                [name or "" for name in call.inputs],
                [call.output],
                name=call.name,
                **call.attributes,
            )
            for call in network.calls
        ],
        "network",
        [helper.make_tensor_value_info(signature.source, TensorProto.FLOAT, ["batch", *signature.image])],
        [helper.make_tensor_value_info(signature.result, TensorProto.FLOAT, ["batch", classes])],
        [
            numpy_helper.from_array(network.array(name).detach().cpu().numpy(), name)
            for name in network.array_names
        ],
    )
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", signature.opset)],
        ir_version=_IR_VERSION,
        producer_name="modelpress",
    )
    onnx.checker.check_model(model)
    onnx.save(model, str(path))
