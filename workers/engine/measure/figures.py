"""Which plots a report has, and from which of its numbers they are drawn."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from markupsafe import Markup

from app.spec.architectures import block_index
from app.spec.report import SENSITIVITY, LayerOutcome, Report, StepReport
from workers.engine.measure.plots import Axis, Point, axis_from_zero, scatter, stacked_bars, strips
from workers.engine.measure.size import COMPONENTS
from workers.engine.measure.wording import size, words

_TIMES = "_ms"
_ATTENTION_WORDS = ("attn", "attention")
_KINDS = (("s0", "attention"), ("s1", "feed-forward"))


@dataclass(frozen=True)
class Figure:
    """A plot with its title, what to see in it, and its legend: (style class, words)."""

    title: str
    caption: str
    svg: Markup
    legend: tuple[tuple[str, str], ...] = ()


def figures(report: Report) -> list[Figure]:
    """All plots the report has numbers for."""
    found = [*_sizes(report), *_latencies(report)]
    for step in report.steps:
        found += [*_errors(step), *_curves(step)]
    return found


def _sizes(report: Report) -> Iterator[Figure]:
    measurements = (("original", report.original), ("result", report.result))
    parts = [part for part in COMPONENTS if any(part in m.components for _, m in measurements)]
    if not parts:
        return
    bars = [
        (
            name,
            [
                (
                    COMPONENTS.index(part),
                    m.components[part] / 1e6,
                    f"{name}, {part}: {size(m.components[part])}",
                )
                for part in parts
                if part in m.components
            ],
        )
        for name, m in measurements
    ]
    yield Figure(
        "Size by component",
        "All files, scales and tokenizer included.",
        stacked_bars(bars, axis_from_zero([m.bytes / 1e6 for _, m in measurements], "MB")),
        tuple((f"c{COMPONENTS.index(part)}", part) for part in parts),
    )


def _latencies(report: Report) -> Iterator[Figure]:
    for before, after in zip(report.original.latency, report.result.latency, strict=False):
        rows = [
            ("original", before.samples_ms, before.median_ms),
            ("result", after.samples_ms, after.median_ms),
        ]
        everything = [*before.samples_ms, *after.samples_ms]
        yield Figure(
            f"Latency: {before.what}",
            f"{len(before.samples_ms)} runs each, in turns; the bar is the median.",
            strips(rows, axis_from_zero(everything, "ms")),
        )


def _errors(step: StepReport) -> Iterator[Figure]:
    measured = [layer for layer in step.layers if layer.relative_error is not None]
    if not measured:
        return
    placed = [(_block(layer), layer.relative_error or 0.0, layer) for layer in measured]
    points = [
        Point(block, error, _series(layer.name), f"{layer.name}: {error:.4f}")
        for block, error, layer in placed
    ]
    yield Figure(
        f"Error of each layer: {step.technique}",
        "How far the weights moved, relative to their size. The line joins the blocks' medians.",
        scatter(
            points,
            _blocks_axis([block for block, _, _ in placed]),
            axis_from_zero([error for _, error, _ in placed], "relative error"),
            line=_medians([(block, error) for block, error, _ in placed]),
        ),
        _KINDS,
    )


def _curves(step: StepReport) -> Iterator[Figure]:
    timed = {name: [y for _, y in curve] for name, curve in step.curves.items() if name.endswith(_TIMES)}
    if timed:
        rows = [
            (words(name.removesuffix(_TIMES)), times, median(times)) for name, times in timed.items() if times
        ]
        everything = [time for _, times, _ in rows for time in times]
        caption = "All that were tried, in turns; the bar is the median."
        axis = axis_from_zero(everything, "ms")
        yield Figure(f"Time of each variant: {step.technique}", caption, strips(rows, axis))
    sensitivities = {
        name.removeprefix(SENSITIVITY): curve
        for name, curve in step.curves.items()
        if name.startswith(SENSITIVITY)
    }
    if sensitivities:
        yield _sensitivity(sensitivities, step.technique)
    for name, curve in step.curves.items():
        if len(curve) >= 2 and name not in timed and not name.startswith(SENSITIVITY):
            yield _curve(name, curve, step.technique)


def _sensitivity(curves: Mapping[str, Sequence[tuple[float, float]]], technique: str) -> Figure:
    """All layers in one plot: by powers of ten, for the most sensitive ones are thousands of times above others."""
    points = [
        Point(x, math.log10(y), _series(name), f"{name} at {x:g}: {y:.3g} nats a token")
        for name, curve in curves.items()
        for x, y in curve
        if y > 0
    ]
    heights = [point.y for point in points] or [0.0]
    y_axis = Axis(math.floor(min(heights)), math.floor(max(heights)) + 1, "log10 of nats a token")
    plot = scatter(points, Axis(0.0, 1.0, "sparsity of the layer alone"), y_axis)
    caption = "What the loss is predicted to grow by when one layer alone is pruned."
    return Figure(f"Sensitivity: {technique}", caption, plot, _KINDS)


def _curve(name: str, curve: Sequence[tuple[float, float]], technique: str) -> Figure:
    axis = "block" if name.startswith("block") else "step"
    highest, lowest = max(y for _, y in curve), min(y for _, y in curve)
    y_axis = Axis(min(0.0, lowest), highest * 1.06 if highest > 0 else 1.0, words(name))
    points = [Point(x, y, 0, f"{axis} {x:g}: {y:.4g}") for x, y in curve]
    x_axis = Axis(curve[0][0], curve[-1][0], axis)
    plot = scatter(points, x_axis, y_axis, line=curve)
    return Figure(f"{words(name).capitalize()}: {technique}", "", plot)


def _block(layer: LayerOutcome) -> int:
    return block_index(layer.name.removesuffix(".weight") + ".weight") or 0


def _series(layer: str) -> int:
    return 0 if any(word in layer for word in _ATTENTION_WORDS) else 1


def _blocks_axis(blocks: Sequence[int]) -> Axis:
    return Axis(min(blocks) - 0.5, max(blocks) + 0.5, "block")


def _medians(placed: Sequence[tuple[int, float]]) -> list[tuple[float, float]]:
    blocks = sorted({block for block, _ in placed})
    return [(block, median(error for b, error in placed if b == block)) for block in blocks]
