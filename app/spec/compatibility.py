"""Does a spec fit a model? Answered from the facts in its headers, so that a job is refused at submit, not at hour six.

Pure: (spec, facts) in, faults out, each with a JSON pointer into the spec and words that say what would work.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from app.errors import Fault
from app.spec.acceptance_checks import check_acceptance
from app.spec.architectures import ARCHITECTURES, Architecture, block_index, is_compressible, is_router
from app.spec.attention import has_attention_maps, projections_among
from app.spec.attention_heads import counts_in, groups_left, head_axis, possible_groups, without_heads
from app.spec.base import Family, Step
from app.spec.class_checks import check_classes
from app.spec.compression import CompressionSpec
from app.spec.distill import (
    DistillLogits,
    StudentFromDepthCut,
    StudentFromModel,
    StudentFromPreviousStep,
    StudentFromTeacher,
    TrainingGrid,
)
from app.spec.facts import ModelFacts, TensorFact
from app.spec.feed_forward import channel_axis, widths_of, with_width
from app.spec.gguf import QuantizeGguf
from app.spec.gguf_layout import ARCHITECTURES as GGUF_ARCHITECTURES
from app.spec.gguf_layout import gguf_tensors
from app.spec.head import NO_OWN_HEAD, own_head
from app.spec.layouts import inputs_of, limits_of_layout
from app.spec.onnx_operators import architecture_named
from app.spec.prune import PruneCalibrated, PruneDepth, PruneHeads, PruneMagnitude, PruneWidth
from app.spec.prune_experts import PruneExperts, experts_in, with_experts
from app.spec.prune_hidden import (
    PruneHidden,
    facts_after,
    has_narrowable_states,
    hidden_axis,
    hidden_width_of,
    multiple_for,
    with_hidden_width,
)
from app.spec.prune_training import PruneTraining
from app.spec.quantize import QuantizedWeights
from app.spec.quantize_dynamic import QuantizeDynamic
from app.spec.quantize_onnx import QuantizeOnnx

_NAMED_LAYERS = 3
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_SIZE_NOT_IN_GGUF = frozenset({"qwen2", "phi3"})
"""As transformers 5.23 reads them."""
_OfLayers = (
    QuantizedWeights | PruneMagnitude | PruneCalibrated | PruneTraining | QuantizeOnnx | QuantizeDynamic
)
"""Steps that take `ignore`."""
_Removal = PruneDepth | PruneWidth | PruneHeads | PruneHidden | PruneExperts
_FOR_IMAGES = "For images there are quantize.onnx, and for vision transformers quantize.weights and quantize.calibrated."


@dataclass(frozen=True)
class _Shape:
    """The model as the steps before have left it: how many blocks, and its compressible layers."""

    blocks: int
    layers: tuple[TensorFact, ...]
    architecture: Architecture
    head: TensorFact | None
    """The weight that gives the logits, where it stands alone."""

    @classmethod
    def of(cls, facts: ModelFacts) -> _Shape:
        """A model as it was uploaded; routers are no layers to work on."""
        layers = tuple(t for t in facts.compressible() if not is_router(t.name))
        architecture = architecture_named(facts.architecture)
        return cls(facts.num_blocks, layers, architecture, own_head(facts.tensors, architecture))

    def seen_by(self, step: Step) -> _Shape:
        """The same with the layers that a step works on: files with packed weights hold those inside blocks alone."""
        if not isinstance(step, QuantizedWeights):
            return self
        return replace(self, layers=tuple(t for t in self.layers if is_compressible(t.name, t.shape)))

    def without_blocks(self, count: int) -> _Shape:
        """Which blocks go is known only when the job runs; all have the same layers, so drop the last."""
        left = self.blocks - count
        layers = tuple(t for t in self.layers if (block_index(t.name) or 0) < left)
        return replace(self, blocks=left, layers=layers)

    def with_width_of(self, step: PruneWidth) -> _Shape:
        """Fewer channels in every feed-forward part, where the step can remove any."""
        match [step.width_after(width) for width in widths_of(self.layers, self.architecture)]:
            case [int(width)]:
                return replace(self, layers=with_width(self.layers, self.architecture, width))
            case _:
                return self


def check_spec(
    spec: CompressionSpec, facts: ModelFacts, students: dict[str, ModelFacts] | None = None
) -> list[Fault]:
    """Everything in a spec that cannot be done to this model; pointers start at the spec.

    `students` holds the facts of uploaded students by model id; one that is missing is not checked here.
    """
    faults: list[Fault] = []
    shape, left = _Shape.of(facts), facts
    for number, step in enumerate(spec.steps):
        faults += _check_step(step, left, shape, students or {}, f"/steps/{number}")
        after = facts_after(step, shape.layers, left)
        shape, left = _after(step, shape, left, students or {}), after
    return [*faults, *check_classes(spec, facts, students or {}), *check_acceptance(spec, facts)]


def _check_step(
    step: Step, facts: ModelFacts, shape: _Shape, students: dict[str, ModelFacts], where: str
) -> Iterator[Fault]:
    found = [*_check_family(step, facts, where)]
    if not found or not shape.architecture.takes_images or facts.format == "onnx":
        limits = limits_of_layout(step, shape.architecture, shape.layers)
        found += [Fault(where + at, why) for at, why in limits]
    yield from found
    if found and shape.architecture.takes_images:
        # Its layers are none of those that the step works on.
        return
    if isinstance(step, _OfLayers):
        yield from _check_layers(step, shape.seen_by(step), where)
    yield from _check_particulars(step, facts, shape, students, where)


def _check_particulars(
    step: Step, facts: ModelFacts, shape: _Shape, students: dict[str, ModelFacts], where: str
) -> Iterator[Fault]:
    """What only one technique asks of a model."""
    match step:
        case QuantizeOnnx() | QuantizeDynamic():
            yield from _check_head(step, facts, where)
        case QuantizeGguf():
            yield from _check_gguf(step, facts, shape, where)
        case PruneDepth() | PruneWidth() | PruneHeads() | PruneHidden() | PruneExperts():
            yield from _check_removal(step, shape, facts, where)
        case DistillLogits():
            yield from _check_distillation(step, facts, students, where)
        case PruneTraining():
            yield from _check_length(step.sequence_length, facts.max_positions, where)


def _after(step: Step, shape: _Shape, facts: ModelFacts, students: dict[str, ModelFacts]) -> _Shape:
    """The model that a step leaves."""
    match step:
        case PruneDepth() | PruneWidth() | PruneHeads() | PruneHidden() | PruneExperts():
            return _after_removal(step, shape, facts)
        case DistillLogits():
            return _after_distillation(step, shape, students)
        case _:
            return shape


def matching_layers(patterns: Sequence[str], layers: Iterable[TensorFact]) -> tuple[TensorFact, ...]:
    """Layers whose module name (the tensor's without `.weight`) matches one of the shell patterns."""
    return tuple(t for t in layers if any(fnmatchcase(module_name(t), p) for p in patterns))


def module_name(tensor: TensorFact) -> str:
    """The name of the module a weight belongs to."""
    return tensor.name.removesuffix(".weight")


def _check_family(step: Step, facts: ModelFacts, where: str) -> Iterator[Fault]:
    if facts.family not in step.families:
        known = " and ".join(sorted(step.families))
        way_out = (
            f" {_FOR_IMAGES}" if facts.family is Family.IMAGE_CLASSIFIER and facts.format != "onnx" else ""
        )
        yield Fault(f"{where}/technique", f"Works on {known} models; this one is {facts.family}.{way_out}")


def _check_head(step: QuantizeOnnx | QuantizeDynamic, facts: ModelFacts, where: str) -> Iterator[Fault]:
    field = "quantize_head" if isinstance(step, QuantizeOnnx) else "include_head"
    if getattr(step, field) and facts.family is not Family.CAUSAL_LM:
        yield Fault(f"{where}/{field}", "This model has no language-model head; leave it out.")


def _check_gguf(step: QuantizeGguf, facts: ModelFacts, shape: _Shape, where: str) -> Iterator[Fault]:
    """Written is only what can be read back: by llama.cpp and, to verify the result, by transformers."""
    architecture = GGUF_ARCHITECTURES.get(facts.architecture)
    if architecture is None:
        if facts.family is Family.CAUSAL_LM:
            known = ", ".join(name.removesuffix("ForCausalLM") for name in GGUF_ARCHITECTURES)
            yield Fault(
                f"{where}/technique",
                f"A GGUF of {facts.architecture} could not be read back; of {known} it can.",
            )
        return
    yield from _check_floats(shape.layers, where)
    yield from _check_head_size(shape, facts, where)
    try:
        gguf_tensors(facts.tensors, architecture, step.mix)
    except ValueError as error:
        yield Fault(f"{where}/technique", f"{str(error)[:1].upper()}{str(error)[1:]}.")


def _check_head_size(shape: _Shape, facts: ModelFacts, where: str) -> Iterator[Fault]:
    """Of the models whose header in GGUF has no key for it, so that the hidden width by the heads is taken for it."""
    counts = counts_in(facts) if shape.architecture.model_type in _SIZE_NOT_IN_GGUF else None
    if counts is None:
        return
    heads = groups_left(shape.layers, shape.architecture, counts) * counts.per_group
    if facts.hidden_size // heads != counts.size:
        yield Fault(
            f"{where}/technique",
            f"A GGUF of {facts.architecture} cannot say the size of a head, which is {counts.size}, and {heads} heads of a hidden "
            f"width of {facts.hidden_size} would be taken for larger or smaller ones: use quantize.calibrated.",
        )


def _check_floats(layers: Iterable[TensorFact], where: str) -> Iterator[Fault]:
    whole = next((t for t in layers if t.dtype not in _FLOATS), None)
    if whole is not None:
        yield Fault(
            f"{where}/technique",
            f"{module_name(whole)} is stored as {whole.dtype}: the model is already compressed. Upload the original.",
        )


def _check_layers(step: _OfLayers, shape: _Shape, where: str) -> Iterator[Fault]:
    for number, pattern in enumerate(step.ignore):
        if not matching_layers([pattern], shape.layers):
            example = module_name(shape.layers[0]) if shape.layers else "none"
            yield Fault(
                f"{where}/ignore/{number}",
                f"{pattern!r} matches none of the {len(shape.layers)} layers; they are named like {example}.",
            )
    ignored = set(matching_layers(step.ignore, shape.layers))
    layers = [t for t in shape.layers if t not in ignored]
    if any(t.dtype not in _FLOATS for t in layers):
        yield from _check_floats(layers, where)
    elif not layers:
        yield Fault(f"{where}/ignore", "Nothing is left to work on: every layer is ignored.")
    elif isinstance(step, QuantizedWeights):
        head = [shape.head] if step.include_head and shape.head else []
        if step.include_head and not head:
            yield Fault(f"{where}/include_head", NO_OWN_HEAD)
        yield from _check_settings(step, [*layers, *head], where)
    elif isinstance(step, PruneMagnitude | PruneCalibrated) and step.pattern != "unstructured":
        yield from _check_neighbours(step.pattern, layers, shape.architecture, f"{where}/pattern")


def _check_settings(step: QuantizedWeights, layers: Sequence[TensorFact], where: str) -> Iterator[Fault]:
    """Do groups divide the inputs of the layers they are meant for, and can different settings be mixed?"""
    for number, override in enumerate(step.overrides):
        if not matching_layers([override.layers], layers):
            yield Fault(
                f"{where}/overrides/{number}/layers",
                f"{override.layers!r} matches none of the {len(layers)} layers; "
                f"they are named like {module_name(layers[0])}.",
            )
    definite = step.with_group_size_for(t.shape[1] for t in layers)
    settings = {t: definite.settings_of(module_name(t)) for t in layers}
    if len(set(settings.values())) > 1 and not all(found.symmetric for found in settings.values()):
        yield Fault(
            f"{where}/overrides", "Different settings can only be mixed with symmetric true for all layers."
        )
    misfits = [t for t in layers if t.shape[1] % settings[t].divisor]
    for divisor in dict.fromkeys(settings[t].divisor for t in misfits):
        found = [t for t in layers if settings[t].divisor == divisor]
        yield from _check_divisor(step, divisor, found, where)


def _check_divisor(
    step: QuantizedWeights, divisor: int, layers: Sequence[TensorFact], where: str
) -> Iterator[Fault]:
    misfits = _some([t for t in layers if t.shape[1] % divisor])
    if step.number_format != "int":
        pointer = "group_size" if step.number_format == "fp8" else "number_format"
        yield Fault(
            f"{where}/{pointer}",
            f"Needs inputs divisible by {divisor}, unlike {misfits}; add them to ignore.",
        )
        return
    common = math.gcd(*(t.shape[1] for t in layers))
    sizes = [size for size in range(8, min(common, 4096) + 1, 8) if common % size == 0]
    nearest = min(sizes, key=lambda size: abs(math.log(size / divisor)), default=None)
    works = (
        f"{nearest} works" if nearest else "no group size fits all; leave it out for one scale per channel"
    )
    pointer = "group_size" if divisor == step.group_size else "overrides"
    yield Fault(
        f"{where}/{pointer}", f"{divisor} does not divide the inputs of {misfits}. For this model {works}."
    )


def _check_neighbours(
    pattern: str, layers: Sequence[TensorFact], architecture: Architecture, pointer: str
) -> Iterator[Fault]:
    group = int(pattern.partition(":")[2])
    misfits = [t for t in layers if inputs_of(t.shape, architecture) % group]
    if misfits:
        yield Fault(
            pointer,
            f"{pattern} needs inputs divisible by {group}, unlike {_some(misfits)}; add them to ignore.",
        )


def _some(tensors: Sequence[TensorFact]) -> str:
    named = ", ".join(f"{module_name(t)} ({t.shape[1]})" for t in tensors[:_NAMED_LAYERS])
    more = len(tensors) - _NAMED_LAYERS
    return named + (f" and {more} more" if more > 0 else "")


def _check_removal(step: _Removal, shape: _Shape, facts: ModelFacts, where: str) -> Iterator[Fault]:
    match step:
        case PruneDepth():
            yield from _check_depth(step, shape, where)
        case PruneWidth():
            yield from _check_width(step, shape, where)
        case PruneHeads():
            yield from _check_heads(shape, facts, where)
        case PruneHidden():
            yield from _check_hidden(step, shape, facts, where)
        case PruneExperts():
            yield from _check_experts(step, shape, facts, where)


def _after_removal(step: _Removal, shape: _Shape, facts: ModelFacts) -> _Shape:
    match step:
        case PruneDepth():
            return shape.without_blocks(min(step.blocks_to_drop(shape.blocks), shape.blocks - 1))
        case PruneWidth():
            return shape.with_width_of(step)
        case PruneHeads():
            return replace(shape, layers=without_heads(step, shape.layers, facts))
        case PruneHidden():
            return _with_hidden_width(shape, facts_after(step, shape.layers, facts).hidden_size)
        case PruneExperts():
            after = step.experts_after(experts_in(shape.layers), facts.experts_per_token or 1)
            return shape if after is None else replace(shape, layers=with_experts(shape.layers, after))


def _check_depth(step: PruneDepth, shape: _Shape, where: str) -> Iterator[Fault]:
    dropped = step.blocks_to_drop(shape.blocks)
    if dropped >= shape.blocks:
        field = "drop_blocks" if step.drop_blocks is not None else "drop_ratio"
        yield Fault(
            f"{where}/{field}",
            f"This removes {dropped} of {shape.blocks} blocks; at least one must stay: {shape.blocks - 1} at most.",
        )


def _check_width(step: PruneWidth, shape: _Shape, where: str) -> Iterator[Fault]:
    yield from _check_floats((t for t in shape.layers if channel_axis(t.name, shape.architecture)), where)
    for width in widths_of(shape.layers, shape.architecture):
        if step.width_after(width) is None:
            yield Fault(
                f"{where}/round_to",
                f"No multiple of {step.round_to} is smaller than the {width} channels there are; "
                f"{2 ** ((width - 1).bit_length() - 1)} works.",
            )


def _check_heads(shape: _Shape, facts: ModelFacts, where: str) -> Iterator[Fault]:
    yield from _check_floats((t for t in shape.layers if head_axis(t.name, shape.architecture)), where)
    counts = counts_in(facts)
    if counts is None:
        return
    groups = groups_left(shape.layers, shape.architecture, counts)
    if not possible_groups(shape.architecture, counts, groups, facts.hidden_size):
        yield Fault(
            f"{where}/technique",
            f"Attention has {groups} group{'s' if groups > 1 else ''} of {counts.per_group} query heads, and no smaller number "
            "can be written for this model: use prune.width or prune.depth.",
        )


def _check_hidden(step: PruneHidden, shape: _Shape, facts: ModelFacts, where: str) -> Iterator[Fault]:
    yield from _check_floats((t for t in shape.layers if hidden_axis(t.name) is not None), where)
    if not has_narrowable_states(shape.architecture):
        return
    width, multiple = hidden_width_of(shape.layers), multiple_for(shape.layers, facts)
    if step.width_after(width, multiple) is not None:
        return
    field = "round_to" if step.hidden_size is None else "hidden_size"
    wanted = f"of {step.round_to} " if step.hidden_size is None else ""
    heads = f" that its {multiple} heads divide" if multiple > 1 else ""
    yield Fault(
        f"{where}/{field}",
        f"What is left must be a number {wanted}below the {width} there are{heads}.",
    )


def _with_hidden_width(shape: _Shape, width: int) -> _Shape:
    if not has_narrowable_states(shape.architecture):
        return shape
    head = None if shape.head is None else with_hidden_width([shape.head], width)[0]
    return replace(shape, layers=with_hidden_width(shape.layers, width), head=head)


def _check_experts(step: PruneExperts, shape: _Shape, facts: ModelFacts, where: str) -> Iterator[Fault]:
    yield from _check_floats(shape.layers, where)
    experts, per_token = experts_in(shape.layers), facts.experts_per_token or 1
    if experts and step.experts_after(experts, per_token) is None:
        yield Fault(
            f"{where}/round_to" if step.round_to > 1 else f"{where}/technique",
            f"Each token meets {per_token} of the {experts} experts of a block, and no smaller multiple of {step.round_to} is left.",
        )


def _check_distillation(
    step: DistillLogits, facts: ModelFacts, students: dict[str, ModelFacts], where: str
) -> Iterator[Fault]:
    models = [facts]
    if isinstance(step.student, StudentFromModel) and step.student.model in students:
        models.append(students[step.student.model])
        yield from _check_student(models[1], facts, f"{where}/student/model")
    for model in models:
        if step.relation_weight > 0 and projections_among([module_name(t) for t in model.tensors]) is None:
            yield Fault(
                f"{where}/relation_weight",
                f"One layer of {model.architecture} makes queries, keys and values, whose parts relations are not taken "
                "from; hidden_weight works for every model.",
            )
        if step.attention_weight > 0 and not has_attention_maps(ARCHITECTURES[model.architecture]):
            yield Fault(
                f"{where}/attention_weight",
                f"The attention of {model.architecture} does not show what tokens look at; relation_weight and hidden_weight "
                "work.",
            )
    if step.for_grid is not None:
        yield from _check_training_grid(step.for_grid, facts, f"{where}/for_grid")
    if step.cached_logits is not None and facts.family is not Family.CAUSAL_LM:
        yield Fault(f"{where}/cached_logits", "Only language models have next tokens; leave it out.")
    yield from _check_length(step.sequence_length, min(model.max_positions for model in models), where)


def _check_length(tokens: int, limit: int, where: str) -> Iterator[Fault]:
    if tokens > limit:
        yield Fault(f"{where}/sequence_length", f"The model takes {limit} tokens at most.")


def _check_training_grid(grid: TrainingGrid, facts: ModelFacts, pointer: str) -> Iterator[Fault]:
    if ARCHITECTURES[facts.architecture].expert_layers is not None:
        yield Fault(pointer, "Experts are trained in one tensor, which is not rounded; leave it out.")
    size = grid.group_size
    misfits = [t for t in facts.compressible() if size is not None and t.shape[1] % size]
    if misfits:
        yield Fault(f"{pointer}/group_size", f"{size} does not divide the inputs of {_some(misfits)}.")


def _check_student(student: ModelFacts, facts: ModelFacts, pointer: str) -> Iterator[Fault]:
    if student.family is not facts.family:
        yield Fault(pointer, f"The student is {student.family}, its teacher {facts.family}.")
    if student.vocab_size != facts.vocab_size:
        yield Fault(
            pointer,
            f"The student's vocabulary has {student.vocab_size} entries, the teacher's {facts.vocab_size}: "
            "they must share one tokenizer.",
        )
    if student.num_labels != facts.num_labels:
        yield Fault(pointer, f"The student has {student.num_labels} labels, the teacher {facts.num_labels}.")


def _after_distillation(step: DistillLogits, shape: _Shape, students: dict[str, ModelFacts]) -> _Shape:
    match step.student:
        case StudentFromDepthCut():
            return shape.without_blocks(blocks_cut(step.student.drop_ratio, shape.blocks))
        case StudentFromModel() if step.student.model in students:
            return _Shape.of(students[step.student.model])
        case StudentFromModel() | StudentFromPreviousStep() | StudentFromTeacher():
            return shape


def blocks_cut(drop_ratio: float, num_blocks: int) -> int:
    """How many blocks a depth cut removes: the nearest number, at least one, and never the last block."""
    return min(max(1, round(drop_ratio * num_blocks)), num_blocks - 1)
