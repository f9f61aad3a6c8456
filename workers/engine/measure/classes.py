"""Count how often two classifiers choose the same class, and how often each chooses the right one."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from workers.engine.measure.bootstrap import DRAWS, interval
from workers.engine.measure.language import Predictions


class ClassQuality:
    """Of classifiers of texts and images: agreement with the original, and with the labels where there are some."""

    def __init__(self, labels: tuple[int, ...] | None, *, seed: int) -> None:
        """`labels` of all texts or images, in order; `seed` is for the bootstrap."""
        self.vocabulary: tuple[int, int] | None = None
        self.non_finite = 0
        self._labels = None if labels is None else np.asarray(labels)
        self._seed = seed
        self._seen = 0
        self._right: tuple[list[NDArray[np.bool_]], list[NDArray[np.bool_]]] = ([], [])
        self._predictions = Predictions()

    def add(
        self,
        window: NDArray[Any],  # noqa: ARG002 - the outputs say how many there are
        original: NDArray[np.float32],
        result: NDArray[np.float32],
        *,
        finite: bool,
    ) -> None:
        """Count one text or one batch of images: logits of (texts or images, classes) each."""
        start, self._seen = self._seen, self._seen + len(original)
        if not finite:
            self.non_finite += 1
            return
        if original.shape != result.shape:
            self.vocabulary = original.shape[1], result.shape[1]
        self._predictions.add(torch.from_numpy(original), torch.from_numpy(result), None)
        if self._labels is not None:
            for right, logits in zip(self._right, (original, result), strict=True):
                right.append(logits.argmax(1) == self._labels[start : self._seen])

    def absolute(self, index: int) -> dict[str, float]:
        """Share of the texts or images whose label is the first choice; nothing without labels, or when some are missing."""
        if self.non_finite or not self._right[index]:
            return {}
        return {"top1_accuracy": float(np.concatenate(self._right[index]).mean())}

    def relative(self) -> dict[str, Any]:
        """Divergence, agreement and, with labels, the change of accuracy; nothing unless all count."""
        if self.non_finite or not self._seen:
            return {}
        fields: dict[str, Any] = self._predictions.divergence_summary()
        fields["top1_agreement"] = self._predictions.agreeing / self._predictions.positions
        if self._labels is not None:
            before, after = (np.concatenate(right) for right in self._right)
            fields["accuracy_change"] = _change(before, after, self._seed)
            fields["answer_flips"] = float((before & ~after).sum() / max(1, before.sum()))
        return fields


def _change(before: NDArray[np.bool_], after: NDArray[np.bool_], seed: int) -> tuple[float, float, float]:
    """Difference of the shares, and its 95 % interval by paired bootstrap.

    Of a resample only the numbers of gains and of losses count, and those are multinomial.
    """
    count, gained, lost = len(before), int((after & ~before).sum()), int((before & ~after).sum())
    shares = np.array([gained, lost, count - gained - lost]) / count
    drawn = np.random.default_rng(seed).multinomial(count, shares, size=DRAWS)
    return (gained - lost) / count, *interval((drawn[:, 0] - drawn[:, 1]) / count)
