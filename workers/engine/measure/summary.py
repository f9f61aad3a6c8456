"""The page's headline and its table of before, after and change."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from app.spec.report import Comparison, Latency, Report
from workers.engine.measure.latency import ratio_interval
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
    if report.uploaded_bytes is not None:
        what = f"the uploaded {report.uploaded_dtype} file, which unpacks to {size(original.bytes)}"
        figures = [(times(result.weight_bytes / report.uploaded_bytes), what), *figures]
    if comparison is None:
        return figures
    figures += _quality_figures(report, comparison)
    if comparison.latency_ratio is not None:
        interval = ratio_interval(original.latency[0], result.latency[0])
        unsure = "; the difference may be noise" if interval[0] <= 1 <= interval[1] else ""
        figures.append((times(comparison.latency_ratio), f"the time: {original.latency[0].what}{unsure}"))
    if comparison.peak_memory_ratio is not None:
        figures.append((times(comparison.peak_memory_ratio), "the peak memory"))
    return figures


def _quality_figures(report: Report, comparison: Comparison) -> Iterator[tuple[str, str]]:
    if comparison.perplexity_ratio is not None:
        yield f"{comparison.perplexity_ratio - 1:+.1%}", "perplexity"
    if comparison.accuracy_change is not None:
        before, after = (m.quality["top1_accuracy"] for m in (report.original, report.result))
        yield f"{after:.1%}", f"accuracy, was {before:.1%}"
    if comparison.cosine_mean is not None:
        yield f"{comparison.cosine_mean:.3f}", "mean cosine of the embeddings to the original's"
    elif comparison.top1_agreement is not None:
        yield f"{comparison.top1_agreement:.1%}", "same first choice as the original"


def summary_rows(report: Report) -> list[Row]:
    """The whole table."""
    rows = [*_size_rows(report)]
    if report.comparison is not None:
        rows += [*_quality_rows(report, report.comparison), *_speed_rows(report)]
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
    yield from _accuracy_rows(report, comparison)
    if comparison.kl_mean is not None:
        detail = f"median {comparison.kl_median:.4f}, 99th percentile {comparison.kl_p99:.3f}, max {comparison.kl_max:.2f}"
        yield Row(
            "KL divergence, mean", f"nats from the original; {detail}", "0", f"{comparison.kl_mean:.4f}", ""
        )
    shares = (
        ("Same first choice", "as the original", comparison.top1_agreement),
        ("Cosine of embeddings, mean", "1: the same direction", comparison.cosine_mean),
        ("Cosine of embeddings, worst text", "", comparison.cosine_min),
        ("Rank correlation", "of the similarities between texts", comparison.rank_correlation),
    )
    for label, note, value in shares:
        if value is not None:
            is_share = value is comparison.top1_agreement
            yield Row(
                label, note, "100%" if is_share else "1", f"{value:.1%}" if is_share else f"{value:.4f}", ""
            )
    if comparison.answer_flips is not None:
        what = "classes" if comparison.accuracy_change is not None else "next tokens"
        note = f"right {what} that became wrong"
        yield Row("Answer flips", note, "0", f"{comparison.answer_flips:.1%}", "")


def _perplexity_rows(report: Report, comparison: Comparison) -> Iterator[Row]:
    before, after = (m.quality.get("perplexity") for m in (report.original, report.result))
    if before is None or after is None or comparison.delta_ln_perplexity is None:
        return
    low, high = (_factor(bound) - 1 for bound in comparison.delta_ln_perplexity[1:])
    note = f"lower is better; 95 % interval of the change {low:+.1%} to {high:+.1%}"
    yield _percent_row("Perplexity", note, (before, after), "{:.2f}")
    bits = [m.quality["bits_per_byte"] for m in (report.original, report.result)]
    yield _percent_row("Bits per byte of text", "", (bits[0], bits[1]), "{:.3f}")


def _accuracy_rows(report: Report, comparison: Comparison) -> Iterator[Row]:
    if comparison.accuracy_change is None:
        return
    change, low, high = comparison.accuracy_change
    before, after = (m.quality["top1_accuracy"] for m in (report.original, report.result))
    note = f"label is the first choice; 95 % interval of the change {low:+.1%} to {high:+.1%}"
    tone: Tone = "plain" if low <= 0 <= high else "good" if change > 0 else "bad"
    yield Row("Accuracy", note, f"{before:.1%}", f"{after:.1%}", f"{change:+.1%}", tone)


def _speed_rows(report: Report) -> Iterator[Row]:
    for before, after in zip(report.original.latency, report.result.latency, strict=False):
        yield _latency_row(before, after)
    memory = report.original.peak_memory_bytes, report.result.peak_memory_bytes
    if memory[0] is not None and memory[1] is not None:
        note = "of a process that runs this model alone"
        yield _ratio_row("Peak memory", note, (memory[0], memory[1]), size)


def _latency_row(before: Latency, after: Latency) -> Row:
    low, high = ratio_interval(before, after)
    note = (
        f"median; 95th percentile {_ms(before.p95_ms)} and {_ms(after.p95_ms)}; "
        f"95 % interval of the change {low:.2f} to {high:.2f}"
    )
    label = before.what[0].upper() + before.what[1:]
    row = _ratio_row(label, note, (before.median_ms, after.median_ms), _ms)
    return replace(row, tone="plain") if low <= 1 <= high else row


def _ratio_row(label: str, note: str, pair: tuple[float, float], show: Callable[[float], str]) -> Row:
    ratio = pair[1] / pair[0] if pair[0] else 1.0
    return Row(
        label, note, show(pair[0]), show(pair[1]), "same" if ratio == 1 else times(ratio), _tone(ratio), ratio
    )


def _percent_row(label: str, note: str, pair: tuple[float, float], form: str) -> Row:
    """For small changes, which a ratio would round away."""
    ratio = pair[1] / pair[0]
    return Row(label, note, form.format(pair[0]), form.format(pair[1]), f"{ratio - 1:+.1%}", _tone(ratio))


def _tone(ratio: float) -> Tone:
    if abs(ratio - 1) < _NEGLIGIBLE:
        return "plain"
    return "good" if ratio < 1 else "bad"


def _ms(milliseconds: float) -> str:
    return seconds(milliseconds / 1000) if milliseconds >= 100 else f"{milliseconds:.1f} ms"


def _factor(delta: float) -> float:
    return math.exp(min(delta, 700.0))
