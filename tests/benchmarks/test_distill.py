from __future__ import annotations

from pathlib import Path

import pytest
import torch
from distill import ln_perplexity, rank_correlation, similarities, times_faster
from tiny_models import tiny_model

from workers.engine.architectures.loading import load_model, load_tokenizer

TEXTS = [
    "The river runs past the old mill.",
    "Bread needs flour.",
    "She read the letter twice, and put it away.",
]


def test_rank_correlation_is_spearmans() -> None:
    ours, theirs = torch.tensor([3.0, 1.0, 2.0, 5.0, 4.0]), torch.tensor([0.3, 0.2, 0.1, 0.5, 0.4])
    # 1 − 6 Σ d² / n (n² − 1), with ranks 3 1 2 5 4 and 3 2 1 5 4.
    assert rank_correlation(ours, theirs) == pytest.approx(1 - 6 * 2 / (5 * 24))
    assert rank_correlation(ours, ours.exp()) == pytest.approx(1)
    assert rank_correlation(ours, -ours) == pytest.approx(-1)


def test_similarities_are_of_each_text_alone_whatever_shares_its_batch(tmp_path: Path) -> None:
    model = tiny_model("BertModel", tmp_path)
    together = similarities(model, TEXTS, TEXTS[::-1])
    assert together.shape == (6,)
    assert float(together[1]) == pytest.approx(1, abs=1e-5)
    alone = similarities(model, TEXTS[:1], TEXTS[2:])
    assert float(together[0]) == pytest.approx(float(alone[0]), abs=1e-5)


def test_half_the_blocks_are_faster(tmp_path: Path) -> None:
    teacher = tiny_model("BertModel", tmp_path / "teacher", num_hidden_layers=12)
    student = tiny_model("BertModel", tmp_path / "student", num_hidden_layers=2)
    assert times_faster(teacher, student, TEXTS) > 1.5


def test_perplexity_is_the_models_own(tmp_path: Path) -> None:
    model, text = tiny_model("LlamaForCausalLM", tmp_path / "model"), tmp_path / "text.txt"
    text.write_text(" ".join(TEXTS) * 200)
    ids = torch.tensor([load_tokenizer(model)(text.read_text(), add_special_tokens=False)["input_ids"]])
    one = load_model(model)(input_ids=ids[:, :128], labels=ids[:, :128]).loss
    assert ln_perplexity(model, text, windows=1, length=128) == pytest.approx(float(one.detach()), rel=1e-4)
