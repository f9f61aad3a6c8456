"""What each step takes, predicted from shapes: memory beyond the interpreter's, and time.

One function per technique and quantity. Memory was measured on SmolLM2-135M and MiniLM with torch 2.13 on a two-core x86
machine and is meant to be an upper bound; time is meant to be right to a factor of three.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import singledispatch

from app.spec.architectures import ARCHITECTURES, is_expert
from app.spec.attention_heads import reads_heads
from app.spec.base import Step
from app.spec.calibration_memory import (
    ACTIVATIONS,
    RUNTIME_BYTES,
    calibrated_bytes,
    gradient_bytes,
    wide_code_bytes,
    windows_at_once,
)
from app.spec.distill import DistillLogits, StudentFromDepthCut
from app.spec.facts import ModelFacts
from app.spec.feed_forward import is_reader, widths_of
from app.spec.gguf import QuantizeGguf
from app.spec.image_costs import calibration_activations, image_activations, image_bytes, image_flops
from app.spec.optimize import OptimizeOnnx
from app.spec.prune import SENSITIVITY_SPARSITIES, PruneCalibrated, PruneDepth, PruneHeads, PruneWidth
from app.spec.prune_channels import PruneChannels
from app.spec.prune_experts import PruneExperts
from app.spec.prune_hidden import PruneHidden, hidden_axis
from app.spec.prune_training import LearnedGates, PruneTraining
from app.spec.quantize import QuantizeCalibrated, QuantizeWeights
from app.spec.quantize_onnx import QuantizeOnnx
from app.spec.sizes import Shape, compressible
from app.spec.text_training import TextTraining

_MIB = 2**20

INTERPRETER_BYTES = 350 * _MIB
"""A Python process with torch and transformers imported."""
SLAB_BYTES = 128 * _MIB
"""Rows in flight while a checkpoint is streamed: read buffer, float32 copies of a chunk per thread, result."""
LOADING_FACTOR = 1.15
"""A model in memory over its float32 weights: buffers, and the largest tensor twice while it is read."""
TRAINING_BYTES_PER_PARAMETER = 16
"""Float32 weight, gradient, and Adam's two moments."""
TRAINING_LOGITS_COPIES = 5
"""Teacher, student, both log-softmaxes, and the gradient."""
SCHEDULED_GATE_BYTES = 20
"""Of a weight that is gated on a schedule: mask, score, the product that is kept for the way back, and its rank at a cut."""
LEARNED_GATE_BYTES = 40
"""Log-odds of a gate, their gradient and moments; of one that is drawn, six floats kept for the way back."""
ACTIVATION_FLOATS_PER_HIDDEN = 34
"""Floats kept for the backward pass per token, block and hidden unit (Korthikanti et al. 2022, sec. 4)."""
ATTENTION_MAP_COPIES = 8
"""Scores, probabilities, their logarithms and what the loss keeps, of a block of student and teacher."""
SMALLEST_HEAD = 32
"""Width of a head of attention, where nothing is known of it."""
ONNX_COPIES = 7
"""Float32 copies of the model while it is optimized: module, graph, variants, and onnxruntime's own of each in a contest."""
ONNX_QUANTIZED_COPIES = 3
"""Float32 copies of the model while it is exported, rewritten and checked; its graph shares the module's memory."""
TRAINED_LAYERS = 8
"""So many times the widest layer is what is kept of an image for the way back (CIFAR VGG and MobileNetV2: 4)."""
WINDOW_TOKENS = 512
"""Tokens of a window of calibration text where a step does not choose."""

FLOPS_PER_SECOND = 4e10
"""Float32 matrix products on two cores."""
STREAMED_BYTES_PER_SECOND = 150e6
"""Reading and writing a checkpoint through the page cache, syncs included."""
QUANTIZED_WEIGHTS_PER_SECOND = {"mse": 12e6, "absmax": 60e6}
GPTQ_SECONDS_PER_WEIGHT = 1e-7
"""Fitting scales, factoring the inputs' statistics and compensating, on SmolLM2-135M."""
PRUNING_SECONDS_PER_WEIGHT = 1e-7
"""Choosing what goes, compensating and fitting what stays, on SmolLM2-135M."""
TUNING_WINDOWS_PER_STEP = 2
"""Windows of calibration text whose gradients one step of training a block adds up."""
GGUF_SECONDS_PER_WEIGHT = {True: 1e-6, False: 2e-7}
"""The same for the block formats of GGUF, with compensation and refinement or without."""
GATED_WEIGHT_SECONDS = {"magnitude": 1e-9, "movement": 3e-9, "l0": 3e-8}
"""Of a batch that is trained with gates on every weight."""
PROCESS_SECONDS = 4.0
"""Start of a process with torch."""
ONNX_SECONDS_PER_PARAMETER = 2e-7
"""Export, optimize and quantize."""


@dataclass(frozen=True)
class Surroundings:
    """What a step works on: the model before and after it, the one that was uploaded, and the job's budget."""

    before: Shape
    after: Shape
    original: Shape
    facts: ModelFacts
    """Of the original."""
    budget: int | None
    """Bytes; what can be done in less memory is, where the budget asks for it."""

    @property
    def forward_flops(self) -> float:
        """Of one token through the model before the step; of a mixture, the experts it meets."""
        return 2 * self.facts.active_share() * self.before.dense_parameters


def loaded_bytes(shape: Shape) -> int:
    """Bytes of a model in memory; a quantized one is unpacked when it is loaded."""
    return int(LOADING_FACTOR * 4 * shape.dense_parameters)


def outputs_per_token(facts: ModelFacts) -> int:
    """Numbers a model puts out per token: logits of a language model, the embedding of an encoder."""
    return facts.vocab_size if facts.family == "causal_lm" else facts.hidden_size


def streaming_seconds(nbytes: int) -> float:
    """Reading or writing so many bytes of weights."""
    return nbytes / STREAMED_BYTES_PER_SECOND


def tokens_of(step: QuantizeCalibrated | PruneCalibrated | PruneWidth | PruneHeads, facts: ModelFacts) -> int:
    """Tokens that a step is calibrated on: of text, or those that its images become."""
    if facts.preprocessing is not None and isinstance(step, QuantizeCalibrated):
        return step.calibration_images * facts.max_positions
    return step.calibration_tokens


def calibration_memory(
    step: QuantizeCalibrated | PruneCalibrated | PruneWidth | PruneHeads,
    before: Shape,
    facts: ModelFacts,
    *,
    one_site_at_a_time: bool,
) -> int:
    """Bytes beyond the interpreter's while a model is calibrated and its layers are solved."""
    in_nf4 = isinstance(step, QuantizeCalibrated) and step.number_format == "nf4"
    codes = wide_code_bytes(before.tensors) if in_nf4 else 0
    return codes + calibrated_bytes(
        before.tensors,
        facts,
        tokens=tokens_of(step, facts),
        window=facts.max_positions if facts.preprocessing else min(step.sequence_length, facts.max_positions),
        one_site_at_a_time=one_site_at_a_time,
        trained=isinstance(step, QuantizeCalibrated) and step.solver == "signround",
    )


def _calibrating(tokens: int, on: Surroundings) -> int:
    """Bytes while the statistics of a whole block's inputs are held, in windows of the usual length."""
    return calibrated_bytes(
        on.before.tensors,
        on.facts,
        tokens=tokens,
        window=min(WINDOW_TOKENS, on.facts.max_positions),
        one_site_at_a_time=False,
    )


@singledispatch
def step_memory(_step: Step, _on: Surroundings) -> int:
    """Bytes beyond the interpreter's at the step's peak. By default, those of a step that streams the checkpoint."""
    return SLAB_BYTES


@step_memory.register(PruneDepth)
@step_memory.register(PruneExperts)
def _(step: PruneDepth | PruneExperts, on: Surroundings) -> int:
    states = 2 * 4 * step.calibration_tokens * on.facts.hidden_size
    blocks = 4 * on.before.largest_block
    if _repairs_gaps(step, on):
        states, blocks = states * 3 // 2, 2 * blocks + _gap_repair_bytes(on.before, on.facts)
    return blocks + 4 * on.facts.vocab_size * on.facts.hidden_size + states


def _repairs_gaps(step: Step, on: Surroundings) -> bool:
    return isinstance(step, PruneDepth) and step.repairs(ARCHITECTURES[on.facts.architecture])


def _gap_repair_bytes(shape: Shape, facts: ModelFacts) -> int:
    """Σ x xᵀ of the layer before a gap, damped beside it, and its factor; the change of the weights, twice."""
    architecture = ARCHITECTURES[facts.architecture]
    widest = max(widths_of(shape.tensors, architecture), default=0) + 1
    return 4 * (3 * widest**2 + 2 * widest * facts.hidden_size)


@step_memory.register
def _(step: QuantizeCalibrated, on: Surroundings) -> int:
    return _solving_memory(step, on)


@step_memory.register
def _(step: PruneCalibrated, on: Surroundings) -> int:
    solving = _solving_memory(step, on)
    if not step.runs_backwards:
        return solving
    window = min(step.sequence_length, on.facts.max_positions)
    backward = gradient_bytes(on.before.tensors, on.facts, tokens=step.calibration_tokens, window=window)
    return max(solving, backward)


def _solving_memory(step: QuantizeCalibrated | PruneCalibrated, on: Surroundings) -> int:
    """Of the whole block at once, or of one input after the other where the budget asks for it."""
    whole = calibration_memory(step, on.before, on.facts, one_site_at_a_time=False)
    if on.budget is None or INTERPRETER_BYTES + whole <= on.budget:
        return whole
    return calibration_memory(step, on.before, on.facts, one_site_at_a_time=True)


@step_memory.register(PruneWidth)
@step_memory.register(PruneHeads)
def _(step: PruneWidth | PruneHeads, on: Surroundings) -> int:
    # H⁻¹ and its factor beside H, and the reading layer three times in float32.
    beside = max((4 * (2 * inner**2 + 3 * inner * outer) for inner, outer in _readers(step, on)), default=0)
    return calibration_memory(step, on.before, on.facts, one_site_at_a_time=True) + beside


def _readers(step: PruneWidth | PruneHeads, on: Surroundings) -> list[tuple[int, int]]:
    """Inputs and outputs of the layer that reads the channels of each block's feed-forward part, or its heads."""
    architecture = ARCHITECTURES[on.facts.architecture]
    reads = is_reader if isinstance(step, PruneWidth) else reads_heads
    shapes = [t.shape for t in on.before.tensors if reads(t.name, architecture)]
    return [(shape[0], shape[1]) if architecture.inputs_first else (shape[1], shape[0]) for shape in shapes]


@step_memory.register
def _(step: PruneHidden, on: Surroundings) -> int:
    hidden, window = on.facts.hidden_size, min(step.sequence_length, on.facts.max_positions)
    # A block, its narrow self, and that as it is stored; the rows of the embedding that are looked up.
    held = 3 * 4 * on.before.largest_block + 4 * min(step.calibration_tokens, on.facts.vocab_size) * hidden
    widest, inner = max((max(t.shape) for t in compressible(on.before)), default=hidden), _widest_writer(on)
    activations = ACTIVATIONS * 4 * window * windows_at_once(window, widest) * widest
    # Of a writer: Σ x xᵀ, damped, and its factor; what is missing of it, and the change.
    fitting = 4 * 3 * (inner**2 + inner * hidden)
    # In float64: second moments, their eigenvectors, and LAPACK's work space.
    turning = 8 * 5 * hidden**2
    return RUNTIME_BYTES + held + max(fitting + activations, turning, SLAB_BYTES)


def _widest_writer(on: Surroundings) -> int:
    """Inputs of the widest layer that adds to the states and is refitted; those of experts are not."""
    layers = (t for t in compressible(on.before) if hidden_axis(t.name) == 0 and not is_expert(t.name))
    return max((t.shape[1] for t in layers), default=0)


@step_memory.register
def _(step: QuantizeOnnx, on: Surroundings) -> int:
    exporting = ONNX_QUANTIZED_COPIES * 4 * on.before.dense_parameters
    if on.facts.preprocessing is not None:
        return exporting + calibration_activations(on.facts, step.calibration_images)
    return max(_calibrating(step.calibration_tokens, on), exporting) + on.after.weight_bytes


@step_memory.register
def _(step: QuantizeGguf, on: Surroundings) -> int:
    return _calibrating(step.calibration_tokens, on) + SLAB_BYTES


@step_memory.register
def _(step: DistillLogits, on: Surroundings) -> int:
    activations, logits = _activation_bytes(step, on)
    if step.attention_weight > 0:
        activations += _attention_map_bytes(step, on)
    student = _trained_bytes(step, on)
    if step.cached_logits is not None:
        return logits + max(loaded_bytes(on.original), student + activations)
    return loaded_bytes(on.original) + student + activations + logits


@step_memory.register
def _(step: PruneTraining, on: Surroundings) -> int:
    gated = sum(t.elements for t in compressible(on.before))
    teacher = loaded_bytes(on.original) if step.asks_teacher(on.facts.family) else 0
    student = TRAINING_BYTES_PER_PARAMETER * on.before.dense_parameters
    per_gate = LEARNED_GATE_BYTES if isinstance(step.method, LearnedGates) else SCHEDULED_GATE_BYTES
    return teacher + student + per_gate * gated + sum(_activation_bytes(step, on))


def _activation_bytes(step: TextTraining, on: Surroundings) -> tuple[int, int]:
    """Of a batch while a student is trained: inside its blocks, and logits."""
    tokens = step.batch_size * step.sequence_length
    activations = 4 * tokens * on.facts.hidden_size * ACTIVATION_FLOATS_PER_HIDDEN * on.after.blocks
    if step.gradient_checkpointing:
        # What enters each block, and one block as a whole.
        activations = activations // on.after.blocks + 4 * tokens * on.facts.hidden_size * on.after.blocks
    return activations, TRAINING_LOGITS_COPIES * 4 * tokens * outputs_per_token(on.facts)


def _attention_map_bytes(step: DistillLogits, on: Surroundings) -> int:
    """Probabilities of attention by head, kept of every block of the student beside those of the teacher."""
    heads = on.facts.attention_heads or on.facts.hidden_size // SMALLEST_HEAD
    one = 4 * step.batch_size * heads * step.sequence_length**2
    return ATTENTION_MAP_COPIES * one * on.after.blocks


def _trained_bytes(step: DistillLogits, on: Surroundings) -> int:
    """Weights, gradients and moments of a student: of all its weights, or of adapters beside them."""
    if step.lora_rank is None:
        return TRAINING_BYTES_PER_PARAMETER * on.after.dense_parameters
    thin = step.lora_rank * sum(sum(t.shape) for t in compressible(on.after))
    return loaded_bytes(on.after) + TRAINING_BYTES_PER_PARAMETER * thin


@step_memory.register
def _(_step: OptimizeOnnx, on: Surroundings) -> int:
    return ONNX_COPIES * 4 * on.before.dense_parameters


@step_memory.register
def _(step: PruneChannels, on: Surroundings) -> int:
    # The values of all layers are kept for the way back; the criterion looks at all calibration images, as floats.
    training = TRAINED_LAYERS * image_activations(on.facts, step.batch_size) + loaded_bytes(on.original)
    looking = 4 * step.calibration_images * image_bytes(on.facts)
    return training + looking + TRAINING_BYTES_PER_PARAMETER * on.before.dense_parameters


def step_seconds(step: Step, on: Surroundings) -> float:
    """Seconds on two cores: reading the checkpoint, writing the result, and the work in between."""
    return streaming_seconds(on.before.weight_bytes + on.after.weight_bytes) + working_seconds(step, on)


@singledispatch
def working_seconds(_step: Step, _on: Surroundings) -> float:
    """Seconds that a step computes; by default, none worth counting beside the reading and writing."""
    return 0.0


@working_seconds.register
def _(step: QuantizeWeights, on: Surroundings) -> float:
    return on.before.dense_parameters / QUANTIZED_WEIGHTS_PER_SECOND[step.scale_search]


@working_seconds.register
def _(step: QuantizeCalibrated, on: Surroundings) -> float:
    # Once to see the inputs, once more for the outputs of what was quantized.
    passes = 2.0 * tokens_of(step, on.facts)
    if step.solver == "signround":
        # Forward and backward, over so many windows a step.
        passes += 3 * TUNING_WINDOWS_PER_STEP * step.tuning_steps * step.sequence_length
    return passes * on.forward_flops / FLOPS_PER_SECOND + on.before.dense_parameters * GPTQ_SECONDS_PER_WEIGHT


@working_seconds.register
def _(step: QuantizeGguf, on: Surroundings) -> float:
    forwards = 2 * on.forward_flops * step.calibration_tokens / FLOPS_PER_SECOND
    return forwards + on.before.dense_parameters * GGUF_SECONDS_PER_WEIGHT[step.compensate]


@working_seconds.register
def _(step: QuantizeOnnx, on: Surroundings) -> float:
    per_weight = GPTQ_SECONDS_PER_WEIGHT + ONNX_SECONDS_PER_PARAMETER
    if on.facts.preprocessing is not None:
        # Three times to solve the layers, twice for the ranges of what they give.
        flops = 5 * step.calibration_images * image_flops(on.facts, on.before.dense_parameters)
        return flops / FLOPS_PER_SECOND + on.before.dense_parameters * per_weight + PROCESS_SECONDS
    # QDQ counts histograms in between.
    runs = 2 if step.method == "matmul_nbits" else 3
    forwards = runs * 2 * on.before.dense_parameters * step.calibration_tokens / FLOPS_PER_SECOND
    return forwards + on.before.dense_parameters * per_weight + PROCESS_SECONDS


@working_seconds.register
def _(step: PruneCalibrated, on: Surroundings) -> float:
    # Gradients: forward, then block by block forward once more and backward, which is two.
    passes = 6 if step.runs_backwards else 2
    forwards = passes * on.forward_flops * step.calibration_tokens
    # Each step of fitting multiplies every weight by H.
    fitting = 2 * step.fitting_steps * sum(t.elements * t.shape[1] for t in compressible(on.before))
    choosing = on.before.dense_parameters * PRUNING_SECONDS_PER_WEIGHT
    times = 1 + len(SENSITIVITY_SPARSITIES) if step.allocation == "sensitivity" else 1
    return forwards / FLOPS_PER_SECOND + times * (fitting / FLOPS_PER_SECOND + choosing)


@working_seconds.register(PruneWidth)
@working_seconds.register(PruneHeads)
def _(step: PruneWidth | PruneHeads, on: Surroundings) -> float:
    forwards = 2 * on.forward_flops * step.calibration_tokens
    # Moments of the inputs; inverting them, eliminating what goes, and refitting what stays.
    moments = sum(inner**2 * step.calibration_tokens for inner, _ in _readers(step, on))
    solving = (
        sum(inner**2 * (3 * inner + 4 * outer) for inner, outer in _readers(step, on)) if step.repair else 0
    )
    return (forwards + moments + solving) / FLOPS_PER_SECOND


@working_seconds.register
def _(step: PruneHidden, on: Surroundings) -> float:
    hidden, tokens = on.facts.hidden_size, step.calibration_tokens
    # To find the directions, and to narrow: the original three times, what becomes of it three times.
    forwards = 7 * on.forward_flops * tokens
    per_block = 12 * hidden**2 + 2 * _widest_writer(on) * (_widest_writer(on) + hidden)
    turning = 20 * hidden**3 + 2 * hidden * on.before.dense_parameters
    return (forwards + per_block * tokens * on.before.blocks + turning) / FLOPS_PER_SECOND


@working_seconds.register(PruneDepth)
@working_seconds.register(PruneExperts)
def _(step: PruneDepth | PruneExperts, on: Surroundings) -> float:
    passes = 2 if _repairs_gaps(step, on) else 1
    return passes * on.forward_flops * step.calibration_tokens / FLOPS_PER_SECOND


@working_seconds.register
def _(step: DistillLogits, on: Surroundings) -> float:
    tokens = step.sequences * step.sequence_length
    products = (8 if step.gradient_checkpointing else 6) * on.after.dense_parameters
    products += 2 * on.original.dense_parameters
    training = on.facts.active_share() * products * tokens / FLOPS_PER_SECOND
    return _choosing_seconds(step, on) + min(training, step.max_seconds or training)


@working_seconds.register
def _(step: PruneTraining, on: Surroundings) -> float:
    teacher = 2 if step.asks_teacher(on.facts.family) else 0
    products = (8 if step.gradient_checkpointing else 6) + teacher
    tokens = step.sequences * step.sequence_length
    gating = GATED_WEIGHT_SECONDS[step.method.name] * step.max_steps * step.gradient_accumulation
    flops = on.facts.active_share() * products * on.before.dense_parameters * tokens
    return flops / FLOPS_PER_SECOND + gating * on.before.dense_parameters


def _choosing_seconds(step: DistillLogits, on: Surroundings) -> float:
    """Seconds to see which blocks a student cut from its teacher can best do without, and to repair what is left."""
    if not isinstance(step.student, StudentFromDepthCut):
        return 0.0
    count = on.original.blocks - on.after.blocks
    # Each alone; then, while one is to go after another, those that are left of twice as many.
    looks = on.original.blocks + sum(2 * count - gone for gone in range(1, count))
    tokens = looks * step.student.LOOK_TOKENS
    if step.student.repairs(ARCHITECTURES[on.facts.architecture]):
        tokens += min(step.student.REPAIR_TOKENS, step.sequences * step.sequence_length)
    return tokens * on.forward_flops / FLOPS_PER_SECOND


@working_seconds.register
def _(step: PruneChannels, on: Surroundings) -> float:
    # Forward and backward of the student, forward of the teacher.
    student, teacher = (image_flops(on.facts, s.dense_parameters) for s in (on.after, on.original))
    training = step.max_steps * step.batch_size * (3 * student + teacher) / FLOPS_PER_SECOND
    looking = 4 * step.calibration_images * teacher / FLOPS_PER_SECOND
    return looking + min(training, step.max_seconds or training)


@working_seconds.register
def _(_step: OptimizeOnnx, on: Surroundings) -> float:
    return PROCESS_SECONDS + ONNX_SECONDS_PER_PARAMETER * on.before.dense_parameters
