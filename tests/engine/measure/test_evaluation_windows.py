from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from tiny_models import POSITIONS, SENTENCES, facts_of

from app.errors import InvalidRequest, JobFailed
from app.spec.compression import Evaluation
from workers.engine.architectures.loading import load_tokenizer
from workers.engine.calibration.builtin import builtin_text
from workers.engine.calibration.text import text_digest
from workers.engine.measure.windows import load_windows, overlap_share, prepare_evaluation, save_windows

Tiny = Callable[[str], Path]


def test_overlap_counts_sequences_that_stand_in_another_text() -> None:
    text = list(range(20))
    assert overlap_share(text, [list(range(100, 150))]) == 0
    assert overlap_share(text, [[7, 7, *range(20), 7]]) == 1
    # 20 tokens have 8 sequences of 13; those of the first 15 tokens are 3 of them.
    assert overlap_share(text, [[99], list(range(15))]) == pytest.approx(3 / 8)
    assert overlap_share(list(range(5)), [list(range(5))]) == 0


def test_built_in_texts_do_not_overlap(tiny: Tiny) -> None:
    tokenizer = load_tokenizer(tiny("LlamaForCausalLM"))
    evaluation, calibration = (
        tokenizer(builtin_text(name).read_text(encoding="utf-8"), verbose=False)["input_ids"]
        for name in ("evaluation", "calibration")
    )
    # A vocabulary of 320 cuts words into letters: 13 tokens are about two words here.
    assert overlap_share(evaluation, [calibration], n=60) == 0
    assert 60_000 < builtin_text("evaluation").stat().st_size < 95_000


def test_windows_survive_the_file(tmp_path: Path) -> None:
    windows = [np.arange(5), np.arange(3), np.arange(9)]
    save_windows(tmp_path / "w.npz", windows)
    for before, after in zip(windows, load_windows(tmp_path / "w.npz"), strict=True):
        assert before.tolist() == after.tolist()


def test_windows_of_a_language_model_are_one_stream_cut_to_what_it_takes(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("LlamaForCausalLM")
    prepared = prepare_evaluation(
        model,
        facts_of(model),
        Evaluation(tokens=1000, sequence_length=512),
        text=builtin_text("evaluation"),
        seen=[builtin_text("evaluation")],
        windows_file=tmp_path / "w.npz",
    )
    windows = load_windows(tmp_path / "w.npz")
    tokenizer = load_tokenizer(model)
    text = tokenizer.decode(np.concatenate(windows))
    assert {len(w) for w in windows} == {POSITIONS}
    assert builtin_text("evaluation").read_text(encoding="utf-8").startswith(text)
    assert prepared.kind == "causal_lm"
    assert prepared.text.overlap_share == pytest.approx(1, abs=0.02)
    assert prepared.text.sha256 == text_digest(builtin_text("evaluation"))
    # Nothing before its first token: that one is not predicted in any window.
    assert prepared.scored_bytes == len(text.encode()) - len(
        "".join(tokenizer.decode(w[:1]) for w in windows).encode()
    )


def test_texts_of_an_encoder_are_documents_in_special_tokens(
    tiny: Tiny, tiny_text: Path, tmp_path: Path
) -> None:
    model = tiny("BertModel")
    prepared = prepare_evaluation(
        model, facts_of(model), Evaluation(tokens=1500), text=tiny_text, windows_file=tmp_path / "w.npz"
    )
    tokenizer = load_tokenizer(model)
    first, *_ = load_windows(tmp_path / "w.npz")
    document = tiny_text.read_text().split("\n\n", maxsplit=1)[0]
    assert first.tolist() == tokenizer(document)["input_ids"]
    assert prepared.kind == "encoder"
    assert prepared.text.windows >= 24
    assert prepared.text.overlap_share is None


def test_a_text_without_documents_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("One line.")
    model = tiny("BertModel")
    with pytest.raises(InvalidRequest, match="similarities need at least 3"):
        prepare_evaluation(
            model,
            facts_of(model),
            Evaluation(),
            text=tmp_path / "short.txt",
            windows_file=tmp_path / "w.npz",
        )


def test_a_model_without_tokenizer_is_refused_with_a_way_out(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("LlamaForCausalLM")
    (tmp_path / "config.json").write_text((model / "config.json").read_text())
    with pytest.raises(JobFailed) as caught:
        prepare_evaluation(
            tmp_path,
            facts_of(model),
            Evaluation(),
            text=builtin_text("evaluation"),
            windows_file=tmp_path / "w.npz",
        )
    assert caught.value.code == "no_tokenizer"


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "BertModel"])
def test_overlap_is_seen_across_documents_shorter_than_a_sequence(
    architecture: str, tiny: Tiny, tmp_path: Path
) -> None:
    model = tiny(architecture)
    words = SENTENCES[0].rstrip(".").lower().split()
    for name, order in (("seen.txt", words), ("other.txt", words[::-1])):
        (tmp_path / name).write_text("\n\n".join(map(" ".join, product(order, order))))
    shares = {
        name: prepare_evaluation(
            model,
            facts_of(model),
            Evaluation(tokens=1000),
            text=tmp_path / "seen.txt",
            seen=[tmp_path / name],
            windows_file=tmp_path / "w.npz",
        ).text.overlap_share
        for name in ("seen.txt", "other.txt")
    }
    assert shares["seen.txt"] == 1
    # Two words of a vocabulary of 320 are a sequence, and some stand in both orders.
    assert shares["other.txt"] is not None
    assert shares["other.txt"] < 0.2
