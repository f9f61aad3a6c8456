"""What of attention can be compared: the layers that make queries, keys and values, and what tokens look at."""

from __future__ import annotations

from collections.abc import Collection

from app.spec.architectures import Architecture

PROJECTIONS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("query_proj", "key_proj", "value_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
)

# These hand over what tokens look at only when the whole model is asked to.
_KEEPING_THEIR_MAPS = frozenset({"mpnet", "deberta-v2"})


def has_attention_maps(architecture: Architecture) -> bool:
    """Whether what tokens look at can be seen block by block."""
    return architecture.model_type not in _KEEPING_THEIR_MAPS


def projections_among(names: Collection[str]) -> tuple[str, str, str] | None:
    """The last parts of the three names among these names of modules; None where one layer makes all three."""
    last_parts = {name.rpartition(".")[2] for name in names}
    return next((names for names in PROJECTIONS if last_parts.issuperset(names)), None)
