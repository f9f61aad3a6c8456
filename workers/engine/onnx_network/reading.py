"""From a file to a network. What cannot be computed as the file means it is refused by name."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes import common
from torch import Tensor

from app.errors import UnsupportedForModel
from app.spec.onnx_operators import OLDEST_OPSET, ONNX_OPERATORS
from workers.engine.export.onnx_graph import clean
from workers.engine.onnx_network.network import Call, Network, Signature
from workers.engine.onnx_network.operators import OPERATORS

_SPATIAL = ("Conv", "MaxPool", "AveragePool", "GlobalAveragePool")
_TOLERANCE = 1e-3


def read_network(path: Path) -> Network:
    """Read a float32 graph of one image input of a fixed size and one output, free in its batch or not.

    Raises UnsupportedForModel (`onnx_unsupported`), which names what is in the way.
    """
    model = ir.load(path)
    _refuse_foreign(model, path)
    clean(model, prefix="")
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    calls = [_call(node) for node in model.graph]
    signature = _signature(model)
    calls, arrays = _unshared(calls, _arrays(model.graph))
    network = Network(calls, arrays, signature).eval()
    fixed = [size for value in model.graph.inputs if value.shape for size in value.shape[:1]]
    try:
        network = _with_flattening(network, batch=fixed[0] if fixed and isinstance(fixed[0], int) else 2)
        with torch.no_grad():
            network.eval()(torch.zeros(2, *signature.image))
    # Whatever a graph's shapes, counts of inputs and kinds of attributes can make torch say.
    except (RuntimeError, TypeError, ValueError, LookupError) as error:
        raise _refused(f"two images cannot be run through it: {error}") from error
    return network


def check_same(network: Network, path: Path, *, threads: int, seed: int = 0) -> None:
    """Compare with onnxruntime on noise. Raises UnsupportedForModel where the two do not agree."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    shape = session.get_inputs()[0].shape
    batch = shape[0] if isinstance(shape[0], int) else 2
    images = torch.rand(batch, *shape[1:], generator=torch.Generator().manual_seed(seed))
    expected = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0])
    with torch.no_grad():
        found = network(images)
    if found.shape != expected.shape or not torch.allclose(
        found, expected, rtol=_TOLERANCE, atol=_TOLERANCE * float(expected.abs().max())
    ):
        raise _refused("what is computed here and by onnxruntime differs")


def _refuse_foreign(model: ir.Model, path: Path) -> None:
    """Raise for operators that are not known, sets of operators that are too old, and weights outside of the model's files."""
    opset = model.opset_imports.get("", 0)
    if opset < OLDEST_OPSET:
        raise _refused(f"its operators are of set {opset}; {OLDEST_OPSET} is the oldest that is read")
    foreign = sorted(
        {
            _full_name(node)
            for node in model.graph
            if node.domain not in ("", "ai.onnx") or node.op_type not in ONNX_OPERATORS
        }
    )
    if foreign or model.functions:
        named = ", ".join(foreign or (str(name) for name in model.functions))
        raise _refused(f"it uses {named}. Known are {', '.join(sorted(ONNX_OPERATORS))}")
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and Path(tensor.location).name != str(tensor.location):
            raise _refused(f"the weights of {value.name} lie outside of {path.name}'s directory")


def _full_name(node: ir.Node) -> str:
    return node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"


def _call(node: ir.Node) -> Call:
    outputs = [value for value in node.outputs if value.uses() or value.is_graph_output()]
    if outputs[1:] or outputs[0] is not node.outputs[0]:
        raise _refused(f"{node.op_type} {node.name} is read for more than its first output")
    attributes = {name: _plain(attribute) for name, attribute in node.attributes.items()}
    for name, setting in attributes.items():
        if name not in _known_attributes(node.op_type):
            raise _refused(f"{node.op_type} {node.name} has {name} = {setting}, which is not known")
    if attributes.get("training_mode"):
        raise _refused(f"{node.name} is in training mode: export the network in evaluation mode")
    if node.op_type in {"AveragePool", "Conv"}:
        _check_kernel(node, attributes)
    names = tuple(value.name if value is not None else None for value in node.inputs)
    return Call(node.op_type, node.name or node.outputs[0].name or "", names, _name(outputs[0]), attributes)


def _check_kernel(node: ir.Node, attributes: dict[str, Any]) -> None:
    shape = node.inputs[1].shape if node.op_type == "Conv" and node.inputs[1] is not None else None
    size = len(attributes.get("kernel_shape", ())) or (len(shape) - 2 if shape is not None else 2)
    if size != 2:
        raise _refused(f"{node.op_type} {node.name} works in {size} dimensions; images have 2")


def _known_attributes(operator: str) -> set[str]:
    """Those that our function takes; torch's own functions take none of ONNX."""
    function = OPERATORS[operator]
    if function.__module__ != "workers.engine.onnx_network.operators":
        return set()
    parameters = inspect.signature(function).parameters.values()
    return {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}


def _plain(attribute: ir.Attr) -> Any:
    value = attribute.value
    return tuple(value) if isinstance(value, (list, tuple)) else value


def _arrays(graph: ir.Graph) -> dict[str, Tensor]:
    arrays = {}
    for name, value in graph.initializers.items():
        if value.const_value is None:
            raise _refused(f"{name} has no values")
        array = np.array(value.const_value.numpy())
        if array.dtype.kind == "f" and array.dtype != np.float32:
            raise _refused(f"{name} is {array.dtype}: upload the network in float32")
        arrays[name] = torch.from_numpy(array)
    return arrays


def _signature(model: ir.Model) -> Signature:
    graph = model.graph
    # Files of old list their weights among the inputs.
    inputs = [value for value in graph.inputs if value.name not in graph.initializers]
    if len(inputs) != 1 or len(graph.outputs) != 1:
        raise _refused(f"it has {len(inputs)} inputs and {len(graph.outputs)} outputs; one of each is known")
    shape = inputs[0].shape
    match [] if shape is None else list(shape):
        case [_, int(channels), int(height), int(width)]:
            image = (channels, height, width)
        case _:
            raise _refused(
                f"its input is {shape}, and not images of a fixed size (N, channels, height, width)"
            )
    return Signature(
        source=_name(inputs[0]),
        image=image,
        result=_name(graph.outputs[0]),
        opset=model.opset_imports[""],
    )


def _unshared(calls: list[Call], arrays: dict[str, Tensor]) -> tuple[list[Call], dict[str, Tensor]]:
    """A copy of its own for every call that reads a vector: exporters store equal ones once, and they need not stay equal."""
    seen: set[str] = set()
    apart = []
    for call in calls:
        inputs: list[str | None] = []
        for name in call.inputs:
            own = name
            if name is not None and name in seen and _is_vector(arrays.get(name)):
                own = f"{name}/{len(arrays)}"
                arrays[own] = arrays[name].clone()
            elif name is not None:
                seen.add(name)
            inputs.append(own)
        apart.append(replace(call, inputs=tuple(inputs)))
    return apart, arrays


def _is_vector(array: Tensor | None) -> bool:
    return array is not None and array.dim() == 1 and array.is_floating_point()


def _with_flattening(network: Network, *, batch: int) -> Network:
    """Whatever makes rows of images a Flatten, which no count of channels is written into, and nothing that is not read."""
    shapes: dict[str, tuple[int, ...]] = {}

    def note(call: Call, inputs: tuple[Tensor | None, ...], output: Tensor) -> None:
        shapes[call.output] = tuple(output.shape)
        if call.inputs and call.inputs[0] is not None and inputs[0] is not None:
            shapes.setdefault(call.inputs[0], tuple(inputs[0].shape))

    with torch.no_grad():
        network(torch.zeros(batch, *network.signature.image), note)
    calls = [_flattened(call, shapes) for call in network.calls]
    needed = set(_needed(calls, network.signature.result))
    calls = [call for call in calls if call.output in needed]
    arrays = {name: network.array(name).detach() for name in network.array_names if name in needed}
    return Network(calls, arrays, network.signature)


def _flattened(call: Call, shapes: dict[str, tuple[int, ...]]) -> Call:
    before, after = shapes.get(call.inputs[0] or "", ()), shapes[call.output]
    is_flat = call.operator in ("Reshape", "Squeeze") and len(before) == 4 and len(after) == 2
    if is_flat and before[0] == after[0]:
        return replace(call, operator="Flatten", inputs=call.inputs[:1], attributes={"axis": 1})
    return call


def _needed(calls: list[Call], result: str) -> Iterator[str]:
    wanted = {result}
    for call in reversed(calls):
        if call.output in wanted:
            wanted.update(name for name in call.inputs if name)
    yield from wanted


def _name(value: ir.Value) -> str:
    if value.name is None:
        raise _refused("a value has no name")
    return value.name


def _refused(what: str) -> UnsupportedForModel:
    return UnsupportedForModel(
        f"This ONNX graph cannot be made a network that is pruned and trained: {what}.",
        code="onnx_unsupported",
        hint="Export the network in float32 and evaluation mode, with plain operators of opset 13 or newer.",
    )
