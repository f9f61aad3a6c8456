"""The page's headline and its table of before, after and change."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from app.spec.report import Comparison, Latency, Report
from workers.engine.measure.wording import Tone, count, seconds, size, times

# Smaller changes than this are shown without a colour.
_NEGLIGIBLE = 0.03


@dataclass(frozen=True)
class Row:
    """One line of the table; `share` is the ratio that its bar shows."""

    label: str
    note: str
    before: str
    after: str
    change: str
    tone: Tone = "plain"
    share: float | None = None


def headline(report: Report) -> list[tuple[str, str]]:
    """The three or four figures a reader wants first: (figure, what it is)."""
    original, result, comparison = report.original, report.result, report.comparison
    figures = [
        (times(result.bytes / original.bytes), f"the size: {size(result.bytes)}, was {size(original.bytes)}")
    ]
    if comparison is None:
        return figures
    if comparison.perplexity_ratio is not None:
        figures.append((f"{comparison.perplexity_ratio - 1:+.1%}", "perplexity"))
    if comparison.cosine_mean is not None:
        figures.append((f"{comparison.cosine_mean:.3f}", "mean cosine of the embeddings to the original's"))
    elif comparison.top1_agreement is not None:
        figures.append((f"{comparison.top1_agreement:.1%}", "same first choice as the original"))
    if comparison.latency_ratio is not None:
        figures.append((times(comparison.latency_ratio), f"the time: {original.latency[0].what}"))
    if comparison.peak_memory_ratio is not None:
        figures.append((times(comparison.peak_memory_ratio), "the peak memory"))
    return figures


def summary_rows(report: Report) -> list[Row]:
    """The whole table."""
    rows = [*_size_rows(report)]
    if report.comparison is not None:
        rows += [*_quality_rows(report, report.comparison), *_speed_rows(report, report.comparison)]
    return rows


def _size_rows(report: Report) -> Iterator[Row]:
    original, result = report.original, report.result
    if report.uploaded_bytes is not None:
        yield _ratio_row(
            f"Weights, against the uploaded {report.uploaded_dtype} file",
            "what you sent, before it was unpacked",
            (report.uploaded_bytes, result.weight_bytes),
            size,
        )
    yield _ratio_row("Size of all files", "", (original.bytes, result.bytes), size)
    yield _ratio_row(
        "Bits per weight",
        "scales, zero points and headers included",
        (original.bits_per_weight, result.bits_per_weight),
        "{:.2f}".format,
    )
    yield _ratio_row(
        "Weights", "numbers the model is made of", (original.parameters, result.parameters), count
    )
    if original.zero_share is not None and result.zero_share is not None:
        before, after = original.zero_share, result.zero_share
        yield Row("Zeros", "share of stored weights", f"{before:.1%}", f"{after:.1%}", "")


def _quality_rows(report: Report, comparison: Comparison) -> Iterator[Row]:
    yield from _perplexity_rows(report, comparison)
    if comparison.kl_mean is not None:
        detail = f"median {comparison.kl_median:.4f}, 99th percentile {comparison.kl_p99:.3f}, max {comparison.kl_max:.2f}"
        yield Row("KL divergence", f"nats from the original; {detail}", "0", f"{comparison.kl_mean:.4f}", "")
    shares = (
        ("Same first choice", "as the original", comparison.top1_agreement),
        ("Cosine of embeddings, mean", "1: the same direction", comparison.cosine_mean),
        ("Cosine of embeddings, worst text", "", comparison.cosine_min),
        ("Rank correlation", "of the similarities between texts", comparison.rank_correlation),
    )
    for label, note, value in shares:
        if value is not None:
            shown = f"{value:.1%}" if value is comparison.top1_agreement else f"{value:.4f}"
            yield Row(label, note, "1", shown, "", _tone(1 / max(value, 1e-9)))
    if comparison.answer_flips is not None:
        note = "right next tokens that became wrong"
        yield Row("Answer flips", note, "0", f"{comparison.answer_flips:.1%}", "")


def _perplexity_rows(report: Report, comparison: Comparison) -> Iterator[Row]:
    before, after = (m.quality.get("perplexity") for m in (report.original, report.result))
    if before is None or after is None or comparison.delta_ln_perplexity is None:
        return
    low, high = (_factor(bound) for bound in comparison.delta_ln_perplexity[1:])
    note = f"lower is better; 95 % interval of the change {low:.3f} to {high:.3f}"
    yield _ratio_row("Perplexity", note, (before, after), "{:.2f}".format)
    bits = [m.quality["bits_per_byte"] for m in (report.original, report.result)]
    yield _ratio_row("Bits per byte of text", "", (bits[0], bits[1]), "{:.3f}".format)


def _speed_rows(report: Report, comparison: Comparison) -> Iterator[Row]:
    interval = comparison.latency_ratio_interval
    for number, (before, after) in enumerate(
        zip(report.original.latency, report.result.latency, strict=False)
    ):
        note = f"median; 95th percentile {_ms(before.p95_ms)} and {_ms(after.p95_ms)}"
        if number == 0 and interval is not None:
            note += f"; 95 % interval of the change {interval[0]:.2f} to {interval[1]:.2f}"
        yield _latency_row(before, after, note)
    memory = report.original.peak_memory_bytes, report.result.peak_memory_bytes
    if memory[0] is not None and memory[1] is not None:
        note = "of a process that runs this model alone"
        yield _ratio_row("Peak memory", note, (memory[0], memory[1]), size)


def _latency_row(before: Latency, after: Latency, note: str) -> Row:
    label = before.what[0].upper() + before.what[1:]
    return _ratio_row(label, note, (before.median_ms, after.median_ms), _ms)


def _ratio_row(label: str, note: str, pair: tuple[float, float], show: Callable[[float], str]) -> Row:
    ratio = pair[1] / pair[0] if pair[0] else 1.0
    return Row(label, note, show(pair[0]), show(pair[1]), times(ratio), _tone(ratio), ratio)


def _tone(ratio: float) -> Tone:
    if abs(ratio - 1) < _NEGLIGIBLE:
        return "plain"
    return "good" if ratio < 1 else "bad"


def _ms(milliseconds: float) -> str:
    return seconds(milliseconds / 1000) if milliseconds >= 100 else f"{milliseconds:.1f} ms"


def _factor(delta: float) -> float:
    return math.exp(min(delta, 700.0))
