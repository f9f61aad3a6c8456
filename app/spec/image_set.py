"""What is known of a dataset of images without looking at a pixel, and whether it suits a model and a job."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

from app.errors import Fault
from app.spec.base import Frozen
from app.spec.compression import CompressionSpec, TextSource
from app.spec.facts import ModelFacts

Layout = Literal["NHWC", "NCHW"]
"""The order of images, height, width and channels."""

_NONE_SHIPS = "This model takes images, and none ship with Modelpress: name a dataset of images{way_out}."


class ImageSetFacts(Frozen):
    """The shape of a set of images of 8 bits a channel, and of its labels."""

    images: int
    height: int
    width: int
    channels: int
    layout: Layout
    """How the bytes lie in the file that is kept."""
    largest_label: int | None
    """Labels count from 0; null where there are none."""


def check_datasets(
    spec: CompressionSpec, facts: ModelFacts, sets: Mapping[str, ImageSetFacts | None]
) -> Iterator[Fault]:
    """Datasets of the wrong kind for a model, or that do not fit it; `sets` by id, None for text.

    One that is not in `sets` is not checked here.
    """
    for where, source, way_out in _sources(spec):
        pointer = f"{where}/dataset"
        if source.dataset is None:
            if facts.preprocessing is not None:
                yield Fault(pointer, _NONE_SHIPS.format(way_out=way_out))
        elif source.dataset in sets:
            yield from _check_dataset(facts, source.dataset, sets[source.dataset], pointer)
    yield from _check_labels(spec, facts, sets)


def _sources(spec: CompressionSpec) -> Iterator[tuple[str, TextSource, str]]:
    """The sources that the job will read, by their place in the spec, and how to do without them."""
    if spec.evaluation.enabled:
        yield "/evaluation/text", spec.evaluation.text, ", or set evaluation.enabled to false"
    if any(step.needs_calibration for step in spec.steps):
        yield "/calibration", spec.calibration, ""
    if any(step.needs_training for step in spec.steps):
        yield "/training", spec.training, ""


def _check_dataset(
    facts: ModelFacts, dataset: str, found: ImageSetFacts | None, pointer: str
) -> Iterator[Fault]:
    if facts.preprocessing is None:
        if found is not None:
            yield Fault(pointer, f"{dataset} holds images, and this model reads text.")
        return
    if found is None:
        yield Fault(pointer, f"{dataset} holds text, and this model takes images.")
        return
    channels = len(facts.preprocessing.mean)
    if found.channels != channels:
        yield Fault(pointer, f"Its images have {found.channels} channels; this model takes {channels}.")
    height, width = facts.preprocessing.size
    if facts.preprocessing.resize is None and (found.height < height or found.width < width):
        yield Fault(
            pointer,
            f"Its images are {found.height} by {found.width}, smaller than the {height} by {width} that the model takes, and "
            "preprocessor_config.json says that images are not resized.",
        )


def _check_labels(
    spec: CompressionSpec, facts: ModelFacts, sets: Mapping[str, ImageSetFacts | None]
) -> Iterator[Fault]:
    """Accuracy needs labels, and labels must be among the model's, also those that are trained on."""
    if facts.preprocessing is None:
        return
    for where, source, _ in _sources(spec):
        found = sets.get(source.dataset) if source.dataset is not None else None
        if found is None or where == "/calibration":
            continue
        if found.largest_label is not None and found.largest_label >= (facts.num_labels or 0):
            yield Fault(
                f"{where}/dataset",
                f"Its labels go up to {found.largest_label}; the model has classes 0 to {(facts.num_labels or 0) - 1}.",
            )
        is_judged = where.startswith("/evaluation") and spec.acceptance.max_accuracy_drop is not None
        if is_judged and found.largest_label is None:
            yield Fault(
                "/acceptance/max_accuracy_drop", f"{source.dataset} has no labels; use min_top1_agreement."
            )
