"""Is the calibration text what was asked for: long enough, and text that the tokenizer was made for?

A tokenizer betrays text of another language or script: it knows no token for it, or cuts characters into bytes, or words
into crumbs. What counts as too much was measured on the tokenizers of SmolLM2, Llama 2 (stories15m) and MiniLM:

                                    unknown      parts of characters   bytes per token, over those of English prose
    English prose, technical text   0            0                     0.80 to 1.05
    Python                          0            0 to 0.004            0.74 to 0.78
    French                          0            0 to 0.035            0.59 to 0.80
    German                          0            0 to 0.010            0.54 to 0.78
    Polish, Russian                 0            0 to 0.16             0.47 to 1.13
    Chinese, Japanese, Korean       0 to 0.57    0 to 0.91             0.27 to 1.08
    base64, random characters       0 to 0.013   0 to 0.45             0.26 to 0.44

Bytes, not characters: Chinese has few characters in any tokenizer. Llama 2's was trained on German, French and Russian
too, and they pass; SmolLM2's was not. A tokenizer that does well by a language while its model has never learned it
cannot be told by this, nor can English text for a model of another language.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from app.spec.report import Flag
from workers.engine.architectures.loading import load_tokenizer
from workers.engine.calibration.builtin import builtin_text
from workers.engine.calibration.text import special_tokens
from workers.engine.technique import StepContext

_MOST_UNKNOWN = 0.02
_MOST_PARTS = 0.05
_LEAST_BYTES = 0.65
# Enough to tell, and little to decode.
_LOOKED_AT = 16_384
_REFERENCE_CHARACTERS = 20_000
# What a token decodes to by itself when its bytes are no whole characters.
_NO_CHARACTER = "\ufffd"


@dataclass(frozen=True)
class TokenizedText:
    """Tokens of a text, special ones left out: (windows, tokens), int64."""

    tokenizer: Any
    windows: Tensor

    @cached_property
    def unknown(self) -> float:
        """Share of the tokens that stand for characters the vocabulary has none for."""
        token = self.tokenizer.unk_token_id
        # Byte-level vocabularies know every byte; theirs is the end of a text under another name.
        if token is None or token in (self.tokenizer.eos_token_id, self.tokenizer.bos_token_id):
            return 0.0
        return float((self.windows == token).double().mean())

    @cached_property
    def parts(self) -> float:
        """Share of the tokens whose bytes are no whole characters."""
        tokens, counts = torch.unique(self.windows, return_counts=True)
        broken = torch.tensor([_NO_CHARACTER in self.tokenizer.decode([token]) for token in tokens.tolist()])
        return float(counts[broken].sum() / counts.sum())

    @cached_property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of the text over its tokens."""
        texts = (
            self.tokenizer.decode(window, clean_up_tokenization_spaces=False)
            for window in self.windows.tolist()
        )
        return sum(len(text.encode()) for text in texts) / self.windows.numel()


def calibration_flags(context: StepContext, windows: Tensor, *, tokens: int) -> tuple[Flag, ...]:
    """What a reader must know of the windows (windows, length) that a step was calibrated on; it asked for `tokens`."""
    tokenizer = load_tokenizer(context.source)
    before, after = special_tokens(tokenizer)
    bare = windows[:, len(before) : windows.shape[1] - len(after)]
    length = bare.shape[1]
    seen = TokenizedText(tokenizer, bare[: max(1, _LOOKED_AT // length)])
    return (*_short(bare, tokens), *_foreign(seen))


def _short(bare: Tensor, tokens: int) -> Iterator[Flag]:
    windows, length = bare.shape
    if windows < max(1, tokens // length):
        yield Flag(
            code="calibration_short",
            detail=f"The calibration text has {windows} windows of {length} tokens, {bare.numel():,} in all; the step "
            f"asked for {tokens:,}. With fewer, what it learns of the inputs is less sure: give it a longer text.",
        )


def _foreign(seen: TokenizedText) -> Iterator[Flag]:
    english = _english(seen.tokenizer)
    if (
        seen.unknown <= _MOST_UNKNOWN
        and seen.parts <= _MOST_PARTS
        and seen.bytes_per_token >= _LEAST_BYTES * english
    ):
        return
    yield Flag(
        code="calibration_language",
        detail=f"The tokenizer seems not to be made for the calibration text: {seen.unknown:.1%} of its tokens are "
        f"unknown, {seen.parts:.1%} are parts of characters, and a token stands for {seen.bytes_per_token:.1f} bytes, "
        f"in English prose for {english:.1f}. Use text of the language and kind that the model is for.",
    )


def _english(tokenizer: Any) -> float:
    """Bytes per token of the built-in text."""
    text = builtin_text("calibration").read_text(encoding="utf-8")[:_REFERENCE_CHARACTERS]
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return TokenizedText(tokenizer, torch.tensor([ids])).bytes_per_token
