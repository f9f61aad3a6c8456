"""A convolutional network that came as ONNX, as a torch module that can be cut and trained, and leaves as ONNX again.

A library of our own, since the one there is (onnx2torch, last release 2024) needs torchvision.
"""

from workers.engine.onnx_network.network import Call, Network
from workers.engine.onnx_network.reading import read_network
from workers.engine.onnx_network.writing import write_network

__all__ = ["Call", "Network", "read_network", "write_network"]
