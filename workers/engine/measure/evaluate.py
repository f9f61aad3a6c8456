"""Measure an original and its result: the same text, window by window in turns, each in a process of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from app.spec.facts import ModelFacts
from app.spec.report import Comparison, Measurement
from workers.engine.measure.inputs import load_inputs
from workers.engine.measure.latency import (
    LatencyInTurns,
    TimedRun,
    ratio_interval,
    rounds_in_all,
    timed_image_runs,
    timed_runs,
)
from workers.engine.measure.quality import Quality, quality_for
from workers.engine.measure.results import Evaluated, Pair, Prepared, Progress, RunnerFacts, Verification
from workers.engine.measure.runner_client import RunnerClient
from workers.engine.measure.size import Size, measure_size
from workers.engine.measure.verify import Models, check_finite, verify_export
from workers.engine.measure.windows import load_windows

# Shares of the progress bar; loading and a window's pass take about as long as these say on small models.
_LOADED, _QUALITY_DONE = 0.2, 0.75


def check_original(
    original: Path, prepared: Prepared, *, work: Path, device: str, threads: int, progress: Progress
) -> dict[str, Any]:
    """Load the original and run one window, before hours are spent on it; returns metrics for the stage.

    Raises JobFailed (`original_is_broken`) when it does not load, lacks weights, or gives NaN.
    """
    with RunnerClient(original, role="original", device=device, threads=threads) as model:
        progress(0.1, "loading the original")
        facts = model.ready()
        progress(0.6, "trying the original")
        check_finite(model, prepared.windows_file, 0, work / "original.raw")
        metrics = {"load_seconds": round(facts.load_seconds, 3), "peak_memory_bytes": model.peak_memory()}
    (work / "original.raw").unlink()
    return metrics


def evaluate(pair: Pair, facts: ModelFacts, prepared: Prepared | None) -> Evaluated:
    """Verify the exported files and, with `prepared` text, compare them with the original.

    `facts` are the original's. Without `prepared` (evaluation disabled) sizes are measured and the files verified, no
    more. Raises VerificationFailed when the result cannot be trusted at all.
    """
    with (
        RunnerClient(pair.original, role="original", device=pair.device, threads=pair.threads) as original,
        RunnerClient(pair.result, role="result", device=pair.device, threads=pair.threads) as result,
    ):
        models = (original, result)
        # While both load.
        sizes = measure_size(pair.original), measure_size(pair.result)
        pair.progress(0.02, "sizes measured")
        verification = verify_export(pair, models, facts, prepared)
        pair.progress(_LOADED, "files verified in a fresh process")
        if prepared is None:
            return _verified_only(sizes, verification)
        return compare(pair, prepared, models, sizes, verification)


def compare(
    pair: Pair, prepared: Prepared, models: Models, sizes: tuple[Size, Size], verification: Verification
) -> Evaluated:
    """Measure quality, speed and memory of two loaded models."""
    quality = quality_for(prepared, pair)
    for done, count in _add_windows(pair, prepared, models, quality):
        share = _LOADED + (_QUALITY_DONE - _LOADED) * done / count
        pair.progress(share, f"window {done} of {count}")
    latency = _time_in_turns(pair, prepared, models, verification)
    peaks = tuple(model.peak_memory() for model in models)
    original, result = (
        _measurement(size, facts).model_copy(
            update={
                "quality": quality.absolute(index),
                "latency": latency.result(index),
                "peak_memory_bytes": peaks[index],
            }
        )
        for index, (size, facts) in enumerate(
            zip(sizes, (verification.original, verification.result), strict=True)
        )
    )
    return Evaluated(
        original=original,
        result=result,
        comparison=_comparison(original, result, quality),
        verification=verification,
        text=prepared.text,
        images=prepared.images,
        vocabulary=quality.vocabulary,
        non_finite_windows=quality.non_finite,
    )


def _verified_only(sizes: tuple[Size, Size], verification: Verification) -> Evaluated:
    return Evaluated(
        original=_measurement(sizes[0], verification.original),
        result=_measurement(sizes[1], verification.result),
        comparison=None,
        verification=verification,
        text=None,
    )


def _add_windows(
    pair: Pair, prepared: Prepared, models: Models, quality: Quality
) -> Iterator[tuple[int, int]]:
    """Run both models on each window in turns, and count what they give; yields (windows done, windows)."""
    windows = load_inputs(prepared.windows_file)
    targets = pair.work / "original.raw", pair.work / "result.raw"
    for index, window in enumerate(windows):
        original = check_finite(models[0], prepared.windows_file, index, targets[0])
        result, finite = models[1].outputs(prepared.windows_file, index, targets[1])
        quality.add(window, original, result, finite=finite)
        yield index + 1, len(windows)


def _time_in_turns(
    pair: Pair, prepared: Prepared, models: Models, verification: Verification
) -> LatencyInTurns:
    latency = LatencyInTurns(_runs_to_time(prepared, verification), models)
    count = rounds_in_all(pair.latency_rounds)
    for done in latency.rounds(pair.latency_rounds):
        share = _QUALITY_DONE + (1 - _QUALITY_DONE) * done / count
        pair.progress(share, f"latency round {done} of {count}")
    return latency


def _runs_to_time(prepared: Prepared, verification: Verification) -> tuple[TimedRun, ...]:
    if prepared.images is not None:
        return timed_image_runs(prepared.windows_file, prepared.images)
    stream = np.concatenate(load_windows(prepared.windows_file))
    # No longer than a window: the model may not take more.
    tokens = stream[: max(len(window) for window in load_windows(prepared.windows_file))].tolist()
    caches = verification.original.caches and verification.result.caches
    return timed_runs(prepared.kind, tokens, caches=caches)


def _measurement(size: Size, facts: RunnerFacts) -> Measurement:
    return Measurement(
        runtime=facts.runtime,
        bytes=size.bytes,
        files=size.files,
        weight_bytes=size.weight_bytes,
        components=size.components,
        parameters=size.parameters,
        low_bit_parameters=size.low_bit_parameters,
        bits_per_weight=size.bits_per_weight,
        zero_share=size.zero_share,
    )


def _comparison(original: Measurement, result: Measurement, quality: Quality) -> Comparison:
    before, after = original.latency[0], result.latency[0]
    memory = original.peak_memory_bytes, result.peak_memory_bytes
    return Comparison(
        bytes_ratio=result.bytes / original.bytes,
        latency_ratio=after.median_ms / before.median_ms,
        latency_ratio_interval=ratio_interval(before, after),
        peak_memory_ratio=memory[1] / memory[0] if memory[0] and memory[1] else None,
        **quality.relative(),
    )
