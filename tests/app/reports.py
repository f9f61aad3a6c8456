"""Reports made without a job, for tests of what shows them."""

from __future__ import annotations

from typing import Any

from app.spec.compression import CompressionSpec
from app.spec.quantize import QuantizeWeights
from app.spec.report import Comparison, Coverage, Flag, Latency, Measurement, Report


def measured(size: int, milliseconds: float, **quality: float) -> Measurement:
    """One of the two models of a report."""
    return Measurement(
        runtime="transformers",
        bytes=size,
        files=(),
        weight_bytes=size,
        parameters=size // 2,
        bits_per_weight=16.0,
        quality=quality,
        latency=(
            Latency(what="prefill", median_ms=milliseconds, p95_ms=milliseconds, samples_ms=(milliseconds,)),
        ),
        peak_memory_bytes=1_178_000_000,
    )


def report(original: Measurement, result: Measurement, **compared: Any) -> Report:
    """A report on these two."""
    return Report(
        job_id="job_1",
        created_at="2026-01-01T00:00:00Z",
        modelpress="0.1.0",
        machine={},
        model_name="m",
        architecture="LlamaForCausalLM",
        family="causal_lm",
        spec=CompressionSpec(steps=(QuantizeWeights(),)),
        verdict="rejected",
        flags=(Flag(code="larger_than_original", detail="x"), Flag(code="no_speedup", detail="y")) * 2,
        limits=(),
        original=original,
        result=result,
        comparison=Comparison(bytes_ratio=result.bytes / original.bytes, **compared),
        coverage=Coverage(total=0, compressed=(), untouched=()),
        steps=(),
        stage_seconds={},
    )
