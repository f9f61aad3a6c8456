"""What the layers are called that make queries, keys and values, where each has one of its own."""

from __future__ import annotations

from collections.abc import Collection

PROJECTIONS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("query_proj", "key_proj", "value_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
)


def projections_among(names: Collection[str]) -> tuple[str, str, str] | None:
    """The last parts of the three names among these names of modules; None where one layer makes all three."""
    last_parts = {name.rpartition(".")[2] for name in names}
    return next((names for names in PROJECTIONS if last_parts.issuperset(names)), None)
