"""A tokenizer in GGUF's words: vocabulary, kinds of tokens, merges or scores, and which text splits before merging.

llama.cpp has two tokenizers that matter for our architectures: `gpt2`, byte-level BPE whose regular expression goes by
a name (`tokenizer.ggml.pre`), and `llama`, sentencepiece's BPE, where pairs merge by the score of what they give.
Names of regular expressions: llama.cpp's src/llama-vocab.cpp. What has no equivalent there is refused.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from gguf import GGUFWriter, TokenType

from app.errors import UnsupportedForModel
from workers.engine.calibration.text import special_tokens

_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CASELESS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_EXPRESSIONS = {
    _CASELESS % r"\p{N}{1,3}": "llama-bpe",
    _CASELESS % r"\p{N}": "qwen2",
    _TEKKEN: "tekken",
    _WORDS: "gpt-2",
}
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_SPACE = "▁"


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of a tokenizer."""

    model: str
    pre: str
    tokens: list[str]
    kinds: list[int]
    merges: list[str]
    scores: list[float]
    add_space_prefix: bool


def read_vocabulary(tokenizer: Any, *, size: int) -> Vocabulary:
    """The vocabulary of a fast tokenizer of transformers, padded to `size` entries.

    Raises UnsupportedForModel for a tokenizer that llama.cpp would cut text differently with.
    """
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    model = content["model"]
    if model["type"] != "BPE":
        raise _unsupported(f"is of type {model['type']}")
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    tokens, kinds = _tokens(content, size)
    if _is_sentencepiece(content):
        scores = _scores(tokens, model["merges"])
        return Vocabulary("llama", "default", tokens, kinds, [], scores, _adds_space(content))
    return Vocabulary("gpt2", _expression(content), tokens, kinds, merges, [], add_space_prefix=False)


def add_tokenizer(writer: GGUFWriter, tokenizer: Any, *, size: int) -> None:
    """Add the vocabulary, the special tokens and the chat template to a header."""
    vocabulary = read_vocabulary(tokenizer, size=size)
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    if vocabulary.model == "llama":
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.add_space_prefix)
    else:
        writer.add_token_merges(vocabulary.merges)
    before, after = special_tokens(tokenizer)
    for add, token in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if token is not None:
            add(token)
    writer.add_add_bos_token(before == [tokenizer.bos_token_id])
    writer.add_add_eos_token(after == [tokenizer.eos_token_id])
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _tokens(content: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Every entry and its kind, by number; numbers without an entry are filled up, and never come out of a text."""
    names: dict[int, str] = {number: token for token, number in content["model"]["vocab"].items()}
    added = {token["id"]: token for token in content["added_tokens"]}
    names |= {number: token["content"] for number, token in added.items()}
    if max(names) >= size:
        raise _unsupported(f"has {max(names) + 1} entries for {size} embeddings")
    unknown = content["model"].get("unk_token")
    tokens, kinds = [], []
    for number in range(size):
        token = names.get(number)
        tokens.append(f"[PAD{number}]" if token is None else token)
        kinds.append(int(_kind(token, added.get(number), unknown, bytes_fall_back=_falls_back(content))))
    return tokens, kinds


def _kind(
    token: str | None, added: dict[str, Any] | None, unknown: str | None, *, bytes_fall_back: bool
) -> TokenType:
    if token is None:
        return TokenType.UNUSED
    if token == unknown:
        return TokenType.UNKNOWN
    if added is not None:
        return TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    if bytes_fall_back and _BYTE.fullmatch(token):
        return TokenType.BYTE
    return TokenType.NORMAL


def _falls_back(content: dict[str, Any]) -> bool:
    return bool(content["model"].get("byte_fallback"))


def _is_sentencepiece(content: dict[str, Any]) -> bool:
    """Whether spaces are written as sentencepiece writes them, instead of bytes as letters."""
    return _falls_back(content) and _SPACE in json.dumps(
        [content["normalizer"], content["pre_tokenizer"], content["decoder"]], ensure_ascii=False
    )


def _adds_space(content: dict[str, Any]) -> bool:
    parts = [
        *_parts(content["normalizer"], "normalizers"),
        *_parts(content["pre_tokenizer"], "pretokenizers"),
    ]
    return any(
        part["type"] == "Prepend" or part.get("prepend_scheme") in {"first", "always"} for part in parts
    )


def _scores(tokens: list[str], merges: list[Any]) -> list[float]:
    """Sentencepiece merges the pair whose result has the highest score: the earlier a merge, the higher."""
    rank: dict[str, int] = {}
    for number, pair in enumerate(merges):
        left, right = pair.split(" ") if isinstance(pair, str) else pair
        rank.setdefault(left + right, number)
    return [-float(rank.get(token, len(merges))) for token in tokens]


def _expression(content: dict[str, Any]) -> str:
    """llama.cpp's name for how text is split before byte-level merging."""
    parts = _parts(content["pre_tokenizer"], "pretokenizers")
    if not parts or parts[-1]["type"] != "ByteLevel" or parts[-1].get("add_prefix_space"):
        raise _unsupported("is no byte-level BPE")
    if content["normalizer"] not in (None, {"type": "NFC"}):
        raise _unsupported(f"normalizes text ({content['normalizer']['type']})")
    before, last = parts[:-1], parts[-1]
    if last.get("use_regex", True):
        if not before:
            return "gpt-2"
        if [part["type"] for part in before] == ["Digits"] and before[0]["individual_digits"]:
            return "smollm"
    elif len(before) == 1 and before[0]["type"] == "Split":
        found = _EXPRESSIONS.get(before[0]["pattern"].get("Regex", ""))
        if found is not None:
            return found
    raise _unsupported("splits text in a way that llama.cpp has no name for")


def _parts(part: dict[str, Any] | None, plural: str) -> list[dict[str, Any]]:
    """The members of a sequence, or the one there is."""
    if part is None:
        return []
    return list(part[plural]) if part["type"] == "Sequence" else [part]


def _unsupported(why: str) -> UnsupportedForModel:
    return UnsupportedForModel(
        f"The model's tokenizer {why}, which a GGUF file cannot say.",
        code="unsupported_tokenizer",
        hint="Use quantize.calibrated or optimize.onnx, whose results keep the tokenizer's own files.",
    )
