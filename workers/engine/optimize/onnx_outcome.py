"""Say what became of every layer, what each variant measured, and what to beware of."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from app.spec.architectures import block_index, is_compressible
from app.spec.optimize import OptimizeOnnx
from app.spec.report import LayerOutcome
from workers.engine.checkpoint.layout import TensorEntry
from workers.engine.export.onnx_int8 import Quantized
from workers.engine.optimize.onnx_contest import Times, speed_ratio
from workers.engine.optimize.onnx_variants import LEAST_COSINE, Variant
from workers.engine.technique import StepOutcome

# On a quiet machine the median of rounds is a few percent above the fastest.
_UNEVEN = 1.5


def describe(
    spec: OptimizeOnnx,
    variants: Sequence[Variant],
    kept: Variant,
    times: Times,
    layers: tuple[LayerOutcome, ...],
) -> StepOutcome:
    """The outcome of the step: `torch` and every variant have their times, sizes and agreement in the metrics."""
    metrics: dict[str, float | int | str | None] = {"kept": kept.name, "torch_ms": median(times["torch"])}
    for variant in variants:
        metrics |= {
            f"{variant.name}_ms": median(times[variant.name]),
            f"{variant.name}_time_ratio": speed_ratio(times[variant.name], times["torch"]),
            f"{variant.name}_bytes": variant.bytes,
            f"{variant.name}_load_ms": variant.load_ms,
            f"{variant.name}_max_difference": variant.difference,
            f"{variant.name}_cosine": variant.cosine,
        }
    curves = {
        f"{name}_ms": tuple((float(number), ms) for number, ms in enumerate(samples))
        for name, samples in times.items()
    }
    return StepOutcome(
        layers=layers, metrics=metrics, curves=curves, warnings=_warnings(spec, variants, kept, times)
    )


def layer_outcomes(
    tensors: Sequence[TensorEntry], kept: Variant, reason: str, *, base_prefix: str
) -> tuple[LayerOutcome, ...]:
    """One outcome for each compressible layer; `reason` is why a float graph was kept, if one was.

    A layer that the graph has in no form known to us is untouched, and says so.
    """
    by_name = {name.removeprefix(base_prefix): quantized for name, quantized in kept.quantized.items()}
    found: list[LayerOutcome] = []
    for entry in tensors:
        if is_compressible(entry.name, entry.shape):
            quantized = by_name.get(entry.name.removeprefix(base_prefix))
            why = "the graph holds no product with this weight" if kept.quantized else reason
            found.append(_outcome(entry, quantized, why))
    return tuple(found)


def why_not_int8(spec: OptimizeOnnx, variants: Sequence[Variant], kept: Variant, times: Times) -> str:
    """Why the layers stay in float32, for the report of each of them."""
    if spec.quantization == "none":
        return 'quantization is "none" in the spec'
    reasons = []
    for variant in variants:
        if variant.quantized and not variant.is_accurate:
            reasons.append(f"{variant.name}: mean cosine {variant.cosine:.3f}, below {LEAST_COSINE}")
        elif variant.quantized:
            reasons.append(f"{variant.name} measured no faster: {_against(variant, kept, times)}")
    return "; ".join(reasons)


def _outcome(entry: TensorEntry, quantized: Quantized | None, reason: str) -> LayerOutcome:
    return LayerOutcome(
        name=entry.name,
        action="untouched" if quantized is None else "quantized",
        reason=reason if quantized is None else None,
        parameters=entry.fact.elements,
        bits=quantized.bits if quantized else None,
        relative_error=quantized.relative_error if quantized else None,
    )


def _warnings(
    spec: OptimizeOnnx, variants: Sequence[Variant], kept: Variant, times: Times
) -> tuple[str, ...]:
    of_variants = [
        _about_int8(variant, kept, times)
        if variant.quantized
        else _about_optimized(spec, variant, kept, times)
        for variant in variants[1:]
    ]
    warnings = [warning for warning in of_variants if warning]
    if kept.name == "int8":
        warnings.append("on x86 processors without VNNI, int8 products can saturate: check quality there")
    if kept.quantized and all(block_index(name) is not None for name in kept.quantized):
        warnings.append("layers outside the blocks (heads, poolers) stay in float32")
    return (*warnings, *_about_times(kept, times))


def _about_times(kept: Variant, times: Times) -> list[str]:
    warnings = []
    best, baseline = median(times[kept.name]), median(times["torch"])
    if best > baseline:
        warnings.append(
            f"onnxruntime is no faster than PyTorch here: {best:.1f} ms against {baseline:.1f} ms"
        )
    uneven = max(median(samples) / min(samples) for samples in times.values())
    if uneven > _UNEVEN:
        warnings.append(
            f"the machine did other work meanwhile: a median is {uneven:.1f} times the fastest round; the choice was"
            " made by paired rounds, but single times are not to be relied on"
        )
    return warnings


def _about_int8(variant: Variant, kept: Variant, times: Times) -> str:
    if not variant.is_accurate:
        return (
            f"{variant.name} was left out although it ran in {median(times[variant.name]):.1f} ms: its outputs have a"
            f" mean cosine of {variant.cosine:.3f} with the original's"
        )
    return "" if variant is kept else f"{variant.name} was left out: {_against(variant, kept, times)}"


def _about_optimized(spec: OptimizeOnnx, variant: Variant, kept: Variant, times: Times) -> str:
    if variant is not kept:
        return (
            f"graph optimization at level {spec.graph_optimization} was left out: {_against(variant, kept, times)};"
            " onnxruntime does the same whenever it loads the file"
            if not kept.quantized
            else ""
        )
    if spec.graph_optimization == "all":
        return (
            "the graph has layouts specific to this worker's processor: elsewhere it may be slow or refused"
        )
    return ""


def _against(variant: Variant, kept: Variant, times: Times) -> str:
    """What was measured, e.g. `1.12 of the time of exported, round by round (medians 12.3 and 11.0 ms)`."""
    mine, best = times[variant.name], times[kept.name]
    return (
        f"{speed_ratio(mine, best):.2f} of the time of {kept.name}, round by round"
        f" (medians {median(mine):.1f} and {median(best):.1f} ms)"
    )
