"""Windows of tokens as a model wants them: with the special tokens its tokenizer puts around a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from app.spec.facts import ModelFacts
from workers.engine.calibration.text import special_tokens, token_windows

# Their tables of positions begin with rows that no position uses.
_UNUSED_POSITIONS = {"Roberta": 2, "XLMRoberta": 2, "MPNet": 2}


def longest_window(facts: ModelFacts) -> int:
    """Tokens a model can take at once, special ones included."""
    unused = next((n for name, n in _UNUSED_POSITIONS.items() if facts.architecture.startswith(name)), 0)
    return facts.max_positions - unused


def model_windows(tokenizer: Any, path: Path, facts: ModelFacts, *, tokens: int, length: int) -> Tensor:
    """Windows of `length` tokens (fewer if the model takes fewer), special tokens included: (windows, length), int64.

    `tokens` counts those of the text. Raises InvalidRequest when the text is too short for one window.
    """
    before, after = special_tokens(tokenizer)
    inner = min(length, longest_window(facts)) - len(before) - len(after)
    bare = token_windows(tokenizer, path, tokens=tokens, length=inner)
    first, last = (torch.tensor(ids, dtype=torch.long).expand(len(bare), -1) for ids in (before, after))
    return torch.cat((first, bare, last), dim=1)
