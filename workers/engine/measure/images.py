"""Make images ready to be shown to both models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from app.spec.compression import Evaluation
from app.spec.facts import ModelFacts
from app.spec.report import EvaluationImages
from workers.engine.images.batches import save_images
from workers.engine.images.fitting import fitted_images
from workers.engine.images.image_set import ImageSet
from workers.engine.measure.results import Prepared


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
    chunks = fitted_images(images, count, facts.preprocessing)
    save_images(images_file, chunks, (count, len(facts.preprocessing.mean), height, width))
    labels = images.labels(count, facts)
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
