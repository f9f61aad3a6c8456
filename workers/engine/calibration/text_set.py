"""A dataset of texts as the service keeps it: UTF-8 text, or, with labels, a safetensors file of `labels` and `text`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from app.spec.facts import ModelFacts
from workers.engine.labels import numbered


def read_text(path: Path) -> str:
    """All of the text: documents separated by blank lines."""
    if not has_labels(path):
        return path.read_text(encoding="utf-8")
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        return str(file.get_tensor("text").tobytes(), "utf-8")


def has_labels(path: Path) -> bool:
    """Whether each document has a label. A safetensors file begins with a length, most of it zeros; text has no zero bytes."""
    with path.open("rb") as file:
        return b"\0" in file.read(8)


def read_labels(path: Path, facts: ModelFacts) -> NDArray[np.int64] | None:
    """The class of each document, as this model numbers them: (documents,); None where the model or the text has none.

    Raises InvalidRequest (`labels_do_not_fit`) where the model knows no class of a label's name.
    """
    if facts.num_labels is None or not has_labels(path):
        return None
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        labels: NDArray[np.int64] = file.get_tensor("labels")
        names = file.metadata().get("label_names")
    return numbered(labels, names, facts)
