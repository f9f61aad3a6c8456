"""What a job will take, predicted from the facts in a model's headers: peak memory, disk, time and output bytes.

Pure: the API answers `POST /plans` and refuses a job with it, and the engine refuses with the same numbers before it
starts. Memory counts the job's process and its children together, as the supervisor does.
"""

from __future__ import annotations

from collections.abc import Iterator

from app.spec.base import Frozen
from app.spec.compression import CompressionSpec, Evaluation
from app.spec.facts import ModelFacts
from app.spec.image_costs import IMAGES_AT_ONCE, image_activations, image_bytes, image_flops
from app.spec.prune_hidden import facts_after
from app.spec.sizes import Shape, after_step
from app.spec.step_costs import (
    FLOPS_PER_SECOND,
    INTERPRETER_BYTES,
    PROCESS_SECONDS,
    SLAB_BYTES,
    Surroundings,
    loaded_bytes,
    outputs_per_token,
    step_memory,
    step_seconds,
    streaming_seconds,
)
from app.spec.step_disk import step_disk
from app.spec.text_training import TextTraining

_MIB = 2**20

RELOAD_TOKENS = 32
"""Tokens that a reloaded result is tried on when nothing is compared."""
LOGITS_COPIES = 3
"""Float32 arrays of (tokens, vocabulary) alive at once when two models are compared: both, and one being reduced."""
LATENCY_TOKENS = 160
"""Tokens that one timed round runs through a model."""

LABELLED_TOKENS = 128
"""Tokens of a text with a label: from a line (20) to a review (300)."""


class StagePlan(Frozen):
    """What one stage of a job will take."""

    name: str
    peak_memory_bytes: int
    """Highest resident memory of the job's processes during the stage."""
    disk_bytes: int
    """Bytes the stage writes to the worker's scratch directory."""
    seconds: float
    """On two CPU cores; an estimate to a factor of about three."""
    output_bytes: int | None = None
    """Bytes of the weights that the stage leaves, for stages that change them."""


class Plan(Frozen):
    """What a job will take."""

    stages: tuple[StagePlan, ...]
    peak_memory_bytes: int
    """The highest peak of all stages."""
    disk_bytes: int
    """Bytes of scratch space, all stages together; freed when the job has ended."""
    seconds: float
    """Sum over the stages, waiting in the queue not counted."""
    input_bytes: int
    """Bytes of the model as uploaded."""
    output_bytes: int
    """Bytes of the result: weights, tokenizer and configuration."""
    bytes_ratio: float
    """`output_bytes` over `input_bytes`."""
    memory_budget: int | None
    """Bytes the job may use, by its spec or its workers; null where neither is known."""
    fits: bool
    """Whether the peak is within the budget. A job that does not fit is refused."""


def plan_job(
    spec: CompressionSpec,
    facts: ModelFacts,
    *,
    students: dict[str, ModelFacts] | None = None,
    side_file_bytes: int = 0,
    worker_memory: int | None = None,
) -> Plan:
    """Predict a job.

    `side_file_bytes` are those of tokenizer and configuration, which are copied as they are; `worker_memory` are the
    bytes its worker has to give, which caps the budget of the spec.
    """
    limits = [n for n in (spec.resources.memory_budget, worker_memory) if n is not None]
    budget = min(limits, default=None)
    stages = tuple(_stages(spec, facts, students or {}, budget))
    output = next(s.output_bytes or 0 for s in reversed(stages) if s.name == "export") + side_file_bytes
    peak = max(stage.peak_memory_bytes for stage in stages)
    uploaded = facts.weight_bytes + side_file_bytes
    return Plan(
        stages=stages,
        peak_memory_bytes=peak,
        disk_bytes=sum(stage.disk_bytes for stage in stages),
        seconds=round(sum(stage.seconds for stage in stages), 1),
        input_bytes=uploaded,
        output_bytes=output,
        bytes_ratio=round(output / uploaded, 4),
        memory_budget=budget,
        fits=budget is None or peak <= budget,
    )


def nearest_spec(
    spec: CompressionSpec,
    facts: ModelFacts,
    *,
    students: dict[str, ModelFacts] | None = None,
    worker_memory: int | None = None,
) -> CompressionSpec | None:
    """The spec with the fewest changes that fits its budget, or None when only a larger budget helps.

    Gives up, in this order: batch size of training, its sequence length, the evaluation's window, and the
    comparison as a whole. What is done to the model stays as it was asked for.
    """
    changed = spec
    for shrink in (_smaller_batches, _shorter_sequences, _shorter_windows, _no_evaluation):
        for candidate in shrink(changed):
            changed = candidate
            if plan_job(changed, facts, students=students, worker_memory=worker_memory).fits:
                return changed
    return None


def _stages(
    spec: CompressionSpec, facts: ModelFacts, students: dict[str, ModelFacts], budget: int | None
) -> Iterator[StagePlan]:
    original = Shape.of(facts.tensors)
    converted = original.weight_bytes if facts.format == "gguf" else 0
    yield _stage("load", SLAB_BYTES if converted else 0, converted, streaming_seconds(converted))
    yield _measuring("baseline", spec.evaluation, [original], facts)
    shape, left, names = original, facts, spec.stage_names()
    for number, step in enumerate(spec.steps):
        result = after_step(step, shape, left, students)
        on = Surroundings(shape, result, original, left, budget)
        memory, seconds = step_memory(step, on), step_seconds(step, on)
        disk = result.weight_bytes + step_disk(step, on)
        yield _stage(names[2 + number], memory, disk, seconds, result.weight_bytes)
        shape, left = result, facts_after(step, shape.tensors, left)
    # Files are linked from the last step's directory, not copied.
    yield _stage("export", 0, 0, 0.5, shape.weight_bytes)
    yield _measuring("verify", spec.evaluation, [original, shape], facts)
    yield _stage("report", 0, _MIB, 0.5)


def _stage(name: str, memory: int, disk: int, seconds: float, output: int | None = None) -> StagePlan:
    return StagePlan(
        name=name,
        peak_memory_bytes=INTERPRETER_BYTES + memory,
        disk_bytes=disk,
        seconds=round(seconds, 1),
        output_bytes=output,
    )


def _measuring(name: str, evaluation: Evaluation, models: list[Shape], facts: ModelFacts) -> StagePlan:
    """Models run in processes of their own, all at once; without a comparison only the last is reloaded."""
    running = models if evaluation.enabled else models[-1:]
    if name == "baseline" and not evaluation.enabled:
        return _stage(name, 0, 0, 0.1)
    if facts.preprocessing is not None:
        return _measuring_images(name, evaluation, running, facts)
    window = min(evaluation.sequence_length, facts.max_positions) if evaluation.enabled else RELOAD_TOKENS
    logits = LOGITS_COPIES * 4 * window * outputs_per_token(facts)
    memory = sum(INTERPRETER_BYTES + loaded_bytes(shape) for shape in running) + logits
    tokens = _tokens_measured(evaluation, facts, window) if evaluation.enabled else window
    seconds = sum(
        PROCESS_SECONDS + 2 * shape.dense_parameters * facts.active_share() * tokens / FLOPS_PER_SECOND
        for shape in running
    )
    return _stage(name, memory, 0, seconds)


def _tokens_measured(evaluation: Evaluation, facts: ModelFacts, window: int) -> int:
    """A classifier's own dataset is taken to be texts with labels, of usual length."""
    has_labels = facts.num_labels is not None and evaluation.text.dataset is not None
    tokens = evaluation.texts * min(window, LABELLED_TOKENS) if has_labels else evaluation.tokens
    return tokens + evaluation.latency_rounds * LATENCY_TOKENS


def _measuring_images(
    name: str, evaluation: Evaluation, running: list[Shape], facts: ModelFacts
) -> StagePlan:
    """The same on images, which baseline leaves on disk as the model will see them."""
    images = evaluation.images if evaluation.enabled else 1
    kept = images * image_bytes(facts) if name == "baseline" else 0
    batch = image_activations(facts, IMAGES_AT_ONCE)
    memory = sum(INTERPRETER_BYTES + loaded_bytes(shape) + batch for shape in running)
    runs = images + evaluation.latency_rounds * (IMAGES_AT_ONCE + 1)
    seconds = sum(
        PROCESS_SECONDS + runs * image_flops(facts, shape.dense_parameters) / FLOPS_PER_SECOND
        for shape in running
    )
    return _stage(name, memory, kept, seconds)


def _smaller_batches(spec: CompressionSpec) -> Iterator[CompressionSpec]:
    return _halved_in_training(spec, "batch_size", 1)


def _shorter_sequences(spec: CompressionSpec) -> Iterator[CompressionSpec]:
    return _halved_in_training(spec, "sequence_length", 64)


def _halved_in_training(spec: CompressionSpec, field: str, least: int) -> Iterator[CompressionSpec]:
    while any(isinstance(s, TextTraining) and getattr(s, field) // 2 >= least for s in spec.steps):
        steps = tuple(
            step.model_copy(update=_halved(step, field, least)) if isinstance(step, TextTraining) else step
            for step in spec.steps
        )
        spec = spec.model_copy(update={"steps": steps})
        yield spec


def _halved(step: TextTraining, field: str, least: int) -> dict[str, int]:
    halved = {field: max(least, getattr(step, field) // 2)}
    if field == "batch_size" and step.batch_size > 1:
        # As many sequences a step as were asked for, only not at once.
        halved["gradient_accumulation"] = step.gradient_accumulation * step.batch_size // halved[field]
    return halved


def _shorter_windows(spec: CompressionSpec) -> Iterator[CompressionSpec]:
    while spec.evaluation.enabled and spec.evaluation.sequence_length // 2 >= 64:
        shorter = {"sequence_length": spec.evaluation.sequence_length // 2}
        spec = spec.model_copy(update={"evaluation": spec.evaluation.model_copy(update=shorter)})
        yield spec


def _no_evaluation(spec: CompressionSpec) -> Iterator[CompressionSpec]:
    if spec.evaluation.enabled:
        acceptance = spec.acceptance.model_copy(
            update={name: None for name in spec.acceptance.limits() if not name.startswith("max_bytes")}
        )
        off = spec.evaluation.model_copy(update={"enabled": False})
        yield spec.model_copy(update={"evaluation": off, "acceptance": acceptance})
