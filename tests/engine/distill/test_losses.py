from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from workers.engine.distill import losses
from workers.engine.distill.losses import (
    Blend,
    Head,
    TeacherStates,
    blended,
    direction_loss,
    similarity_loss,
    soft_loss,
    token_loss,
)

TOKENS, WIDTH, TEACHER_WIDTH, VOCABULARY = 13, 8, 12, 37


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _reference(student: Tensor, teacher: Tensor, labels: Tensor, blend: Blend) -> Tensor:
    """The docstring of the spec, term by term, in float64."""
    T, w = blend.temperature, blend.hard_label_weight
    p, q = torch.softmax(teacher / T, -1), torch.softmax(student / T, -1)
    kl = (p * (p / q).log()).sum(-1)
    cross_entropy = -torch.softmax(student, -1).gather(1, labels[:, None])[:, 0].log()
    return ((1 - w) * T**2 * kl + w * cross_entropy).mean()


@pytest.mark.parametrize("blend", [Blend(1.0, 0.0), Blend(2.0, 0.1), Blend(4.0, 1.0)])
def test_blended_loss_and_gradient_are_those_of_the_formula(blend: Blend) -> None:
    student, teacher = _random(TOKENS, VOCABULARY, seed=1), _random(TOKENS, VOCABULARY, seed=2)
    labels = torch.arange(TOKENS) * 5 % VOCABULARY
    student.requires_grad_()
    expected = _reference(student, teacher, labels, blend) * TOKENS
    (gradient,) = torch.autograd.grad(expected, student)
    loss, ours = blended(student.detach().float(), teacher.float(), labels, blend)
    assert float(loss) == pytest.approx(float(expected.detach()), rel=1e-5)
    torch.testing.assert_close(ours.double(), gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("cap", "scale"), [(None, 1.0), (3.0, 1.0), (None, 0.25), (3.0, 0.25)])
@pytest.mark.parametrize("rows", [4, 100])
def test_token_loss_in_chunks_is_the_whole_one(
    cap: float | None, scale: float, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "_CHUNK_ELEMENTS", rows * VOCABULARY)
    blend = Blend(2.0, 0.3)
    hidden = (2 * _random(TOKENS, WIDTH, seed=1)).requires_grad_()
    weight = _random(VOCABULARY, WIDTH, seed=2).requires_grad_()
    taught, taught_weight = _random(TOKENS, TEACHER_WIDTH, seed=3), _random(VOCABULARY, TEACHER_WIDTH, seed=4)
    labels = torch.arange(TOKENS) * 7 % VOCABULARY

    def capped(logits: Tensor) -> Tensor:
        return logits if cap is None else cap * torch.tanh(logits / cap)

    expected = _reference(
        capped(scale * hidden @ weight.T), capped(2 * scale * taught @ taught_weight.T), labels, blend
    )
    gradients = torch.autograd.grad(3 * expected, [hidden, weight])
    low, low_weight = (x.detach().float().requires_grad_() for x in (hidden, weight))
    head, teacher_head = Head(low_weight, cap, scale), Head(taught_weight.float(), cap, 2 * scale)
    loss = token_loss(low, head, TeacherStates(taught.float(), teacher_head), labels, blend)
    (3 * loss).backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    torch.testing.assert_close(low.grad.double(), gradients[0], atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(low_weight.grad.double(), gradients[1], atol=1e-5, rtol=1e-3)


def test_soft_loss_is_kl_times_temperature_squared() -> None:
    student, teacher = _random(5, 3, seed=1), _random(5, 3, seed=2)
    expected = _reference(student, teacher, torch.zeros(5, dtype=torch.long), Blend(3.0, 0.0))
    assert float(soft_loss(student, teacher, temperature=3.0)) == pytest.approx(float(expected), rel=1e-5)


def test_similarity_loss_compares_rows_of_cosines_without_the_text_itself() -> None:
    student, teacher = _random(4, 6, seed=1), _random(4, 9, seed=2)
    total = 0.0
    for i in range(4):
        others = [j for j in range(4) if j != i]
        rows = [
            torch.stack([functional.cosine_similarity(x[i], x[j], dim=0) for j in others]) * 20.0
            for x in (student, teacher)
        ]
        q, p = (torch.softmax(row / 2.0, -1) for row in rows)
        total += 4.0 * float((p * (p / q).log()).sum())
    ours = similarity_loss(student, teacher, sharpness=20.0, temperature=2.0)
    assert float(ours) == pytest.approx(total / 4, rel=1e-4)


def test_a_perfect_student_has_no_loss() -> None:
    same = _random(6, 5, seed=1)
    assert float(similarity_loss(3 * same, same, sharpness=20.0, temperature=1.0)) == pytest.approx(
        0, abs=1e-5
    )
    assert float(direction_loss(3 * same, same)) == pytest.approx(0, abs=1e-6)
    assert float(soft_loss(same, same, temperature=2.0)) == pytest.approx(0, abs=1e-6)


def test_direction_loss_of_opposite_embeddings_is_two() -> None:
    same = _random(6, 5, seed=1)
    assert float(direction_loss(-same, same)) == pytest.approx(2, abs=1e-6)
