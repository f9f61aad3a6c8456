"""The same tokens for everyone: calibration windows for ours and for peers, and evaluation windows spread over a text."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.spec.facts import ModelFacts
from workers.engine.architectures.loading import load_tokenizer
from workers.engine.calibration.text import read_documents, special_tokens
from workers.engine.calibration.windows import longest_window, model_windows

STRETCHES = 64
"""From how many places of a text the calibration tokens are taken."""
# Windows are cut from one stream, so that the last one is seldom whole; and special tokens come out of it.
_SLACK = 1.1


def spread_text(model: Path, text: Path, target: Path, *, tokens: int) -> None:
    """Write to `target` about `tokens` tokens of whole documents, from places evenly spaced over `text`.

    Techniques read a text from its beginning; a text of several genres would give them the first one alone.
    """
    tokenizer = load_tokenizer(model)
    documents = read_documents(text)
    lengths = [len(ids) for ids in tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]]
    ends = np.cumsum(lengths)
    chosen: list[int] = []
    for stretch in range(STRETCHES):
        first = int(np.searchsorted(ends, stretch * ends[-1] / STRETCHES, side="right"))
        last = int(np.searchsorted(ends, ends[first] - lengths[first] + _SLACK * tokens / STRETCHES))
        following = int(np.searchsorted(ends, (stretch + 1) * ends[-1] / STRETCHES, side="right"))
        chosen += range(first, min(last + 1, max(following, first + 1), len(documents)))
    target.write_text("\n\n".join(documents[index] for index in chosen), encoding="utf-8")


def calibration_windows(
    model: Path, facts: ModelFacts, text: Path, target: Path, *, tokens: int
) -> NDArray[np.int64]:
    """The windows that our engine makes of a text, (windows, tokens), written as an .npz for the peers too."""
    windows: NDArray[np.int64] = model_windows(
        load_tokenizer(model), text, facts, tokens=tokens, length=512
    ).numpy()
    np.savez(target, windows=windows)
    return windows


def evaluation_windows(model: Path, facts: ModelFacts, text: Path, *, tokens: int) -> NDArray[np.int64]:
    """Windows of up to 1024 tokens with starts evenly spaced over a text: (windows, tokens), none overlapping.

    BOS goes before each where the tokenizer puts one before a text.
    """
    tokenizer: Any = load_tokenizer(model)
    before, _ = special_tokens(tokenizer)
    length = min(1024, longest_window(facts))
    inner = length - len(before)
    ids = tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
    stream = np.asarray(ids, dtype=np.int64)
    count = min(tokens // length, len(stream) // inner)
    starts = np.linspace(0, len(stream) - inner, count).astype(int)
    return np.stack([np.concatenate((before, stream[start : start + inner])) for start in starts]).astype(
        np.int64
    )


def digest(values: NDArray[np.int64]) -> str:
    """A short name for an array's content."""
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()[:12]
