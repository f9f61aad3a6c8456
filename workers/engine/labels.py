"""Labels of a dataset as the classes of a model."""

from __future__ import annotations

import json

import numpy as np
from numpy.typing import NDArray

from app.errors import InvalidRequest
from app.spec.facts import ModelFacts
from app.spec.labels import classes_of


def numbered(
    labels: NDArray[np.int64], names: str | None, facts: ModelFacts | None, *, in_order: bool = False
) -> NDArray[np.int64]:
    """Labels, (n,), as this model numbers its classes; `names` is the JSON of what they are called, None for plain numbers.

    Raises InvalidRequest (`labels_do_not_fit`) where the model knows no class of a name.
    """
    if names is None:
        return labels
    if facts is None:
        raise ValueError("only a model can say which class a name is")
    try:
        classes = classes_of(json.loads(names), facts, in_order=in_order)
    except ValueError as error:
        raise InvalidRequest(str(error), code="labels_do_not_fit") from None
    return np.asarray(classes, dtype=np.int64)[labels]
