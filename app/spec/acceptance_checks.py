"""Which limits of `acceptance` can be measured on a model."""

from __future__ import annotations

from collections.abc import Iterator

from app.errors import Fault
from app.spec.base import Family
from app.spec.compression import Acceptance, CompressionSpec
from app.spec.facts import ModelFacts

_MEASURED = (
    "max_perplexity_increase", "max_kl", "min_top1_agreement", "max_accuracy_drop", "min_cosine", "max_latency_ratio",
    "max_peak_memory_ratio",
)  # fmt: skip
_NEEDS_MEMBERS = {"max_perplexity_increase": "perplexity", "max_kl": "next-token distributions"}
_NOT_OF_IMAGES = dict.fromkeys(
    ("max_perplexity_increase", "min_cosine"),
    "This model gives a class to an image; use min_top1_agreement, max_accuracy_drop or max_kl.",
)


def applicable_acceptance(acceptance: Acceptance, facts: ModelFacts) -> Acceptance:
    """The limits that can be measured on such a model. Recipes serve every family and name limits for each."""
    return acceptance.model_copy(update=dict.fromkeys(_foreign_limits(acceptance, facts)))


def _foreign_limits(acceptance: Acceptance, facts: ModelFacts) -> dict[str, str]:
    """Limits that are set and mean nothing for this model, and why."""
    if facts.family is Family.IMAGE_CLASSIFIER:
        return {name: why for name, why in _NOT_OF_IMAGES.items() if name in acceptance.limits()}
    reasons = {}
    is_lm, labels = facts.family is Family.CAUSAL_LM, facts.num_labels is not None
    for name in acceptance.limits():
        if name == "max_accuracy_drop" and not labels:
            reasons[name] = "For classifiers, on a dataset with labels."
        elif name in _NEEDS_MEMBERS and not is_lm:
            reasons[name] = f"Encoders have no {_NEEDS_MEMBERS[name]}; use min_cosine."
        elif name == "min_cosine" and is_lm:
            reasons[name] = "For encoders; for a language model use max_perplexity_increase or max_kl."
        elif name == "min_top1_agreement" and not is_lm and not labels:
            reasons[name] = "This encoder has no classes to agree on; use min_cosine."
    return reasons


def check_acceptance(spec: CompressionSpec, facts: ModelFacts) -> Iterator[Fault]:
    """Limits that mean nothing for this model, or that nothing would be measured for."""
    foreign = _foreign_limits(spec.acceptance, facts)
    for name, reason in foreign.items():
        yield Fault(f"/acceptance/{name}", reason)
    if not spec.evaluation.enabled:
        for name in spec.acceptance.limits().keys() & _MEASURED - foreign.keys():
            yield Fault(
                f"/acceptance/{name}",
                "Nothing is measured with evaluation.enabled false; leave this limit out.",
            )
