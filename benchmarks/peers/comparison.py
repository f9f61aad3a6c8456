"""Figures of ours beside figures of peers, and the floors they must keep."""

from __future__ import annotations

from dataclasses import dataclass, replace

from figures import Figures

from .catalogue import PRUNING
from .runs import Outcome

TIMED_AGAINST = ("llmcompressor-gptq", "llmcompressor-sparsegpt")
"""The method whose time and memory ours must halve."""
# A tensor of shapes or of zero points beside the scales: no more than this is called equal bits.
_SAME_BITS = 1.01
_MIB = 2**20


@dataclass(frozen=True)
class Bar:
    """A limit on ours over theirs."""

    limit: float
    strict: bool = False

    def __str__(self) -> str:
        return f"ratio {'<' if self.strict else '<='} {self.limit:g}"

    def met(self, ours: float, theirs: float) -> bool:
        """Whether our value keeps the limit. Written so that it is right for a negative value of theirs."""
        return ours < self.limit * theirs if self.strict else ours <= self.limit * theirs


def mean_of(first: Outcome, second: Outcome) -> Outcome:
    """One outcome for two runs of one job: the mean of their times, the larger of their peaks."""
    return replace(
        first,
        seconds=(first.seconds + second.seconds) / 2,
        processor_seconds=(first.processor_seconds + second.processor_seconds) / 2,
        peak_rss_bytes=max(first.peak_rss_bytes, second.peak_rss_bytes),
    )


def describe(figures: Figures, title: str, outcome: Outcome) -> None:
    """Everything measured of one method, without a floor."""
    quality = outcome.quality
    about = f"{_named(outcome)} {outcome.version}"
    interval = f"95 % within {quality.delta_ln_perplexity_low:.4f} to {quality.delta_ln_perplexity_high:.4f}"
    for name, value, unit, compared_with in (
        ("kl", quality.kl_mean, "nats, mean", "the original in float32"),
        ("delta_ln_ppl", quality.delta_ln_perplexity, "nats", f"the original in float32, {interval}"),
        ("perplexity", quality.perplexity, "", f"{quality.original_perplexity:.4f} of the original"),
        ("top1_agreement", quality.top1_agreement, "share", "the original in float32"),
        ("bits_per_weight", outcome.bits_per_weight, "bits", "all stored for linear layers in blocks"),
        ("seconds", outcome.seconds, "s", "wall"),
        ("processor_seconds", outcome.processor_seconds, "s", "user + system"),
        ("peak_rss", outcome.peak_rss_bytes / _MIB, "MiB", "VmHWM"),
    ):
        figures.add(f"{title}_{outcome.name}_{name}", value, unit, compared_with=f"{compared_with}; {about}")


def compare(figures: Figures, title: str, ours: Outcome, theirs: Outcome, *, case: str | None) -> None:
    """Ours beside theirs. `case` is named where ours is the setting that must beat theirs, and floors hold."""
    bars = _bars(case, ours, theirs)
    for name, unit in (
        ("kl", "nats"), ("delta_ln_ppl", "nats"), ("seconds", "s"), ("processor_seconds", "s"), ("peak_rss", "MiB"),
    ):  # fmt: skip
        mine, other = _value(ours, name), _value(theirs, name)
        bar = bars.get(name)
        figures.add_against_peer(
            f"{title}_{ours.name}_vs_{theirs.name}_{name}",
            mine,
            unit,
            peer=_named(theirs),
            peer_version=theirs.version,
            peer_value=other,
            floor=None if bar is None else str(bar),
            ok=bar is None or bar.met(mine, other),
        )


def compare_best(figures: Figures, title: str, ours: list[Outcome], theirs: list[Outcome]) -> None:
    """The lowest KL of ours against the lowest of all peers that ran; won only if ours stores no more bits."""
    best, rival = (min(outcomes, key=lambda outcome: outcome.quality.kl_mean) for outcomes in (ours, theirs))
    bar = Bar(1.0, strict=True)
    as_small = best.bits_per_weight <= _SAME_BITS * rival.bits_per_weight
    figures.add_against_peer(
        f"{title}_lowest_kl",
        best.quality.kl_mean,
        f"nats ({best.name})",
        peer=f"{_named(rival)}, lowest of {len(theirs)}",
        peer_version=rival.version,
        peer_value=rival.quality.kl_mean,
        floor=f"{bar}, at no more bits: {best.bits_per_weight:.2f} against {rival.bits_per_weight:.2f}",
        ok=as_small and bar.met(best.quality.kl_mean, rival.quality.kl_mean),
    )


def _bars(case: str | None, ours: Outcome, theirs: Outcome) -> dict[str, Bar]:
    """The floors of one comparison; at 2 and 3 bits there is one, on the lowest KL of all (compare_best)."""
    if case == "w8a8":
        return {"kl": Bar(1.0)} if theirs.name.startswith("llmcompressor") else {}
    if case in PRUNING:
        bars = {"delta_ln_ppl": Bar(1.0)}
        return bars | {"seconds": Bar(0.5), "peak_rss": Bar(0.5)} if theirs.name in TIMED_AGAINST else bars
    if case != "int4":
        return {}
    bars = {"kl": Bar(1.0, strict=True), "delta_ln_ppl": Bar(1.0, strict=True)}
    if theirs.name in TIMED_AGAINST:
        bars |= {"seconds": Bar(0.5), "peak_rss": Bar(0.5)}
    if ours.name.startswith("ours-tuned"):
        # It may take as long as what it is compared with, no longer.
        bars |= {"seconds": Bar(1.0)}
    return bars


def _value(outcome: Outcome, name: str) -> float:
    values = {
        "kl": outcome.quality.kl_mean,
        "delta_ln_ppl": outcome.quality.delta_ln_perplexity,
        "seconds": outcome.seconds,
        "processor_seconds": outcome.processor_seconds,
        "peak_rss": outcome.peak_rss_bytes / _MIB,
    }
    return values[name]


def _named(outcome: Outcome) -> str:
    return f"{outcome.name} (an earlier run)" if outcome.reused else outcome.name
