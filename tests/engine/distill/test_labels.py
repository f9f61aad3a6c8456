"""Labels of training texts: each goes with its text, and counts in the loss by its weight."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import torch
from tiny_models import facts_of, write_labelled
from torch.nn import functional

from app.spec.distill import DistillLogits
from workers.engine.architectures.loading import load_model, load_tokenizer
from workers.engine.distill.losses import soft_loss
from workers.engine.distill.objectives import Classroom, objective_for
from workers.engine.distill.texts import TrainingText, document_text

WORDS = ("river", "bread")


@pytest.fixture(scope="module")
def model(tiny: Callable[[str], Path]) -> Path:
    return tiny("DistilBertForSequenceClassification")


@pytest.fixture(scope="module")
def training(model: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainingText:
    """Every third text is about bread, and every fifth is cut in pieces."""
    classes = [int(number % 3 == 0) for number in range(40)]
    texts = [" ".join([WORDS[label]] * (40 if at % 5 == 0 else 3)) for at, label in enumerate(classes)]
    path = write_labelled(tmp_path_factory.mktemp("labels") / "set", texts, classes)
    spec = DistillLogits(batch_size=4, sequence_length=16, max_steps=20, held_out_fraction=0.2)
    return document_text(spec, path, load_tokenizer(model), facts_of(model), seed=0)


def test_labels_stay_with_their_texts_through_cutting_and_drawing(
    model: Path, training: TrainingText
) -> None:
    tokenizer = load_tokenizer(model)
    batches = [*islice(training.batches(), 30), *training.held_out]
    seen = set()
    for batch in batches:
        assert batch.labels is not None
        for ids, label in zip(batch.ids, batch.labels.tolist(), strict=True):
            assert WORDS[label] in tokenizer.decode(ids)
            seen.add(label)
    assert seen == {0, 1}
    assert len(training.sequences) > 40


def test_the_loss_weighs_labels_against_what_the_teacher_says(model: Path, training: TrainingText) -> None:
    student, teacher = load_model(model), load_model(model)
    with torch.no_grad():
        student.classifier.weight.mul_(3)
    batch = next(training.batches())
    assert batch.labels is not None
    logits, taught = (network(batch.ids, attention_mask=batch.mask).logits for network in (student, teacher))
    soft = soft_loss(logits, taught, temperature=2.0)
    hard = functional.cross_entropy(logits, batch.labels)
    for weight, expected in ((0.0, soft), (0.3, 0.7 * soft + 0.3 * hard), (1.0, hard)):
        spec = DistillLogits(temperature=2.0, hard_label_weight=weight)
        room = Classroom(student, teacher, spec, training.held_out, "cpu", torch.float32)
        torch.testing.assert_close(objective_for(room, facts_of(model), model).loss(batch), expected)


def test_texts_sorted_by_label_are_drawn_before_they_are_cut(model: Path, tmp_path: Path) -> None:
    classes = [0] * 50 + [1] * 50
    path = write_labelled(tmp_path / "set", [WORDS[label] for label in classes], classes)
    spec = DistillLogits(batch_size=4, sequence_length=16, max_steps=5, held_out_fraction=0.2)

    def drawn(seed: int) -> TrainingText:
        return document_text(spec, path, load_tokenizer(model), facts_of(model), seed=seed)

    text, again, other = drawn(0), drawn(0), drawn(1)
    assert text.labels is not None
    trained, held_out = text.labels[: len(text.sequences)], text.labels[len(text.sequences) :]
    for part in (trained, held_out):
        assert 0.2 < part.double().mean() < 0.8
    assert again.labels is not None
    assert other.labels is not None
    assert torch.equal(text.labels, again.labels)
    assert not torch.equal(text.labels, other.labels)
