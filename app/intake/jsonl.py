"""Read documents from a .jsonl: one JSON object a line, with its `text` and perhaps a `label`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.intake.refusals import refused

MAX_LINE_BYTES = 16 * 2**20
TEXTS_ACCEPTED = (
    'Accepted: text as .txt (UTF-8, blank lines between documents) and .jsonl (one {"text": …} a line, with a "label" for '
    "classifiers), images as .npz and .safetensors, or as picture files in folders by class (zip, tar, tar.gz)."
)
_BLANK_LINES = re.compile(r"\n\s*\n")


@dataclass(frozen=True)
class Document:
    """One document, never empty and without blank lines inside."""

    text: str
    entry: dict[str, Any]
    """All that its line says."""
    where: str
    """Its line, in words."""

    @property
    def label(self) -> object:
        """What it says is its label; None where it says nothing."""
        return self.entry.get("label")


def read_documents(path: Path, name: str) -> Iterator[Document]:
    """The documents of a file in order; empty ones are left out. Raises IntakeError."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            where = f"Line {number} of {name}"
            if len(line) > MAX_LINE_BYTES:
                raise refused("text_invalid", f"{where} has more than {MAX_LINE_BYTES} bytes.")
            if line.strip():
                entry = _entry(line, where)
                if text := _text(entry, where):
                    yield Document(text, entry, where)


def _entry(line: bytes, where: str) -> dict[str, Any]:
    try:
        entry = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise refused("text_invalid", f"{where} is not UTF-8.") from None
    except (ValueError, RecursionError):
        raise refused("text_invalid", f"{where} is not JSON.", hint=TEXTS_ACCEPTED) from None
    return entry if isinstance(entry, dict) else {}


def _text(entry: dict[str, Any], where: str) -> str:
    text = entry.get("text")
    if not isinstance(text, str):
        raise refused("text_invalid", f'{where} has no "text" that is a string.', hint=TEXTS_ACCEPTED)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise refused("text_invalid", f"{where} has half a surrogate pair in its text.") from None
    return _BLANK_LINES.sub("\n", clean(text, where)).strip()


def clean(text: str, where: str) -> str:
    """Text with line ends made alike. Raises IntakeError where it has a zero byte."""
    if "\0" in text:
        raise refused("text_invalid", f"{where} has a zero byte: it is no text.")
    return text.replace("\r\n", "\n").replace("\r", "\n")
