"""The English prose that ships with Modelpress, for jobs that name no dataset of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

_TEXTS = Path(__file__).parent / "texts"


def builtin_text(name: Literal["evaluation", "calibration"]) -> Path:
    """The file of a built-in text; the two come from different books (see texts/README.txt)."""
    return _TEXTS / f"{name}.txt"
