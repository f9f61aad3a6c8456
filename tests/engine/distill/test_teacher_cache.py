from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from workers.engine.distill.losses import Blend, Head, TeacherStates, blended, token_loss
from workers.engine.distill.teacher_cache import Likeliest, TeacherCache, likeliest

TOKENS, WIDTH, VOCABULARY = 6, 8, 37
LABELS = torch.arange(TOKENS) * 5 % VOCABULARY


def _random(*shape: int, seed: int) -> Tensor:
    return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _teacher(seed: int = 2) -> TeacherStates:
    return TeacherStates(
        _random(TOKENS, WIDTH, seed=seed), Head(_random(VOCABULARY, WIDTH, seed=3), scale=0.5)
    )


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_whole_vocabulary_is_the_teacher(temperature: float) -> None:
    blend = Blend(temperature, 0.2)
    results = []
    for k in (None, VOCABULARY, 4096):
        hidden = _random(TOKENS, WIDTH, seed=1).requires_grad_()
        head = Head(_random(VOCABULARY, WIDTH, seed=4))
        teacher = _teacher() if k is None else likeliest(_teacher(), k=k, temperature=temperature)
        loss = token_loss(hidden, head, teacher, LABELS, blend)
        loss.backward()
        results.append((loss.detach(), hidden.grad))
    for loss, gradient in results[1:]:
        torch.testing.assert_close(loss, results[0][0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(gradient, results[0][1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_rest_is_one_class_more(temperature: float) -> None:
    student = _random(TOKENS, VOCABULARY, seed=1).requires_grad_()
    known = likeliest(_teacher(), k=5, temperature=temperature)
    q = torch.softmax(student / temperature, -1)
    p_known, q_known = known.log_probabilities.exp(), q.gather(1, known.ids)
    p_left, q_left = 1 - p_known.sum(-1), 1 - q_known.sum(-1)
    expected = temperature**2 * (
        (p_known * (p_known / q_known).log()).sum() + (p_left * (p_left / q_left).log()).sum()
    )
    (gradient,) = torch.autograd.grad(expected, student)
    filled = known.logits(slice(0, TOKENS), student.detach(), temperature)
    loss, ours = blended(student.detach(), filled, LABELS, Blend(temperature, 0.0))
    assert float(loss) == pytest.approx(float(expected.detach()), rel=1e-4)
    torch.testing.assert_close(ours, gradient, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize(("vocabulary", "each"), [(37, 4), (2**16 + 1, 6)])
def test_records_come_back_as_they_were_written(vocabulary: int, each: int, tmp_path: Path) -> None:
    cache = TeacherCache(tmp_path / "teacher", tokens=3, k=2, vocabulary=vocabulary)
    ids = torch.arange(4 * 3 * 2).view(12, 2) * (vocabulary // 24) + vocabulary % 24
    logs = -torch.arange(24.0).view(12, 2) / 8
    told: list[int] = []
    parts = [Likeliest(ids[i : i + 6], logs[i : i + 6]) for i in (0, 6)]
    cache.write(parts[:1], told.append)
    # Half a record more, as a kill leaves it.
    with (tmp_path / "teacher").open("ab") as file:
        file.write(b"half")
    cache.write(parts[1:], told.append)
    assert told == [2, 4]
    assert cache.bytes_per_token == 2 * each
    assert (tmp_path / "teacher").stat().st_size == 12 * 2 * each
    read = cache.read([3, 0], "cpu")
    assert torch.equal(read.ids, torch.cat([ids[9:], ids[:3]]))
    assert torch.equal(read.log_probabilities.float(), torch.cat([logs[9:], logs[:3]]))


def test_probabilities_that_rounding_made_too_many_give_finite_losses() -> None:
    known = Likeliest(torch.tensor([[1, 2]]), torch.tensor([[-0.001, -6.0]]))
    assert float(known.log_probabilities.exp().sum()) > 1
    filled = known.logits(slice(0, 1), _random(1, 5, seed=1), 1.0)
    assert bool(filled.isfinite().all())
