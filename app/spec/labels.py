"""Labels of a dataset as classes of a model: numbers as they are, names by what the model's config calls its classes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import ClassVar

from app.spec.base import Frozen
from app.spec.facts import ModelFacts

_NAMED = 5


class LabelFacts(Frozen):
    """What is known of a dataset's labels."""

    in_order: ClassVar[bool] = False
    """Whether names that are not the model's may stand for its classes in order, as folders do for torchvision and others."""

    largest_label: int | None
    """Labels count from 0; null where there are none."""
    label_names: tuple[str, ...] | None = None
    """What the labels are called, sorted, where they came as names: label 0 is the first; null where they came as numbers."""


def check_labels(labels: LabelFacts, model: ModelFacts) -> str | None:
    """Why labels are not all among a model's classes, in words that say what would do; None where they are, or there are none."""
    if labels.label_names is not None:
        try:
            classes_of(labels.label_names, model, in_order=labels.in_order)
        except ValueError as error:
            return str(error)
    elif labels.largest_label is not None and labels.largest_label >= (model.num_labels or 0):
        return f"Its labels go up to {labels.largest_label}; the model has classes 0 to {(model.num_labels or 0) - 1}."
    return None


def classes_of(names: Sequence[str], model: ModelFacts, *, in_order: bool = False) -> tuple[int, ...]:
    """The model's class for each name, in upper or lower case alike. Raises ValueError that says which name fits none.

    `in_order`: where the model knows none of the names, and there is one for each class, they are its classes in order.
    """
    strangers = not {n.casefold() for n in names} & {n.casefold() for n in model.label_names or ()}
    if in_order and strangers and len(names) == model.num_labels:
        return tuple(range(len(names)))
    if model.label_names is None:
        raise ValueError(
            "Its labels are names, and the model's config.json has no id2label that says which class each is: use numbers."
        )
    wanted = [name.casefold() for name in names]
    known = [name.casefold() for name in model.label_names]
    counts = Counter(known)
    missing = [name for name, plain in zip(names, wanted, strict=True) if counts[plain] == 0]
    doubled = [name for name, plain in zip(names, wanted, strict=True) if counts[plain] > 1]
    if missing:
        raise ValueError(
            f"The model has no class called {_some(missing)}; its id2label calls them {_some(model.label_names)}. Use those "
            "names, or numbers."
        )
    if doubled:
        raise ValueError(f"The model has more than one class called {_some(doubled)}: use numbers.")
    if len(set(wanted)) < len(wanted):
        raise ValueError(f"Some of its labels differ in case alone: {_some(names)}.")
    return tuple(known.index(plain) for plain in wanted)


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name[:50]) for name in names[:_NAMED])
    more = len(names) - _NAMED
    return shown + (f" and {more} more" if more > 0 else "")
