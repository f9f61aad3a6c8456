"""Losses of distillation, each a function of tensors alone.

Over a large vocabulary the logits of a batch and their gradients take gigabytes. The loss of language models is
therefore computed from hidden states, a few tokens at a time, with the gradient in closed form.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

# Elements of logits held at once, per tensor of that size (a handful in fp32).
_CHUNK_ELEMENTS = 8 * 2**20


@dataclass(frozen=True)
class Blend:
    """How soft and hard targets are weighed: (1 − w)·T²·KL(teacher ‖ student) + w·cross-entropy."""

    temperature: float
    hard_label_weight: float


@dataclass(frozen=True)
class Head:
    """The last layer of a language model: logits = cap·tanh(scale·W·h / cap), or scale·W·h without a cap."""

    weight: Tensor
    """(vocabulary, hidden)."""
    softcap: float | None = None
    scale: float = 1.0


class Teacher(Protocol):
    """What is known of a teacher's next tokens."""

    def logits(self, span: slice, student: Tensor, temperature: float) -> Tensor:
        """Logits of some of the tokens, beside the student's own: (tokens, vocabulary) fp32 twice."""


@dataclass(frozen=True)
class TeacherStates:
    """The last hidden states of a model and its head: all that its logits are made of."""

    hidden: Tensor
    """(tokens, width)."""
    head: Head

    def logits(self, span: slice, student: Tensor, temperature: float) -> Tensor:  # noqa: ARG002
        """As the teacher itself gives them."""
        W = self.head.weight.to(self.hidden.dtype)
        return capped((self.hidden[span] * self.head.scale @ W.T).float(), self.head.softcap)


class Unasked:
    """A teacher that has no say, since the true next token alone counts."""

    def logits(self, span: slice, student: Tensor, temperature: float) -> Tensor:  # noqa: ARG002
        """The student's own."""
        return student


def soft_loss(student: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    """T²·KL(teacher ‖ student) of softened distributions, mean over rows: two (rows, classes) -> ().

    Soft-target gradients shrink as 1/T²; the factor restores their weight (Hinton et al. 2015, section 2).
    """
    student, teacher = (functional.log_softmax(x.float() / temperature, dim=-1) for x in (student, teacher))
    return temperature**2 * functional.kl_div(student, teacher, reduction="batchmean", log_target=True)


def similarity_loss(student: Tensor, teacher: Tensor, *, sharpness: float, temperature: float) -> Tensor:
    """Teach which texts of a batch are alike: two (texts, width), widths may differ -> ().

    Each row of the matrix of cosines, its own text left out, times `sharpness` is taken as logits.
    """
    student, teacher = (functional.normalize(x.float(), dim=-1) for x in (student, teacher))
    others = ~torch.eye(len(student), dtype=torch.bool, device=student.device)
    rows = ((x @ x.T)[others].view(len(x), -1) * sharpness for x in (student, teacher))
    return soft_loss(*rows, temperature=temperature)


def direction_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """1 − cosine of each text's two embeddings, mean: two (texts, width) -> ()."""
    return (1 - functional.cosine_similarity(student.float(), teacher.float(), dim=-1)).mean()


def token_loss(hidden: Tensor, head: Head, teacher: Teacher, labels: Tensor, blend: Blend) -> Tensor:
    """Blended loss of a language model, mean over tokens.

    `hidden` (tokens, width) are the last hidden states before the head; `labels` (tokens,) the true next tokens. Matrix
    products run in the dtype of the hidden states.
    """
    loss: Tensor = _TokenLoss.apply(hidden * head.scale, head.weight, teacher, labels, blend, head.softcap)  # type: ignore[no-untyped-call]
    return loss


def blended(student: Tensor, teacher: Tensor, labels: Tensor, blend: Blend) -> tuple[Tensor, Tensor]:
    """Blended loss summed over tokens, and its gradient by the student's logits.

    Two (tokens, vocabulary) in fp32 and (tokens,) -> (), (tokens, vocabulary).
    """
    T, w = blend.temperature, blend.hard_label_weight
    log_student = functional.log_softmax(student / T, dim=-1)
    log_teacher = functional.log_softmax(teacher / T, dim=-1)
    target = log_teacher.exp()
    loss = (1 - w) * T**2 * (target * (log_teacher - log_student)).sum()
    gradient = log_student.exp_().sub_(target).mul_((1 - w) * T)
    if w > 0:
        log_student = functional.log_softmax(student, dim=-1)
        loss = loss - w * log_student.gather(1, labels[:, None]).sum()
        hard = log_student.exp_()
        hard.scatter_add_(1, labels[:, None], -torch.ones_like(labels[:, None], dtype=hard.dtype))
        gradient.add_(hard, alpha=w)
    return loss, gradient


class _TokenLoss(torch.autograd.Function):
    """Gradients are made in the forward pass, chunk by chunk: no logits outlive their chunk."""

    @staticmethod
    def forward(  # noqa: PLR0913, PLR0917 - autograd passes tensors one by one
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        teacher: Teacher,
        labels: Tensor,
        blend: Blend,
        cap: float | None,
    ) -> Tensor:
        W = weight.to(hidden.dtype)
        hidden_gradient, weight_gradient = torch.empty_like(hidden), torch.zeros_like(weight)
        total = hidden.new_zeros((), dtype=torch.float32)
        rows = max(1, _CHUNK_ELEMENTS // len(weight))
        for start in range(0, len(hidden), rows):
            span = slice(start, start + rows)
            logits = capped((hidden[span] @ W.T).float(), cap)
            taught = teacher.logits(span, logits, blend.temperature)
            loss, gradient = blended(logits, taught, labels[span], blend)
            if cap is not None:
                gradient.mul_(1 - (logits / cap) ** 2)
            total += loss
            low = gradient.to(hidden.dtype)
            hidden_gradient[span] = low @ W
            weight_gradient += (low.T @ hidden[span]).to(weight_gradient.dtype)
        ctx.save_for_backward(hidden_gradient.div_(len(hidden)), weight_gradient.div_(len(hidden)))
        return total / len(hidden)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden_gradient, weight_gradient = ctx.saved_tensors
        scale = upstream[0]
        return (hidden_gradient * scale, weight_gradient * scale, *[None] * 4)


def capped(logits: Tensor, cap: float | None) -> Tensor:
    """Gemma 2's bound on logits: cap·tanh(logits / cap)."""
    return logits if cap is None else cap * torch.tanh(logits / cap)
