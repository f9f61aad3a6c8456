"""Hold what was measured against the limits of the spec."""

from __future__ import annotations

from collections.abc import Callable

from app.spec.compression import Acceptance
from app.spec.report import Comparison, Flag, Limit, Verdict
from workers.engine.measure.results import Evaluated, Kind

_NAMES: dict[Kind, str] = {
    "causal_lm": "language models",
    "classifier": "classifiers",
    "encoder": "encoders",
    "image_classifier": "image classifiers",
}
_FOR: dict[str, frozenset[Kind]] = {
    "max_perplexity_increase": frozenset({"causal_lm"}),
    "max_kl": frozenset({"causal_lm", "image_classifier"}),
    "min_top1_agreement": frozenset({"causal_lm", "classifier", "image_classifier"}),
    "max_accuracy_drop": frozenset({"classifier", "image_classifier"}),
    "min_cosine": frozenset({"encoder"}),
}
_RUINOUS = frozenset({"nan", "degenerate_output"})


def limits(acceptance: Acceptance, evaluated: Evaluated, kind: Kind) -> tuple[Limit, ...]:
    """Each limit that was set, with what was measured; one that could not be measured is not met."""
    return tuple(_limit(name, wanted, evaluated, kind) for name, wanted in acceptance.limits().items())


def verdict(found: tuple[Limit, ...], flags: tuple[Flag, ...], evaluated: Evaluated) -> Verdict:
    """`rejected` when a limit was missed or the outputs are worthless; `unmeasured` when evaluation was disabled."""
    if any(flag.code in _RUINOUS for flag in flags):
        return "rejected"
    if evaluated.comparison is None:
        return (
            "rejected"
            if any(not limit.ok and limit.measured is not None for limit in found)
            else "unmeasured"
        )
    return "accepted" if all(limit.ok for limit in found) else "rejected"


def _limit(name: str, wanted: float, evaluated: Evaluated, kind: Kind) -> Limit:
    kinds = _FOR.get(name)
    if kinds is not None and kind not in kinds:
        note = f"For {' and '.join(sorted(_NAMES[k] for k in kinds))}; this model is none of them."
        return Limit(name=name, wanted=wanted, measured=None, ok=True, note=note)
    measured = _MEASURED[name](evaluated)
    if measured is None:
        return Limit(name=name, wanted=wanted, measured=None, ok=False, note="It could not be measured.")
    ok = measured >= wanted if name.startswith("min_") else measured <= wanted
    return Limit(name=name, wanted=wanted, measured=measured, ok=ok)


def _from_comparison(read: Callable[[Comparison], float | None]) -> Callable[[Evaluated], float | None]:
    return lambda evaluated: None if evaluated.comparison is None else read(evaluated.comparison)


_MEASURED: dict[str, Callable[[Evaluated], float | None]] = {
    "max_perplexity_increase": _from_comparison(
        lambda c: None if c.perplexity_ratio is None else c.perplexity_ratio - 1
    ),
    "max_kl": _from_comparison(lambda c: c.kl_mean),
    "min_top1_agreement": _from_comparison(lambda c: c.top1_agreement),
    "max_accuracy_drop": _from_comparison(
        lambda c: None if c.accuracy_change is None else -c.accuracy_change[0]
    ),
    "min_cosine": _from_comparison(lambda c: c.cosine_mean),
    "max_bytes": lambda evaluated: evaluated.result.bytes,
    "max_bytes_ratio": lambda evaluated: evaluated.result.bytes / evaluated.original.bytes,
    "max_latency_ratio": _from_comparison(lambda c: c.latency_ratio),
    "max_peak_memory_ratio": _from_comparison(lambda c: c.peak_memory_ratio),
}
