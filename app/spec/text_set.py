"""What is known of a dataset of texts with labels."""

from __future__ import annotations

from app.spec.labels import LabelFacts


class TextSetFacts(LabelFacts):
    """Texts that each have a label."""

    texts: int
