"""What is counted while two models go through the same windows, for each kind of model."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from workers.engine.measure.classes import ClassQuality
from workers.engine.measure.embeddings import (
    cosines,
    pairwise_similarities,
    pool,
    pooling_of,
    rank_correlation,
)
from workers.engine.measure.language import Predictions
from workers.engine.measure.results import Pair, Prepared

Outputs = NDArray[np.float32]


class Quality(Protocol):
    """Counts window after window, then answers with fields of Measurement and Comparison."""

    vocabulary: tuple[int, int] | None
    """Columns of both models' outputs, where they differ."""
    non_finite: int
    """Windows on which the result gave NaN or infinity."""

    def add(self, window: NDArray[Any], original: Outputs, result: Outputs, *, finite: bool) -> None:
        """Count one window or batch: its tokens or pixels, and both models' outputs, (rows, columns) each."""

    def absolute(self, index: int) -> dict[str, float]:
        """`Measurement.quality` of the original (0) or the result (1)."""

    def relative(self) -> dict[str, Any]:
        """Fields of Comparison; what could not be measured is left out."""


def quality_for(prepared: Prepared, pair: Pair) -> Quality:
    """The measure that fits a kind of model."""
    if prepared.kind in ("classifier", "image_classifier"):
        return ClassQuality(prepared.labels, seed=pair.seed)
    if prepared.kind == "encoder":
        return EmbeddingQuality(pooling_of(pair.original))
    return PredictionQuality(prepared, seed=pair.seed)


class PredictionQuality:
    """Of language models, which predict the next token."""

    def __init__(self, prepared: Prepared, *, seed: int) -> None:
        """Count predictions; `seed` is for the bootstrap."""
        self.vocabulary: tuple[int, int] | None = None
        self.non_finite = 0
        self._scored_bytes = prepared.scored_bytes
        self._seed = seed
        self._seen = 0
        self._predictions = Predictions()

    def add(self, window: NDArray[np.int64], original: Outputs, result: Outputs, *, finite: bool) -> None:
        """Count one window; a result that is not finite is counted as such and left out."""
        self._seen += 1
        if not finite:
            self.non_finite += 1
            return
        if original.shape[1] != result.shape[1]:
            self.vocabulary = original.shape[1], result.shape[1]
        self._predictions.add(
            torch.from_numpy(original), torch.from_numpy(result), torch.from_numpy(window[1:])
        )

    def absolute(self, index: int) -> dict[str, float]:
        """Perplexity and bits per byte; nothing when a window is missing."""
        if not self._complete:
            return {}
        return {
            "perplexity": self._predictions.perplexities()[index],
            "bits_per_byte": self._predictions.bits_per_byte(self._scored_bytes)[index],
        }

    def relative(self) -> dict[str, Any]:
        """Divergence, agreement and the change of perplexity; nothing unless all windows count."""
        if not self._complete:
            return {}
        predictions = self._predictions
        fields: dict[str, Any] = predictions.divergence_summary()
        fields["top1_agreement"] = predictions.agreeing / predictions.positions
        before, after = predictions.perplexities()
        fields["perplexity_ratio"] = after / before
        fields["delta_ln_perplexity"] = predictions.delta_ln_perplexity(seed=self._seed)
        fields["answer_flips"] = predictions.flipped / max(1, predictions.original_right)
        return fields

    @property
    def _complete(self) -> bool:
        # An average over the windows that happened to work would flatter the result.
        return self._seen > 0 and self.non_finite == 0


class EmbeddingQuality:
    """Of encoders: how far each text's embedding turned, and whether texts are still similar in the same order."""

    def __init__(self, pooling: tuple[str, ...]) -> None:
        """Pool both models' token embeddings as the original's configuration says."""
        self.vocabulary: tuple[int, int] | None = None
        self.non_finite = 0
        self._pooling = pooling
        self._pooled: tuple[list[Outputs], list[Outputs]] = ([], [])

    def add(self, window: NDArray[np.int64], original: Outputs, result: Outputs, *, finite: bool) -> None:
        """Count one text; the outputs are token embeddings."""
        if not finite or len(window) == 0:
            self.non_finite += 1
            return
        if original.shape[1] != result.shape[1]:
            self.vocabulary = original.shape[1], result.shape[1]
        self._pooled[0].append(pool(original, self._pooling))
        self._pooled[1].append(pool(result, self._pooling))

    def absolute(self, index: int) -> dict[str, float]:
        """Mean similarity of the texts to each other: near 1, an encoder tells nothing apart."""
        if self.non_finite or not self._pooled[index]:
            return {}
        return {"mean_similarity": float(pairwise_similarities(np.stack(self._pooled[index])).mean())}

    def relative(self) -> dict[str, Any]:
        """Cosines of the embeddings and rank correlation of the similarities; nothing unless all texts count."""
        if self.non_finite or not self._pooled[0]:
            return {}
        original, result = np.stack(self._pooled[0]), np.stack(self._pooled[1])
        before, after = pairwise_similarities(original), pairwise_similarities(result)
        fields: dict[str, Any] = {"rank_correlation": rank_correlation(before, after)}
        if self.vocabulary is None:
            turned = cosines(original, result)
            fields |= {"cosine_mean": float(turned.mean()), "cosine_min": float(turned.min())}
        return fields
