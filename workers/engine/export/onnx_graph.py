"""Clean the graph that torch.onnx leaves, and find a model's linear layers and embedding in it.

torch.onnx's own optimizer tries every rewrite rule at every node and takes longer than the export itself (SmolLM2-135M:
60 s against 26 s). onnxruntime rewrites the graph once more anyway, so here is only what onnxruntime leaves alone and
what makes the file small: constants of shapes folded, equal subexpressions merged, each weight stored once and in
PyTorch's layout, under PyTorch's name. Weights stay (out, in), transposed by a node that every runtime folds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

# Shapes and axes have a few elements; nothing that is a weight may be folded.
_FOLDED_ELEMENTS = 64


@dataclass(frozen=True)
class LinearNode:
    """A linear layer in a graph: `output = input @ weight.T (+ bias)`, weight (out, in)."""

    weight: str
    """Name of the initializer, which is that of the parameter in PyTorch."""
    node: ir.Node
    bias: ir.Value | None = None

    @property
    def input(self) -> ir.Value:
        """What is multiplied by the weight."""
        return _input(self.node, 0)


def clean(model: ir.Model, *, prefix: str) -> None:
    """Fold, merge and remove what is not needed; drop `prefix` from the names of parameters."""
    from onnx_ir.passes import common
    from onnxscript.optimizer import fold_constants

    fold_constants(
        model,
        input_size_limit=_FOLDED_ELEMENTS,
        output_size_limit=_FOLDED_ELEMENTS,
        should_fold=lambda node: False if node.op_type == "Transpose" else None,
    )
    for step in (
        common.RemoveUnusedNodesPass(),
        common.CommonSubexpressionEliminationPass(),
        common.IdentityEliminationPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=False, size_limit=0),
        common.RemoveUnusedNodesPass(),
        # Names of source files and modules on every node are a fifth of a small file.
        common.ClearMetadataAndDocStringPass(),
    ):
        step(model)
    for name in [name for name in model.graph.initializers if name.startswith(prefix)]:
        model.graph.initializers[name].name = name.removeprefix(prefix)


def linear_nodes(graph: ir.Graph) -> dict[str, LinearNode]:
    """Every product with a two-dimensional weight, by the weight's name."""
    found: dict[str, LinearNode] = {}
    for node in graph:
        if node.op_type == "MatMul" and (weight := _transposed_weight(node.inputs[1])) is not None:
            found[weight] = LinearNode(weight, node)
        elif (
            node.op_type == "Gemm" and _is_weight(node.inputs[1]) and node.attributes.get_int("transB", False)
        ):
            bias = node.inputs[2] if len(node.inputs) > 2 else None
            found[_name(_input(node, 1))] = LinearNode(_name(_input(node, 1)), node, bias)
    return found


def token_embedding(graph: ir.Graph) -> ir.Node | None:
    """The Gather that looks up the embeddings of `input_ids`."""
    for node in graph:
        if (
            node.op_type == "Gather"
            and _is_weight(node.inputs[0])
            and _unshaped(node.inputs[1]) is graph.inputs[0]
        ):
            return node
    return None


def _unshaped(value: ir.Value | None) -> ir.Value | None:
    """What a value was before it was only given another shape, as GPT-2 does with its token ids."""
    while value is not None and (node := value.producer()) is not None and node.op_type == "Reshape":
        value = node.inputs[0]
    return value


def multiply_in_place(graph: ir.Graph, embedding: ir.Node) -> None:
    """Let a head tied to the embedding read the one table as it lies: Gemm(transB) instead of MatMul(Transpose).

    onnxruntime folds the Transpose when it writes an optimized graph, which would store the table a second time.
    """
    table = _input(embedding, 0)
    head = linear_nodes(graph).get(_name(table))
    if head is None or head.node.op_type != "MatMul" or table.shape is None:
        return
    rows, columns = (int(size) for size in table.shape.numpy())
    x, out = head.input, head.node.outputs[0]
    flat_shape = add_constant(graph, "head_rows_shape", _int64([-1, columns]))
    flat = ir.node("Reshape", [x, flat_shape], name="head_rows")
    product = ir.node("Gemm", [flat.outputs[0], table], {"transB": 1}, name="head")
    lead = ir.node("Shape", [x], {"start": 0, "end": -1}, name="head_leading_shape")
    width = add_constant(graph, "head_width", _int64([rows]))
    shape = ir.node("Concat", [lead.outputs[0], width], {"axis": 0}, name="head_output_shape")
    result = ir.node("Reshape", [product.outputs[0], shape.outputs[0]], name="head_output")
    replace_node(graph, head.node, [flat, product, lead, shape, result], out)


def name_dimensions(graph: ir.Graph) -> None:
    """Call the free dimensions of inputs and outputs `batch` and `sequence`, as other exporters do."""
    for value in (*graph.inputs, *graph.outputs):
        if value.shape is None:
            continue
        names = iter(("batch", "sequence"))
        sizes = [size if isinstance(size, int) else next(names) for size in value.shape]
        value.shape = ir.Shape(sizes)


def replace_node(graph: ir.Graph, old: ir.Node, new: list[ir.Node], out: ir.Value) -> None:
    """Put nodes in the place of one, the last one's output in the place of `out`, its name and type kept."""
    result = new[-1].outputs[0]
    result.name, result.shape, result.type = out.name, out.shape, out.type
    out.name = None if out.is_graph_output() else f"{out.name}_replaced"
    graph.insert_before(old, new)
    out.replace_all_uses_with(result, replace_graph_outputs=True)
    graph.remove(old, safe=True)


def replace_linear(graph: ir.Graph, linear: LinearNode, nodes: list[ir.Node]) -> None:
    """Put nodes in the place of a linear layer's product; its bias, if the product had one, is added after them."""
    if linear.bias is not None:
        nodes.append(ir.node("Add", [nodes[-1].outputs[0], linear.bias], name=f"{linear.weight}/biased"))
    replace_node(graph, linear.node, nodes, linear.node.outputs[0])


def remove_unused(model: ir.Model) -> None:
    """Drop nodes and weights that nothing reads any more."""
    from onnx_ir.passes import common

    common.RemoveUnusedNodesPass()(model)


def add_constant(graph: ir.Graph, name: str, array: Any) -> ir.Value:
    """Add an initializer, or find the one of this name."""
    if name in graph.initializers:
        return graph.initializers[name]
    tensor = ir.tensor(array, name=name)
    value = ir.Value(
        name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.register_initializer(value)
    return value


def _int64(numbers: list[int]) -> Any:
    import numpy as np

    return np.asarray(numbers, dtype=np.int64)


def _transposed_weight(value: ir.Value | None) -> str | None:
    producer = value.producer() if value is not None else None
    if producer is None or producer.op_type != "Transpose" or not _is_weight(producer.inputs[0]):
        return None
    return _name(_input(producer, 0))


def _is_weight(value: ir.Value | None) -> bool:
    return (
        value is not None and value.is_initializer() and value.shape is not None and value.shape.rank() == 2
    )


def _input(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    if value is None:
        raise ValueError(f"{node.op_type} {node.name} has no input {index}")
    return value


def _name(value: ir.Value) -> str:
    if value.name is None:
        raise ValueError("an initializer without a name")
    return value.name
