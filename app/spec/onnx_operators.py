"""The ONNX operators that a network may be made of to be pruned and trained: what the engine's interpreter knows."""

from __future__ import annotations

from app.spec.architectures import ARCHITECTURES, Architecture
from app.spec.base import Family

ONNX_NETWORK = Architecture("ONNX", "onnx", Family.IMAGE_CLASSIFIER, is_convolutional=True)
"""Of an image classifier that came as a graph: what it is made of stands in the file, not in its name."""

ONNX_OPERATORS = frozenset({
    "Add", "AveragePool", "BatchNormalization", "Clip", "Concat", "Constant", "Conv", "Div", "Dropout", "Flatten", "Gather",
    "Gemm", "GlobalAveragePool", "HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "MatMul", "MaxPool", "Mul", "Pad",
    "ReduceMean", "Relu", "Reshape", "Shape", "Sigmoid", "Softmax", "Squeeze", "Sub", "Tanh", "Unsqueeze",
})  # fmt: skip
OLDEST_OPSET = 9


def architecture_named(name: str) -> Architecture:
    """The architecture that facts name. Raises KeyError for one that Modelpress does not know."""
    return ONNX_NETWORK if name == ONNX_NETWORK.name else ARCHITECTURES[name]
