"""Vocabularies in GGUF's words, from tokenizers of each kind."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import transformers
from gguf import TokenType
from tiny_models import SENTENCES, VOCABULARY, write_tokenizer
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from app.errors import UnsupportedForModel
from workers.engine.export.gguf.tokenizer import read_vocabulary

LLAMA_3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def byte_level(*before: Any, use_regex: bool) -> Any:
    """A byte-level BPE whose text is split by `before` first."""
    tokenizer = Tokenizer(models.BPE())
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before, last]) if before else last
    return trained(tokenizer, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


def sentencepiece_like() -> Any:
    """As transformers has Llama 2's: spaces are ▁, unknown characters are bytes."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return trained(tokenizer, special_tokens=["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256))])


def trained(tokenizer: Tokenizer, **settings: Any) -> Any:
    trainer = trainers.BpeTrainer(vocab_size=400, show_progress=False, **settings)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize(
    ("before", "use_regex", "name"),
    [
        ((), True, "gpt-2"),
        ((pre_tokenizers.Digits(individual_digits=True),), True, "smollm"),
        ((pre_tokenizers.Split(Regex(LLAMA_3), "isolated"),), False, "llama-bpe"),
        ((pre_tokenizers.Split(Regex(LLAMA_3.replace("{1,3}", "")), "isolated"),), False, "qwen2"),
    ],
)
def test_a_way_to_split_text_has_llama_cpps_name(before: tuple[Any, ...], use_regex: bool, name: str) -> None:
    vocabulary = read_vocabulary(byte_level(*before, use_regex=use_regex), size=400)
    assert (vocabulary.model, vocabulary.pre) == ("gpt2", name)
    left, right = vocabulary.merges[0].split(" ")
    assert left + right in vocabulary.tokens


def test_other_ways_to_split_text_are_refused() -> None:
    tokenizer = byte_level(pre_tokenizers.Split(Regex(r"\p{N}{2}"), "isolated"), use_regex=False)
    with pytest.raises(UnsupportedForModel, match="splits text"):
        read_vocabulary(tokenizer, size=400)


def test_wordpiece_is_refused(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, wordpiece=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    with pytest.raises(UnsupportedForModel, match="WordPiece"):
        read_vocabulary(tokenizer, size=400)


def test_sentencepieces_scores_merge_in_the_order_of_the_merges() -> None:
    tokenizer = sentencepiece_like()
    vocabulary = read_vocabulary(tokenizer, size=420)
    assert (vocabulary.model, vocabulary.merges, vocabulary.add_space_prefix) == ("llama", [], True)
    for text in SENTENCES:
        assert merged_by_score(text, vocabulary.tokens, vocabulary.scores) == tokenizer(text)["input_ids"]


def merged_by_score(text: str, tokens: list[str], scores: list[float]) -> list[int]:
    """Sentencepiece's algorithm: the neighbours whose union scores highest are merged, the leftmost first."""
    number = {token: index for index, token in enumerate(tokens)}
    pieces = list("▁" + text.replace(" ", "▁"))
    while True:
        unions = [(a + b, i) for i, (a, b) in enumerate(pairwise(pieces)) if a + b in number]
        if not unions:
            return [number[piece] for piece in pieces]
        union, at = max(unions, key=lambda found: (scores[number[found[0]]], -found[1]))
        pieces[at : at + 2] = [union]


def test_entries_have_their_kinds_and_empty_numbers_are_filled(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, wordpiece=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    vocabulary = read_vocabulary(tokenizer, size=VOCABULARY + 7)
    assert len(vocabulary.tokens) == len(set(vocabulary.tokens)) == VOCABULARY + 7
    assert vocabulary.tokens[len(tokenizer) :] == [f"[PAD{n}]" for n in range(len(tokenizer), VOCABULARY + 7)]
    assert set(vocabulary.kinds[len(tokenizer) :]) == {TokenType.UNUSED}
    assert vocabulary.kinds[tokenizer.bos_token_id] == TokenType.CONTROL
    assert vocabulary.kinds[tokenizer("river")["input_ids"][0]] == TokenType.NORMAL


def test_more_entries_than_embeddings_are_refused(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, wordpiece=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    with pytest.raises(UnsupportedForModel, match="embeddings"):
        read_vocabulary(tokenizer, size=100)
