"""Turn text into windows of tokens, the same way for calibration, training and evaluation."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from app.errors import InvalidRequest
from workers.engine.calibration.text_set import read_text

_CHUNK_CHARACTERS = 50_000


def read_documents(path: Path) -> list[str]:
    """The documents of a text: separated by blank lines, empty ones left out."""
    return [document for part in re.split(r"\n\s*\n", read_text(path)) if (document := part.strip())]


def token_windows(tokenizer: Any, path: Path, *, tokens: int, length: int) -> Tensor:
    """Non-overlapping windows from the start of a text file, as `cut_windows` makes them."""
    return cut_windows(tokenizer, read_text(path), tokens=tokens, length=length)


def cut_windows(tokenizer: Any, text: str, *, tokens: int, length: int) -> Tensor:
    """Non-overlapping windows from the start of a text: (tokens // length, length), int64, at least one window.

    No special tokens are added inside; windows are a plain cut of one long stream. Raises InvalidRequest when the
    text is too short for one window.
    """
    stream: list[int] = []
    wanted = max(tokens, length)
    for chunk in token_chunks(tokenizer, text):
        stream += chunk
        if len(stream) >= wanted:
            break
    windows = min(len(stream), wanted) // length
    if windows == 0:
        raise InvalidRequest(
            f"The text has {len(stream)} tokens, fewer than one window of {length}.",
            code="text_too_short",
            hint="Upload a longer text, or ask for a shorter sequence_length.",
        )
    return torch.tensor(stream[: windows * length], dtype=torch.long).view(windows, length)


def token_chunks(tokenizer: Any, text: str) -> Iterator[list[int]]:
    """The tokens of a text as one long stream, no special ones added, some 50,000 characters at a time."""
    for start in range(0, len(text), _CHUNK_CHARACTERS):
        chunk = text[start : start + _CHUNK_CHARACTERS]
        ids: list[int] = tokenizer(chunk, add_special_tokens=False, verbose=False)["input_ids"]
        yield ids


def special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What a tokenizer puts before and after a text, e.g. ([BOS], []) or ([CLS], [SEP])."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    return [], []


def text_digest(path: Path) -> str:
    """The sha256 of a text file, in hex: what a report quotes to say which text was used."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
