"""Compare what two models predict, position by position: perplexity, KL divergence, agreement.

Log-softmax in float32 over the whole vocabulary, a few positions at a time, so that memory stays at a few slabs
whatever the vocabulary's size; sums in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workers.engine.measure.bootstrap import interval, resamples

_SLAB_ELEMENTS = 2_000_000


@dataclass
class Predictions:
    """Sums over windows of what original and result predict. Nats throughout."""

    original_nll: list[float] = field(default_factory=list)
    """Per window: summed negative log-likelihood of the true next tokens."""
    result_nll: list[float] = field(default_factory=list)
    scored: list[int] = field(default_factory=list)
    """Per window: how many next tokens."""
    divergences: list[NDArray[np.float32]] = field(default_factory=list)
    """Per window: KL(original ‖ result) at each position; empty where the vocabularies differ."""
    positions: int = 0
    agreeing: int = 0
    original_right: int = 0
    flipped: int = 0

    def add(self, original: Tensor, result: Tensor, targets: Tensor | None) -> None:
        """Add one window: logits (positions, vocabulary) of each; targets (positions - 1,) the true next tokens.

        Without targets, as for classifiers, only divergence and agreement are counted.
        """
        nll = [0.0, 0.0]
        divergences: list[Tensor] = []
        step = max(1, _SLAB_ELEMENTS // original.shape[1])
        for start in range(0, len(original), step):
            slab = slice(start, start + step)
            p, q = (torch.log_softmax(logits[slab].float(), dim=-1) for logits in (original, result))
            if p.shape == q.shape:
                divergences.append(divergence(p, q))
            truth = None if targets is None else targets[slab]
            self._count_first_choices(p.argmax(-1), q.argmax(-1), truth)
            if truth is not None:
                nll = [total + _nll(logp, truth) for total, logp in zip(nll, (p, q), strict=True)]
        self.original_nll.append(nll[0])
        self.result_nll.append(nll[1])
        self.scored.append(0 if targets is None else len(targets))
        if divergences:
            self.divergences.append(torch.cat(divergences).numpy())

    def _count_first_choices(self, original: Tensor, result: Tensor, truth: Tensor | None) -> None:
        self.positions += len(original)
        self.agreeing += int((original == result).sum())
        if truth is not None:
            right = original[: len(truth)] == truth
            self.original_right += int(right.sum())
            self.flipped += int((right & (result[: len(truth)] != truth)).sum())

    def perplexities(self) -> tuple[float, float]:
        """exp of the mean negative log-likelihood, of original and result."""
        count = sum(self.scored)
        return _exp(sum(self.original_nll) / count), _exp(sum(self.result_nll) / count)

    def bits_per_byte(self, scored_bytes: int) -> tuple[float, float]:
        """Negative log-likelihood in bits over the bytes of the text that was scored."""
        scale = 1 / (math.log(2) * max(1, scored_bytes))
        return sum(self.original_nll) * scale, sum(self.result_nll) * scale

    def delta_ln_perplexity(self, *, seed: int) -> tuple[float, float, float]:
        """Difference of the mean negative log-likelihoods, and its 95 % interval by paired bootstrap over windows."""
        differences = np.subtract(self.result_nll, self.original_nll)
        counts = np.asarray(self.scored, dtype=np.float64)
        resampled = np.concatenate(
            [
                differences[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
                for drawn in resamples(len(counts), seed)
            ]
        )
        return float(differences.sum() / counts.sum()), *interval(resampled)

    def divergence_summary(self) -> dict[str, float]:
        """`kl_mean`, `kl_median`, `kl_p99` and `kl_max` over all positions; empty where nothing could be compared."""
        if not self.divergences:
            return {}
        values = np.concatenate(self.divergences).astype(np.float64)
        return {
            "kl_mean": float(values.mean()),
            "kl_median": float(np.median(values)),
            "kl_p99": float(np.quantile(values, 0.99)),
            "kl_max": float(values.max()),
        }


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p ‖ q) in nats from log-probabilities: two of (positions, vocabulary) -> (positions,), never below zero."""
    return (p.exp() * (p - q)).sum(dim=-1).clamp_min_(0)


def _nll(logp: Tensor, truth: Tensor) -> float:
    return -float(logp[: len(truth)].gather(1, truth[:, None]).double().sum())


def _exp(value: float) -> float:
    # A ruined model's loss can be hundreds of nats; a report must still be able to say so in JSON.
    return math.exp(min(value, 700.0))
