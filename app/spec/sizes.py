"""Bytes on disk that a spec leaves, computed from shapes before anything is read.

Exact but for the order of names in a header, for everything that writes safetensors. ONNX is an estimate; of GGUF the
tensors are exact, the tokenizer inside is estimated.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from app.spec.architectures import ARCHITECTURES as KNOWN
from app.spec.architectures import Architecture, block_index, is_compressible, is_image_layer, is_router
from app.spec.attention_heads import without_heads
from app.spec.base import Step
from app.spec.compatibility import blocks_cut, matching_layers, module_name
from app.spec.distill import DistillLogits, StudentFromDepthCut, StudentFromModel
from app.spec.facts import BYTES_PER_ELEMENT, ModelFacts, TensorFact
from app.spec.feed_forward import widths_of, with_width
from app.spec.gguf import QuantizeGguf
from app.spec.gguf_layout import ARCHITECTURES, data_bytes, gguf_tensors, index_bytes
from app.spec.kv_cache import cache_scale_facts
from app.spec.optimize import OptimizeOnnx
from app.spec.prune import PruneDepth, PruneHeads, PruneWidth
from app.spec.prune_channels import PruneChannels
from app.spec.prune_experts import PruneExperts, experts_in, with_experts
from app.spec.prune_hidden import PruneHidden, facts_after, has_narrowable_states, with_hidden_width
from app.spec.quantize import QuantizeCalibrated, QuantizedWeights
from app.spec.quantize_dynamic import QuantizeDynamic, tensors_after
from app.spec.quantize_onnx import QuantizeOnnx
from app.spec.stored import stored_tensors

# Nodes, names and shapes of the graph: measured 0.3 to 1 MB for 6 to 30 blocks.
_ONNX_GRAPH_BYTES_PER_BLOCK = 35_000
_ONNX_GRAPH_BYTES_PER_LAYER = 2700
"""The same of an image classifier, whose blocks are of no size: measured 2.3 to 3 kB."""
# Of networks without blocks: a node, and the names of its values.
_ONNX_GRAPH_BYTES_PER_TENSOR = 200
_HEAD = "lm_head.weight"
_ONNX_HEAD_BLOCK = 32
# Keys, and of each entry of the vocabulary its text, its kind, and its merge or score: measured 30 to 45 bytes.
_GGUF_KEYS_BYTES, _GGUF_BYTES_PER_TOKEN = 4000, 36


@dataclass(frozen=True)
class Shape:
    """A model between two steps: its tensors as they lie on disk."""

    tensors: tuple[TensorFact, ...]
    dense_parameters: int
    """Weights it has once loaded, where packed ones are unpacked."""
    file_bytes: int | None = None
    """Of the one file it is in, where that is not safetensors."""

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
    def blocks(self) -> int:
        """How many blocks there are."""
        return len({block_index(t.name) for t in self.tensors} - {None})

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weight files."""
        return safetensors_bytes(self.tensors) if self.file_bytes is None else self.file_bytes


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
        case QuantizedWeights():
            return _quantized(step, shape)
        case PruneDepth() | PruneWidth() | PruneHeads() | PruneHidden() | PruneExperts() | PruneChannels():
            return _smaller(step, shape, facts)
        case DistillLogits(student=StudentFromDepthCut(drop_ratio=ratio)):
            return without_blocks(shape, blocks_cut(ratio, shape.blocks))
        case DistillLogits(student=StudentFromModel(model=model)) if model in students:
            return Shape.of(students[model].tensors)
        case OptimizeOnnx() | QuantizeOnnx() | QuantizeGguf() | QuantizeDynamic():
            return _exported(step, shape, facts)
        case _:
            return shape


def without_blocks(shape: Shape, count: int) -> Shape:
    """The model with `count` blocks fewer; all have the same tensors, so it does not matter which."""
    kept = shape.blocks - count
    tensors = tuple(t for t in shape.tensors if (block_index(t.name) or 0) < kept)
    return Shape.of(tensors)


def _smaller(
    step: PruneDepth | PruneWidth | PruneHeads | PruneHidden | PruneExperts | PruneChannels,
    shape: Shape,
    facts: ModelFacts,
) -> Shape:
    """The model with fewer blocks, narrower states, fewer channels everywhere or in every feed-forward part, or fewer heads."""
    if isinstance(step, PruneChannels):
        return _fewer_channels(step, shape)
    if isinstance(step, PruneExperts):
        after = step.experts_after(experts_in(shape.tensors), facts.experts_per_token or 1)
        return shape if after is None else Shape.of(with_experts(shape.tensors, after))
    if isinstance(step, PruneDepth):
        return without_blocks(shape, step.blocks_to_drop(shape.blocks))
    architecture = KNOWN[facts.architecture]
    if isinstance(step, PruneHidden):
        shape = _narrower_states(step, shape, facts)
    elif isinstance(step, PruneHeads):
        shape = Shape.of(without_heads(step, shape.tensors, facts))
    else:
        shape = _narrower_feed_forward(step, shape, architecture)
    return shape


def _narrower_feed_forward(step: PruneWidth, shape: Shape, architecture: Architecture) -> Shape:
    match [step.width_after(width) for width in widths_of(shape.tensors, architecture)]:
        case [int(width)]:
            return Shape.of(with_width(shape.tensors, architecture, width))
        case _:
            return shape


def _narrower_states(step: PruneHidden, shape: Shape, facts: ModelFacts) -> Shape:
    if not has_narrowable_states(KNOWN[facts.architecture]):
        return shape
    return Shape.of(with_hidden_width(shape.tensors, facts_after(step, shape.tensors, facts).hidden_size))


def _fewer_channels(step: PruneChannels, shape: Shape) -> Shape:
    """Which layers lose how many is known only when the job runs: as if all lost alike, in inputs and outputs."""
    counted, share = step.target
    left = int(shape.dense_parameters * (share**2 if counted == "channels" else share))
    return Shape(
        (TensorFact(name="network", dtype="F32", shape=(left,)),),
        left,
        4 * left + _ONNX_GRAPH_BYTES_PER_TENSOR * len(shape.tensors),
    )


def compressible(shape: Shape) -> tuple[TensorFact, ...]:
    """Weights of the linear layers inside blocks."""
    return tuple(t for t in shape.tensors if is_compressible(t.name, t.shape))


def _quantized(step: QuantizedWeights, shape: Shape) -> Shape:
    layers = compressible(shape)
    ignored = {t.name for t in matching_layers(step.ignore, layers)}
    chosen = {t.name: t for t in layers if t.name not in ignored and not is_router(t.name)}
    if step.include_head:
        chosen |= {t.name: t for t in shape.tensors if t.name == _HEAD}
    definite = step.with_group_size_for(t.shape[1] for t in chosen.values())
    tensors: list[TensorFact] = []
    for tensor in shape.tensors:
        if tensor.name in chosen:
            tensors += stored_tensors(tensor, definite.settings_of(module_name(tensor)))
        else:
            tensors.append(tensor)
    if isinstance(step, QuantizeCalibrated) and step.kv_cache != "none":
        tensors += cache_scale_facts(shape.tensors)
    return Shape(tuple(tensors), shape.dense_parameters)


def _dynamic(step: QuantizeDynamic, shape: Shape, facts: ModelFacts) -> Shape:
    stored = tensors_after(step, shape.tensors, KNOWN[facts.architecture])
    # As the writer puts them: it decides how many digits the offsets in the header have.
    tensors = tuple(sorted(stored, key=lambda t: -BYTES_PER_ELEMENT[t.dtype]))
    # A tied head is one weight more; scales are no weights, and too few to count.
    return Shape(tensors, max(shape.dense_parameters, sum(t.elements for t in tensors)))


def _exported(
    step: OptimizeOnnx | QuantizeOnnx | QuantizeGguf | QuantizeDynamic, shape: Shape, facts: ModelFacts
) -> Shape:
    """A model that leaves plain safetensors for another format."""
    if isinstance(step, QuantizeDynamic):
        return _dynamic(step, shape, facts)
    return _gguf(step, shape, facts) if isinstance(step, QuantizeGguf) else _onnx(step, shape, facts)


def _onnx(step: OptimizeOnnx | QuantizeOnnx, shape: Shape, facts: ModelFacts) -> Shape:
    """Initializers and an estimate of the graph around them."""
    if isinstance(step, QuantizeOnnx):
        total = _quantized_onnx_bytes(step, shape, facts)
    else:
        total = _optimized_onnx_bytes(step, shape, facts)
    graph = _ONNX_GRAPH_BYTES_PER_BLOCK * (shape.blocks + 1)
    if facts.family == "image_classifier":
        graph = _ONNX_GRAPH_BYTES_PER_LAYER * len(facts.compressible())
    return Shape(shape.tensors, shape.dense_parameters, int(total) + graph)


def _optimized_onnx_bytes(step: OptimizeOnnx, shape: Shape, facts: ModelFacts) -> float:
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
    return total / 8


def _quantized_onnx_bytes(step: QuantizeOnnx, shape: Shape, facts: ModelFacts) -> float:
    """Layers of the blocks in few bits, with float32 scales; the rest float32, but for tables in 8 bits.

    The token embedding has int8 rows, or stands in one table with a tied head in 8 bits; where a tied head stays in
    float32, so does the one table of both.
    """
    if facts.family == "image_classifier":
        return _image_onnx_bytes(step, shape)
    is_lm = facts.family == "causal_lm"
    layers = compressible(shape)
    ignored = {t.name for t in matching_layers(step.ignore, layers)}
    total = 0.0
    for tensor in shape.tensors:
        is_table = tensor.shape[:1] == (facts.vocab_size,) and tensor.name != _HEAD
        if tensor in layers and tensor.name not in ignored:
            total += _onnx_layer_bytes(step, tensor, facts)
        elif is_lm and step.quantize_head and (tensor.name == _HEAD or (is_table and facts.tied_embeddings)):
            total += tensor.elements * (8 + 32 / _ONNX_HEAD_BLOCK) / 8
        elif is_table and not (is_lm and facts.tied_embeddings):
            total += tensor.elements + 4 * tensor.shape[0]
        else:
            total += 4 * tensor.elements
    return total


def _image_onnx_bytes(step: QuantizeOnnx, shape: Shape) -> float:
    """Int8 layers, each row with a scale, a zero point and a bias; batch norms are folded into them."""
    layers = [t for t in shape.tensors if is_image_layer(t.name, t.shape)]
    ignored = {t.name for t in matching_layers(step.ignore, layers)}
    quantized = {t.name for t in layers} - ignored
    total = 0.0
    for tensor in shape.tensors:
        rows = tensor.shape[0] if tensor.shape else 1
        if tensor.name in quantized:
            total += tensor.elements + 9 * rows
        elif len(tensor.shape) > 1:
            total += 4 * tensor.elements
    return total


def _onnx_layer_bytes(step: QuantizeOnnx, tensor: TensorFact, facts: ModelFacts) -> float:
    """Codes, scales and zero points of one weight."""
    rows, columns = tensor.shape
    if step.method_for(facts.family) == "qdq":
        return rows * (columns + 5)
    blocks = -(-columns // step.block_size)
    zeros = 0 if step.symmetric else -(-blocks * step.bits // 8)
    return rows * (blocks * (step.block_size * step.bits // 8 + 4) + zeros)


def _gguf(step: QuantizeGguf, shape: Shape, facts: ModelFacts) -> Shape:
    """One file: header, tokenizer, and every tensor padded to the format's alignment."""
    tensors = gguf_tensors(shape.tensors, ARCHITECTURES[facts.architecture], step.mix)
    header = _GGUF_KEYS_BYTES + _GGUF_BYTES_PER_TOKEN * facts.vocab_size + index_bytes(tensors)
    return Shape(shape.tensors, shape.dense_parameters, header + data_bytes(tensors))
