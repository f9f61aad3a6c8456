"""The layer that gives a language model's logits, where it can be quantized apart from the token embedding."""

from __future__ import annotations

from collections.abc import Iterable

from app.spec.architectures import Architecture
from app.spec.base import Family
from app.spec.facts import TensorFact

NO_OWN_HEAD = (
    "This model has no head that could be quantized by itself: it shares the token embedding's weights, is loaded under "
    "another name (GPT-NeoX) or lies the other way round than the layers (GPT-2), or there is none. Leave it out."
)
# transformers 5.23 renames GPT-NeoX's embed_out while it loads, and then misses the packed weight.
_NAME = "lm_head.weight"


def own_head(tensors: Iterable[TensorFact], architecture: Architecture) -> TensorFact | None:
    """The head's weight (vocabulary, hidden), or None where it is shared, cannot be loaded packed, or does not exist."""
    if architecture.family is not Family.CAUSAL_LM or architecture.inputs_first:
        return None
    return next((tensor for tensor in tensors if tensor.name == _NAME), None)
