"""Do datasets suit a model and a job? Answered from what is known of them without reading them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from app.errors import Fault
from app.spec.compression import CompressionSpec, TextSource
from app.spec.facts import ModelFacts
from app.spec.image_set import ImageSetFacts
from app.spec.labels import check_labels
from app.spec.text_set import TextSetFacts

DatasetFacts = ImageSetFacts | TextSetFacts | None
"""None for text without labels."""

_NONE_SHIPS = "This model takes images, and none ship with Modelpress: name a dataset of images{way_out}."


def check_datasets(
    spec: CompressionSpec, facts: ModelFacts, sets: Mapping[str, DatasetFacts]
) -> Iterator[Fault]:
    """Datasets of the wrong kind for a model, or that do not fit it; `sets` by id.

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
    yield from _check_judged(spec, facts, sets)


def _sources(spec: CompressionSpec) -> Iterator[tuple[str, TextSource, str]]:
    """The sources that the job will read, by their place in the spec, and how to do without them."""
    if spec.evaluation.enabled:
        yield "/evaluation/text", spec.evaluation.text, ", or set evaluation.enabled to false"
    if any(step.needs_calibration for step in spec.steps):
        yield "/calibration", spec.calibration, ""
    if any(step.needs_training for step in spec.steps):
        yield "/training", spec.training, ""


def _check_dataset(facts: ModelFacts, dataset: str, found: DatasetFacts, pointer: str) -> Iterator[Fault]:
    if facts.preprocessing is None:
        if isinstance(found, ImageSetFacts):
            yield Fault(pointer, f"{dataset} holds images, and this model reads text.")
        return
    if not isinstance(found, ImageSetFacts):
        yield Fault(pointer, f"{dataset} holds text, and this model takes images.")
        return
    channels = len(facts.preprocessing.mean)
    if found.channels not in (None, channels):
        yield Fault(pointer, f"Its images have {found.channels} channels; this model takes {channels}.")
    height, width = facts.preprocessing.size
    if facts.preprocessing.resize is None and (found.height < height or found.width < width):
        yield Fault(
            pointer,
            f"Its images are {_least(found)}{found.height} by {found.width}, smaller than the {height} by {width} that the model takes, and "
            "preprocessor_config.json says that images are not resized.",
        )


def _least(found: ImageSetFacts) -> str:
    return "down to " if found.layout == "files" else ""


def _check_labels(
    spec: CompressionSpec, facts: ModelFacts, sets: Mapping[str, DatasetFacts]
) -> Iterator[Fault]:
    """Labels must be among the model's, where accuracy is measured and where they are trained on."""
    for where, source, _ in _sources(spec) if facts.num_labels is not None else ():
        found = sets.get(source.dataset) if source.dataset is not None else None
        why = None if found is None or where == "/calibration" else check_labels(found, facts)
        if why is not None:
            yield Fault(f"{where}/dataset", why)


def _check_judged(
    spec: CompressionSpec, facts: ModelFacts, sets: Mapping[str, DatasetFacts]
) -> Iterator[Fault]:
    """Accuracy needs labels."""
    pointer, judged = "/acceptance/max_accuracy_drop", spec.evaluation.text.dataset
    if facts.num_labels is None or not spec.evaluation.enabled or spec.acceptance.max_accuracy_drop is None:
        return
    if judged is None:
        if facts.preprocessing is None:
            yield Fault(
                pointer,
                "The built-in text has no labels; name a dataset of texts with labels in evaluation.text.",
            )
    elif judged in sets and not _has_labels(sets[judged]):
        yield Fault(pointer, f"{judged} has no labels; use min_top1_agreement.")


def _has_labels(found: DatasetFacts) -> bool:
    return found is not None and found.largest_label is not None
