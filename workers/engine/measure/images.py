"""Make images ready to be shown to both models, and count how often each names the right class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from app.spec.compression import Evaluation
from app.spec.facts import ModelFacts
from app.spec.report import EvaluationImages
from workers.engine.images.batches import save_images
from workers.engine.images.geometry import fitted
from workers.engine.images.image_set import ImageSet
from workers.engine.measure.language import Predictions
from workers.engine.measure.results import Prepared

_BOOTSTRAP_DRAWS = 2000


def prepare_images(
    facts: ModelFacts, evaluation: Evaluation, *, dataset: Path, seen: Sequence[Path], images_file: Path
) -> Prepared:
    """Resize and crop the first images of a dataset once, for both models, into `images_file` (.npy).

    `seen` are the datasets that steps of the job read; the share of the images that stand in them goes into the report.
    """
    if facts.preprocessing is None:
        raise ValueError(f"{facts.architecture} takes no images")
    images = ImageSet(dataset)
    count = min(evaluation.images, images.count)
    height, width = facts.preprocessing.size
    chunks = (fitted(chunk, facts.preprocessing) for chunk in images.chunks(count))
    save_images(images_file, chunks, (count, len(facts.preprocessing.mean), height, width))
    labels = images.labels(count)
    return Prepared(
        kind="image_classifier",
        windows_file=images_file,
        labels=None if labels is None else tuple(labels.tolist()),
        images=EvaluationImages(
            source=evaluation.text.dataset or str(dataset),
            sha256=images.digest(),
            images=count,
            labelled=labels is not None,
            height=height,
            width=width,
            overlap_share=_overlap(images, count, seen),
        ),
    )


def _overlap(images: ImageSet, count: int, seen: Sequence[Path]) -> float | None:
    if not seen:
        return None
    others = [ImageSet(path) for path in seen]
    known = {fingerprint for other in others for fingerprint in other.fingerprints(other.count)}
    return sum(fingerprint in known for fingerprint in images.fingerprints(count)) / count


class ImageQuality:
    """Of image classifiers: agreement with the original, and with the labels where there are some."""

    def __init__(self, labels: tuple[int, ...] | None, *, seed: int) -> None:
        """`labels` of all images, in order; `seed` is for the bootstrap."""
        self.vocabulary: tuple[int, int] | None = None
        self.non_finite = 0
        self._labels = None if labels is None else np.asarray(labels)
        self._seed = seed
        self._seen = 0
        self._right: tuple[list[NDArray[np.bool_]], list[NDArray[np.bool_]]] = ([], [])
        self._predictions = Predictions()

    def add(
        self,
        window: NDArray[Any],
        original: NDArray[np.float32],
        result: NDArray[np.float32],
        *,
        finite: bool,
    ) -> None:
        """Count one batch: logits of (images, classes) each."""
        start, self._seen = self._seen, self._seen + len(window)
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
        """Share of the images whose label is the first choice; nothing without labels, or when a batch is missing."""
        if self.non_finite or not self._right[index]:
            return {}
        return {"top1_accuracy": float(np.concatenate(self._right[index]).mean())}

    def relative(self) -> dict[str, Any]:
        """Divergence, agreement and, with labels, the change of accuracy; nothing unless all batches count."""
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
    """Difference of the shares, and its 95 % interval by paired bootstrap over images."""
    differences = after.astype(np.float64) - before
    draws = np.random.default_rng(seed).integers(0, len(differences), (_BOOTSTRAP_DRAWS, len(differences)))
    low, high = np.quantile(differences[draws].mean(axis=1), (0.025, 0.975))
    return float(differences.mean()), float(low), float(high)
