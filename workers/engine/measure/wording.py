"""How the report's page words and formats what it shows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from app.spec.report import Flag, FlagCode, Limit, Report

Tone = Literal["good", "bad", "warn", "plain"]


@dataclass(frozen=True)
class VerdictWords:
    """How the page words a verdict."""

    title: str
    reason: str
    tone: Tone


_FLAGS: dict[FlagCode, tuple[str, Tone]] = {
    "nan": ("Outputs are not numbers", "bad"),
    "degenerate_output": ("Worthless output", "bad"),
    "quality_loss": ("Quality was lost", "warn"),
    "fake_quant": ("Quantized in name only", "bad"),
    "larger_than_original": ("No smaller", "bad"),
    "no_speedup": ("No faster", "warn"),
    "dense_zeros": ("Zeros are stored", "warn"),
    "layers_skipped": ("Layers were skipped", "warn"),
    "tied_weights_broken": ("Shared weights were doubled", "warn"),
    "tokenizer_changed": ("Tokenizer changed", "bad"),
    "evaluation_overlap": ("Tested on what it was taught", "warn"),
    "calibration_short": ("Calibrated on too little text", "warn"),
    "calibration_language": ("Calibrated on text the tokenizer is not made for", "warn"),
    "zero_channels": ("Channels without weights", "warn"),
    "dead_inputs": ("Inputs that calibration never reached", "warn"),
    "builtin_text": ("Built-in text", "plain"),
}

_LIMITS: dict[str, str] = {
    "max_perplexity_increase": "Perplexity increase, at most",
    "max_kl": "Mean KL divergence, at most",
    "min_top1_agreement": "Same first choice, at least",
    "max_accuracy_drop": "Accuracy lost, at most",
    "min_cosine": "Cosine of embeddings, at least",
    "max_bytes": "Size, at most",
    "max_bytes_ratio": "Size of the original, at most",
    "max_latency_ratio": "Latency of the original, at most",
    "max_peak_memory_ratio": "Peak memory of the original, at most",
}
_SHARES = ("max_perplexity_increase", "min_top1_agreement", "max_accuracy_drop")


def verdict(report: Report) -> VerdictWords:
    """The verdict, and in one sentence what it rests on."""
    if report.verdict == "unmeasured":
        reason = "Evaluation was disabled: the files load and run, their quality is unknown."
        return VerdictWords("Unmeasured", reason, "warn")
    if report.verdict == "accepted":
        held = [limit for limit in report.limits if limit.measured is not None]
        kept = (
            "The result keeps every limit of the spec."
            if held
            else "No limit of the spec applies to this model."
        )
        bare = "The spec sets no limits: read what follows before you use the result."
        return VerdictWords("Accepted", kept if report.limits else bare, "good")
    missed = [_missed(limit) for limit in report.limits if not limit.ok]
    reason = f"Missed: {'; '.join(missed)}." if missed else "The output is worthless."
    return VerdictWords("Rejected", f"{reason} The files are kept.", "bad")


def _missed(held: Limit) -> str:
    shown = limit(held)
    title = shown["title"][0].lower() + shown["title"][1:]
    return f"{title} {shown['wanted']} (measured: {shown['measured']})"


def flag(found: Flag) -> dict[str, str]:
    """A flag with its title and tone."""
    title, tone = _FLAGS[found.code]
    if found.code == "quality_loss" and not found.detail.startswith("Noticeable"):
        tone = "bad"
    return {"title": title, "tone": tone, "detail": found.detail, "code": found.code}


def limit(held: Limit) -> dict[str, str]:
    """A limit as the page shows it."""
    state = "not applicable" if held.ok and held.measured is None else "met" if held.ok else "missed"
    tones = {"not applicable": "plain", "met": "good", "missed": "bad"}
    return {
        "title": _LIMITS[held.name],
        "wanted": _limit_value(held.name, held.wanted),
        "measured": "–" if held.measured is None else _limit_value(held.name, held.measured),
        "state": state,
        "tone": tones[state],
        "note": held.note or "",
    }


def _limit_value(name: str, number: float) -> str:
    if name == "max_bytes":
        return size(number)
    if name in _SHARES:
        return f"{number:.2%}"
    return times(number) if name.endswith("_ratio") else f"{number:.4f}"


def times(ratio: float) -> str:
    """A ratio: `0.61×`."""
    return f"{ratio:.3f}×" if ratio < 0.1 else f"{ratio:.2f}×"


def size(number: float) -> str:
    """Bytes in the decimal unit that gives at most four digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} B" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.2f} TB"


def seconds(number: float) -> str:
    """A duration in the unit a reader would choose."""
    if number < 1:
        return f"{number * 1000:.0f} ms"
    if number < 120:
        return f"{number:.1f} s"
    return f"{number // 60:.0f} min {number % 60:.0f} s"


def count(number: float) -> str:
    """A number of things, with separators."""
    return f"{number:,.0f}"


def value(something: float | str | None) -> str:
    """A metric of a step: numbers to four digits, others as they are."""
    if something is None:
        return "–"
    if isinstance(something, str):
        return something
    return f"{something:,}" if isinstance(something, int) else f"{something:.4g}"


def words(name: str) -> str:
    """An identifier as words."""
    return name.replace("_", " ")


def machine(name: str, something: Any) -> str:
    """A fact of the machine; memory in gigabytes."""
    return size(something) if name.endswith("_bytes") else str(something)
