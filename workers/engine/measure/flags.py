"""What a reader must know before using a result, in plain words: derived from measurements, never from promises."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from app.spec.compression import CompressionSpec
from app.spec.facts import ModelFacts
from app.spec.report import Comparison, Flag, Latency, StepReport
from workers.engine.measure.coverage import skipped
from workers.engine.measure.latency import ratio_interval
from workers.engine.measure.results import Evaluated

NO_SPEEDUP_RATIO = 0.97
_OVERLAP_SHARE = 0.01
_ZEROS_ADDED = 0.05
_WORST_TOP1_AGREEMENT = 0.1
_PERPLEXITY_WORDS = (
    (2.0, "Severe: the model is likely useless as it is"),
    (1.25, "Large"),
    (1.05, "Noticeable"),
)
_AGREEMENT_WORDS = (
    (0.8, "Severe: the model is likely useless as it is"),
    (0.9, "Large"),
    (0.98, "Noticeable"),
)
_SAME_EMBEDDINGS = 0.999


@dataclass(frozen=True)
class Facts:
    """What flags are derived from."""

    model: ModelFacts
    spec: CompressionSpec
    evaluated: Evaluated
    steps: Sequence[StepReport]


def flags(facts: Facts) -> tuple[Flag, ...]:
    """All flags that apply, the gravest first."""
    return tuple(flag for rule in _RULES for flag in rule(facts))


def _nan(facts: Facts) -> Iterator[Flag]:
    windows = facts.evaluated.non_finite_windows
    if windows:
        detail = f"The result gives NaN or infinity on {windows} windows of the evaluation text; quality was not measured."
        yield Flag(code="nan", detail=detail)


def _degenerate_output(facts: Facts) -> Iterator[Flag]:
    if facts.evaluated.verification.degenerate:
        yield Flag(code="degenerate_output", detail=facts.evaluated.verification.degenerate)
    comparison = facts.evaluated.comparison
    if comparison is None:
        return
    agreement = comparison.top1_agreement
    if agreement is not None and agreement < _WORST_TOP1_AGREEMENT:
        detail = f"Original and result agree on only {agreement:.1%} of their first choices."
        yield Flag(code="degenerate_output", detail=detail)
    similarity = facts.evaluated.result.quality.get("mean_similarity", 0.0)
    if similarity > _SAME_EMBEDDINGS > facts.evaluated.original.quality.get("mean_similarity", 0.0):
        detail = "The result gives nearly the same embedding to every text."
        yield Flag(code="degenerate_output", detail=detail)


def _quality_loss(facts: Facts) -> Iterator[Flag]:
    comparison = facts.evaluated.comparison
    if comparison is not None and (detail := _describe_loss(comparison)):
        yield Flag(code="quality_loss", detail=detail)


def _describe_loss(comparison: Comparison) -> str | None:
    """The first measure that fell by more than a reader would shrug off, in words."""
    ratio = comparison.perplexity_ratio
    if ratio is not None:
        word = next((word for least, word in _PERPLEXITY_WORDS if ratio > least), None)
        return word and f"{word}: perplexity is {ratio:.2f} times the original's."
    for value, what in (
        (comparison.cosine_mean, "the mean cosine between original and new embeddings is {:.3f}"),
        (comparison.top1_agreement, "original and result choose the same class {:.1%} of the time"),
    ):
        if value is not None:
            word = next((word for most, word in _AGREEMENT_WORDS if value < most), None)
            return word and f"{word}: {what.format(value)}."
    return None


def _fake_quant(facts: Facts) -> Iterator[Flag]:
    claimed = sum(
        outcome.parameters
        for step in facts.steps[-1:]
        for outcome in step.layers
        if outcome.action == "quantized"
    )
    stored = facts.evaluated.result.low_bit_parameters
    if claimed > 1.02 * stored:
        detail = f"{claimed:,} weights were quantized, but only {stored:,} are stored in 8 bits or fewer."
        yield Flag(code="fake_quant", detail=detail)


def _larger_than_original(facts: Facts) -> Iterator[Flag]:
    result, original = facts.evaluated.result, facts.evaluated.original
    if result.bytes >= original.bytes:
        detail = f"The result's files have {_mb(result.bytes)}, the original's {_mb(original.bytes)}."
        yield Flag(code="larger_than_original", detail=detail)
    elif facts.model.format == "gguf" and result.weight_bytes >= facts.model.weight_bytes:
        detail = (
            f"The uploaded {facts.model.dtype} GGUF has {_mb(facts.model.weight_bytes)}, the result's weights "
            f"{_mb(result.weight_bytes)}: smaller only than the {_mb(original.bytes)} it unpacks to."
        )
        yield Flag(code="larger_than_original", detail=detail)


def _no_speedup(facts: Facts) -> Iterator[Flag]:
    times = list(zip(facts.evaluated.original.latency, facts.evaluated.result.latency, strict=False))
    if not times or any(_is_faster(before, after) for before, after in times):
        return
    before, after = times[0]
    ratio, (low, high) = after.median_ms / before.median_ms, ratio_interval(before, after)
    if ratio < NO_SPEEDUP_RATIO:
        told = f"The times vary too much to tell ({before.what}"
    else:
        told = f"On this worker it takes {ratio:.2f} times as long as the original ({before.what}"
    detail = f"{told}; 95 % interval {low:.2f} to {high:.2f})."
    if facts.evaluated.verification.result.format in ("compressed-tensors", "bitsandbytes"):
        detail += " Here the weights are unpacked to float32; a runtime with kernels for them, such as vLLM, may be faster."
    if facts.evaluated.verification.result.format == "gguf":
        detail += (
            " Here the weights are unpacked to float32; llama.cpp, which the file is for, was not measured."
        )
    yield Flag(code="no_speedup", detail=detail)


def _is_faster(before: Latency, after: Latency) -> bool:
    """Faster by more than noise explains."""
    return after.median_ms / before.median_ms < NO_SPEEDUP_RATIO and ratio_interval(before, after)[1] < 1


def _dense_zeros(facts: Facts) -> Iterator[Flag]:
    before, after = facts.evaluated.original.zero_share or 0.0, facts.evaluated.result.zero_share
    pruned = any(o.action == "pruned" and o.sparsity is not None for step in facts.steps for o in step.layers)
    if pruned and (after is None or after - before > _ZEROS_ADDED):
        share = "Pruned" if after is None else f"{after:.0%} of the"
        detail = f"{share} weights are zeros that are stored like any other number: they save no bytes by themselves."
        yield Flag(code="dense_zeros", detail=detail)


def _layers_skipped(facts: Facts) -> Iterator[Flag]:
    found = skipped(facts.steps)
    if found:
        names = ", ".join(f"{o.name} ({o.reason or 'no reason given'})" for o in found[:5])
        more = f", and {len(found) - 5} more in the coverage list" if len(found) > 5 else ""
        yield Flag(
            code="layers_skipped", detail=f"{len(found)} layers were left as they were: {names}{more}."
        )


def _tied_weights_broken(facts: Facts) -> Iterator[Flag]:
    before, after = facts.evaluated.verification.original, facts.evaluated.verification.result
    model = facts.model
    head = model.vocab_size * model.hidden_size
    extra = facts.evaluated.result.parameters - facts.evaluated.original.parameters
    twice = after.format == "onnx" and extra > 0.9 * head
    if before.tied and (after.tied is False or twice):
        detail = (
            f"Input and output embeddings were one tensor and are now two: {head:,} weights more to store."
        )
        yield Flag(code="tied_weights_broken", detail=detail)


def _tokenizer_changed(facts: Facts) -> Iterator[Flag]:
    for change in facts.evaluated.verification.tokenizer_changes:
        yield Flag(code="tokenizer_changed", detail=f"The result's tokenizer differs. {change}")
    if facts.evaluated.vocabulary:
        before, after = facts.evaluated.vocabulary
        detail = f"The model gives {after} outputs per position, the original {before}: they cannot be compared one by one."
        yield Flag(code="tokenizer_changed", detail=detail)


def _evaluation_overlap(facts: Facts) -> Iterator[Flag]:
    text = facts.evaluated.text
    if text is not None and text.overlap_share is not None and text.overlap_share >= _OVERLAP_SHARE:
        detail = (
            f"{text.overlap_share:.0%} of the evaluation text also stands in the calibration or training text: "
            "the quality figures flatter the result."
        )
        yield Flag(code="evaluation_overlap", detail=detail)


def _images_overlap(facts: Facts) -> Iterator[Flag]:
    images = facts.evaluated.images
    if images is not None and images.overlap_share is not None and images.overlap_share >= _OVERLAP_SHARE:
        detail = (
            f"{images.overlap_share:.0%} of the images it was judged on are calibration images too: the quality figures may "
            "flatter the result."
        )
        yield Flag(code="evaluation_overlap", detail=detail)


def _found_by_steps(facts: Facts) -> Iterator[Flag]:
    yield from dict.fromkeys(flag for step in facts.steps for flag in step.flags)


def _builtin_text(facts: Facts) -> Iterator[Flag]:
    spec = facts.spec
    if facts.model.preprocessing is not None:
        return
    uses = {
        "quality": spec.evaluation.enabled and spec.evaluation.text.dataset is None,
        "calibration": any(s.needs_calibration for s in spec.steps) and spec.calibration.dataset is None,
        "training": any(s.needs_training for s in spec.steps) and spec.training.dataset is None,
    }
    used = [name for name, is_used in uses.items() if is_used]
    if used:
        detail = f"Built-in English prose was used for {' and '.join(used)}: use your own text for a model of your own purpose."
        yield Flag(code="builtin_text", detail=detail)


def _mb(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


_RULES: tuple[Callable[[Facts], Iterator[Flag]], ...] = (
    _nan,
    _degenerate_output,
    _quality_loss,
    _fake_quant,
    _larger_than_original,
    _no_speedup,
    _dense_zeros,
    _layers_skipped,
    _tied_weights_broken,
    _tokenizer_changed,
    _evaluation_overlap,
    _images_overlap,
    _found_by_steps,
    _builtin_text,
)
