"""What the layout of an architecture's weights rules out, and which way its matrices lie.

Each limit is one of the runtimes that read the result, tried out: transformers 5.23 with compressed-tensors 0.20, and
vLLM's loaders.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase

from app.spec.architectures import Architecture, is_expert
from app.spec.attention_heads import has_removable_heads
from app.spec.base import Family, Step
from app.spec.distill import DistillLogits, StudentFromDepthCut
from app.spec.facts import TensorFact
from app.spec.feed_forward import can_fill_gaps, feed_forward_of
from app.spec.kv_cache import can_scale_cache
from app.spec.onnx_operators import ONNX_NETWORK
from app.spec.optimize import OptimizeOnnx
from app.spec.prune import PruneDepth, PruneHeads, PruneWidth
from app.spec.prune_channels import PruneChannels
from app.spec.prune_experts import PruneExperts
from app.spec.prune_hidden import PruneHidden, has_narrowable_states
from app.spec.prune_training import PruneTraining
from app.spec.quantize import QuantizeCalibrated, QuantizedWeights, QuantizeWeights
from app.spec.quantize_dynamic import QuantizeDynamic
from app.spec.quantize_onnx import QuantizeOnnx

_TRANSPOSED = (
    "{name} keeps its weights as (in, out), and packed integers are read with scales along the last dimension: columns"
    " cannot share scales here. Use quantize.weights, whose scales run along the outputs then."
)
_NF4_TRANSPOSED = "{name} keeps its weights as (in, out), where bitsandbytes cuts its blocks along the inputs: use quantize.weights with int."
_ASYMMETRIC_EXPERTS = "Neither transformers nor vLLM reads zero points of experts: leave symmetric true for {name}, e.g. with group_size 32."
_SOME_EXPERTS = (
    "{pattern!r} leaves experts out, and transformers loads experts only if all of a model are quantized. Name other "
    "layers, e.g. *.self_attn.*"
)
_OTHER_EXPERTS = (
    "{pattern!r} has settings of its own for experts, and transformers reads all experts of a model alike. Name other "
    "layers, e.g. *.self_attn.*"
)
_TRAINED_EXPERTS = (
    "{pattern!r} leaves experts out, and those of a block are trained in one tensor, all or none pruned. Name other layers, "
    "e.g. *.self_attn.*"
)
_ONNX_EXPERTS = "In an ONNX graph every token would run through every expert of {name}: use quantize.weights or quantize.calibrated."
_ALIKE = "{name} is unpacked while it is loaded, which transformers does in one way for all layers and without rounding inputs."
_EXPERT_FORMATS = "Experts of {name} are read as int, or as fp8 with group_size null."
_DYNAMIC_TRANSPOSED = "The layers of {name} are Conv1D, and PyTorch's dynamic int8 works on nn.Linear alone: use quantize.weights with bits 8."
_DYNAMIC_EXPERTS = (
    "transformers holds the experts of {name} as one tensor, and PyTorch's dynamic int8 works on nn.Linear alone: use "
    "quantize.weights with bits 8."
)
_ONNX_TRANSPOSED = "{name} keeps its weights as (in, out), which quantize.onnx does not read: use optimize.onnx or quantize.weights."
_PACKED_CONVOLUTIONS = "{name} is made of convolutions, and compressed-tensors packs linear layers alone: use quantize.onnx with method qdq."
_ONNX_IMAGES = "{name} is written with int8 weights and activations: use method qdq, or auto with bits 8 and symmetric true."
_WITHOUT_EXPERTS = (
    (OptimizeOnnx, _ONNX_EXPERTS),
    (QuantizeOnnx, _ONNX_EXPERTS),
    (QuantizeDynamic, _DYNAMIC_EXPERTS),
)
_WITHOUT_TRANSPOSED = ((QuantizeDynamic, _DYNAMIC_TRANSPOSED), (QuantizeOnnx, _ONNX_TRANSPOSED))
_EXPERT_INPUTS = "transformers does not round the inputs of experts, so {name} could not be measured: set activations to none."
_WITHOUT_WIDTH = (
    "{name} has experts, each with channels of its own that only some tokens reach: use prune.experts or prune.depth to make it "
    "smaller, or prune.calibrated."
)
_WITHOUT_MIXTURE = "{name} has no experts: use prune.width, prune.heads or prune.depth."
_WITHOUT_HEADS = (
    "The configuration of {name} cannot say that heads are missing; it can for Llama, Mistral, Mixtral, Qwen, Gemma, Phi3, "
    "SmolLM3, Granite and StarCoder2. Use prune.width or prune.depth."
)
_WITHOUT_HIDDEN = (
    "The states of {name} cannot be turned, since it has norms that subtract a mean or stand after a layer, or its configuration "
    "cannot say what is left; those of Llama, Mistral, Mixtral, Qwen, Gemma 1, Phi3, SmolLM3 and Granite can. Use prune.width, "
    "prune.heads or prune.depth."
)
_WITHOUT_GAP_REPAIR = (
    "No layer of {name} adds to what leaves a block, unweighed by a norm or a router, so none can make up for the blocks after "
    "it: leave repair out, and let distill.logits train what is left."
)
_GRAPHS_ALONE = (
    "Channels are removed from networks that came as ONNX: export this {name} in float32, with a free batch, and upload "
    "model.onnx with its preprocessor_config.json."
)
_NOT_GRAPHS = (
    "This model came as an ONNX graph, for which there is prune.channels; upload it in transformers' layout for other "
    "techniques."
)
_CACHE = (
    "Scales of the key-value cache are written for Llama, Mistral, Qwen2, Qwen3, Gemma and Phi3, whose caches transformers "
    "was seen to round by them, and not for {name}: set kv_cache to none."
)


def inputs_of(shape: tuple[int, ...], architecture: Architecture) -> int:
    """Input features of a linear layer's weight as it is stored."""
    return shape[0] if architecture.inputs_first else shape[1]


def limits_of_layout(
    step: Step, architecture: Architecture, layers: Iterable[TensorFact]
) -> Iterator[tuple[str, str]]:
    """What of a step cannot be done to such weights: pointers into the step, and why with what would work."""
    name = architecture.name
    if architecture is ONNX_NETWORK:
        if not isinstance(step, PruneChannels):
            yield "/technique", _NOT_GRAPHS
        return
    if isinstance(step, QuantizedWeights):
        yield from _limits_of_weights(step, architecture, layers)
    if isinstance(step, QuantizeCalibrated) and step.kv_cache != "none" and not can_scale_cache(architecture):
        yield "/kv_cache", _CACHE.format(name=name)
    yield from _limits_of_pruning(step, architecture, layers)
    if isinstance(step, QuantizeOnnx) and architecture.takes_images:
        yield from _limits_of_images(step, name)
    if architecture.expert_layers is not None:
        whys = (why for kind, why in _WITHOUT_EXPERTS if isinstance(step, kind))
        yield from (("/technique", why.format(name=name)) for why in whys)
    if architecture.inputs_first:
        whys = (why for kind, why in _WITHOUT_TRANSPOSED if isinstance(step, kind))
        yield from (("/technique", why.format(name=name)) for why in whys)


def _limits_of_pruning(
    step: Step, architecture: Architecture, layers: Iterable[TensorFact]
) -> Iterator[tuple[str, str]]:
    """Where there is nothing that a step removes, or it is not known how it would be left out."""
    name = architecture.name
    if isinstance(step, PruneWidth) and feed_forward_of(architecture) is None:
        yield "/technique", _WITHOUT_WIDTH.format(name=name)
    if isinstance(step, PruneHeads) and not has_removable_heads(architecture):
        yield "/technique", _WITHOUT_HEADS.format(name=name)
    if isinstance(step, PruneHidden) and not has_narrowable_states(architecture):
        yield "/technique", _WITHOUT_HIDDEN.format(name=name)
    if isinstance(step, PruneExperts) and architecture.expert_layers is None:
        yield "/technique", _WITHOUT_MIXTURE.format(name=name)
    if isinstance(step, PruneTraining):
        experts = [t.name.removesuffix(".weight") for t in layers if is_expert(t.name)]
        yield from _matching(_ignored(step), experts, _TRAINED_EXPERTS)
    if not can_fill_gaps(architecture):
        yield from ((pointer, _WITHOUT_GAP_REPAIR.format(name=name)) for pointer in _repairs_asked_for(step))
    if isinstance(step, PruneChannels):
        yield "/technique", _GRAPHS_ALONE.format(name=name)


def _repairs_asked_for(step: Step) -> Iterator[str]:
    if isinstance(step, PruneDepth) and step.repair:
        yield "/repair"
    if (
        isinstance(step, DistillLogits)
        and isinstance(step.student, StudentFromDepthCut)
        and step.student.repair
    ):
        yield "/student/repair"


def _limits_of_images(step: QuantizeOnnx, name: str) -> Iterator[tuple[str, str]]:
    if step.method_for(Family.IMAGE_CLASSIFIER) != "qdq":
        yield "/method", _ONNX_IMAGES.format(name=name)
    if step.smoothing:
        yield "/smoothing", "Moved between the channels of language models and encoders alone; leave it out."


def _limits_of_weights(
    step: QuantizedWeights, architecture: Architecture, layers: Iterable[TensorFact]
) -> Iterator[tuple[str, str]]:
    name = architecture.name
    if architecture.is_convolutional:
        yield "/technique", _PACKED_CONVOLUTIONS.format(name=name)
    if architecture.inputs_first and not isinstance(step, QuantizeWeights):
        yield "/technique", _TRANSPOSED.format(name=name)
    elif architecture.inputs_first and step.number_format == "nf4":
        yield "/number_format", _NF4_TRANSPOSED.format(name=name)
    if architecture.unpack_to_load and step.overrides:
        yield "/overrides", _ALIKE.format(name=name)
    if architecture.unpack_to_load and step.activations != "none":
        yield "/activations", _ALIKE.format(name=name)
    if architecture.expert_layers is not None:
        yield from _limits_of_experts(step, name, layers)


def _limits_of_experts(
    step: QuantizedWeights, name: str, layers: Iterable[TensorFact]
) -> Iterator[tuple[str, str]]:
    if not step.symmetric:
        yield "/symmetric", _ASYMMETRIC_EXPERTS.format(name=name)
    if step.number_format not in ("int", "fp8") or step.group_size in ("tensor", "block"):
        yield "/number_format", _EXPERT_FORMATS.format(name=name)
    if step.activations != "none":
        yield "/activations", _EXPERT_INPUTS.format(name=name)
    experts = [t.name.removesuffix(".weight") for t in layers if is_expert(t.name)]
    other = [(f"/overrides/{n}", override.layers) for n, override in enumerate(step.overrides)]
    yield from _matching(_ignored(step), experts, _SOME_EXPERTS)
    yield from _matching(other, experts, _OTHER_EXPERTS)


def _ignored(step: QuantizedWeights | PruneTraining) -> list[tuple[str, str]]:
    return [(f"/ignore/{n}", pattern) for n, pattern in enumerate(step.ignore)]


def _matching(patterns: list[tuple[str, str]], modules: list[str], why: str) -> Iterator[tuple[str, str]]:
    for pointer, pattern in patterns:
        if any(fnmatchcase(module, pattern) for module in modules):
            yield pointer, why.format(pattern=pattern)
