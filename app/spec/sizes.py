"""Bytes on disk that a spec leaves, computed from shapes before anything is read.

Exact but for the order of names in a header, for everything that writes safetensors. ONNX is an estimate.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from app.spec.architectures import block_index, is_compressible, is_router
from app.spec.base import Step
from app.spec.compatibility import blocks_cut, matching_layers, module_name
from app.spec.distill import DistillLogits, StudentFromDepthCut, StudentFromModel
from app.spec.facts import ModelFacts, TensorFact
from app.spec.optimize import OptimizeOnnx
from app.spec.prune import PruneDepth
from app.spec.quantize import IntegerWeights

_PACKED_WORD_BITS = 32
# Nodes, names and shapes of the graph: measured 0.3 to 1 MB for 6 to 30 blocks.
_ONNX_GRAPH_BYTES_PER_BLOCK = 35_000
_HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Shape:
    """A model between two steps: its tensors as they lie on disk."""

    tensors: tuple[TensorFact, ...]
    dense_parameters: int
    """Weights it has once loaded, where packed ones are unpacked."""
    onnx_bytes: int | None = None

    @classmethod
    def of(cls, tensors: tuple[TensorFact, ...]) -> Shape:
        """A model none of whose weights is packed."""
        return cls(tensors, sum(t.elements for t in tensors))

    @property
    def largest_block(self) -> int:
        """Weights of the largest block."""
        totals = Counter[int | None]()
        for tensor in self.tensors:
            totals[block_index(tensor.name)] += tensor.elements
        return max((count for index, count in totals.items() if index is not None), default=0)

    @property
    def largest_block_widths(self) -> list[int]:
        """Inputs of each linear layer of the widest block."""
        widths: dict[int | None, list[int]] = {}
        for tensor in compressible(self):
            widths.setdefault(block_index(tensor.name), []).append(tensor.shape[1])
        return max(widths.values(), key=lambda found: sum(n * n for n in found), default=[])

    @property
    def blocks(self) -> int:
        """How many blocks there are."""
        return len({block_index(t.name) for t in self.tensors} - {None})

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weight files."""
        return safetensors_bytes(self.tensors) if self.onnx_bytes is None else self.onnx_bytes


def safetensors_bytes(tensors: Iterable[TensorFact]) -> int:
    """Bytes of one safetensors file that holds these tensors: length, header padded to 8, and the elements."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in tensors:
        end = position + tensor.nbytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": (position, end)}
        position = end
    return 8 + -(-len(json.dumps(header, separators=(",", ":"))) // 8) * 8 + position


def after_step(step: Step, shape: Shape, facts: ModelFacts, students: dict[str, ModelFacts]) -> Shape:
    """The model that a step leaves; `facts` are those of the original."""
    match step:
        case IntegerWeights():
            return _quantized(step, shape)
        case PruneDepth():
            return without_blocks(shape, step.blocks_to_drop(shape.blocks))
        case DistillLogits(student=StudentFromDepthCut(drop_ratio=ratio)):
            return without_blocks(shape, blocks_cut(ratio, shape.blocks))
        case DistillLogits(student=StudentFromModel(model=model)) if model in students:
            return Shape.of(students[model].tensors)
        case OptimizeOnnx():
            return _onnx(step, shape, facts)
        case _:
            return shape


def without_blocks(shape: Shape, count: int) -> Shape:
    """The model with `count` blocks fewer; all have the same tensors, so it does not matter which."""
    kept = shape.blocks - count
    tensors = tuple(t for t in shape.tensors if (block_index(t.name) or 0) < kept)
    return Shape.of(tensors)


def compressible(shape: Shape) -> tuple[TensorFact, ...]:
    """Weights of the linear layers inside blocks."""
    return tuple(t for t in shape.tensors if is_compressible(t.name, t.shape))


def packed_layer(tensor: TensorFact, step: IntegerWeights) -> tuple[TensorFact, ...]:
    """The tensors of compressed-tensors' `pack-quantized` that stand for one weight of (rows, columns)."""
    rows, columns = tensor.shape
    groups = columns // step.group_size if step.group_size else 1
    module = module_name(tensor)
    packed = (
        TensorFact(name=f"{module}.weight_packed", dtype="I32", shape=(rows, _words(columns, step.bits))),
        TensorFact(name=f"{module}.weight_scale", dtype=tensor.dtype, shape=(rows, groups)),
        TensorFact(name=f"{module}.weight_shape", dtype="I64", shape=(2,)),
    )
    if step.symmetric:
        return packed
    zero_points = (_words(rows, step.bits), groups)
    return (*packed, TensorFact(name=f"{module}.weight_zero_point", dtype="I32", shape=zero_points))


def _words(codes: int, bits: int) -> int:
    return -(-codes * bits // _PACKED_WORD_BITS)


def _quantized(step: IntegerWeights, shape: Shape) -> Shape:
    layers = compressible(shape)
    chosen = {t.name for t in layers if not is_router(t.name)}
    chosen -= {t.name for t in matching_layers(step.ignore, layers)}
    tensors: list[TensorFact] = []
    for tensor in shape.tensors:
        tensors += packed_layer(tensor, step) if tensor.name in chosen else (tensor,)
    return Shape(tuple(tensors), shape.dense_parameters)


def _onnx(step: OptimizeOnnx, shape: Shape, facts: ModelFacts) -> Shape:
    """Float32 throughout, a head tied to the embedding stored once; in int8, if that is kept, as measured to win.

    Encoders have a scale per output row, language models one per 64 inputs. The token embedding has int8 rows unless
    a tied head in float32 reads it.
    """
    is_lm = facts.family == "causal_lm"
    is_int8 = step.quantization == "int8_dynamic"
    bits = 32.0 if not is_int8 else 8.5 if is_lm else 8.0
    bits_of = {t.name: bits for t in compressible(shape)}
    if is_int8 and (not facts.tied_embeddings or not is_lm or step.quantize_head):
        tables = (t for t in shape.tensors if t.shape[:1] == (facts.vocab_size,) and t.name != _HEAD)
        bits_of |= {t.name: 8 + 32 / t.shape[-1] for t in tables}
    total = sum(t.elements * bits_of.get(t.name, 32.0) for t in shape.tensors if t.name != _HEAD)
    if is_lm and (not facts.tied_embeddings or step.quantize_head):
        total += facts.vocab_size * facts.hidden_size * (bits if step.quantize_head else 32.0)
    graph = _ONNX_GRAPH_BYTES_PER_BLOCK * (shape.blocks + 1)
    return Shape(shape.tensors, shape.dense_parameters, int(total) // 8 + graph)
