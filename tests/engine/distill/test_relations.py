from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import HIDDEN, tiny_model

from app.errors import UnsupportedForModel
from app.spec.architectures import ARCHITECTURES
from app.spec.attention import projections_among
from workers.engine.architectures.loading import load_model
from workers.engine.distill.relations import Relations, relation_divergence

IDS = torch.arange(5, 25)[None]
MASK = torch.ones_like(IDS)
FUSED = {"GPT2LMHeadModel", "GPTNeoXForCausalLM", "Phi3ForCausalLM", "ModernBertForMaskedLM"}


def test_divergence_is_that_of_the_formula_without_padding() -> None:
    student, teacher = torch.randn(2, 5, 48, dtype=torch.float64), torch.randn(2, 5, 80, dtype=torch.float64)
    lengths = (5, 3)
    mask = (torch.arange(5) < torch.tensor(lengths)[:, None]).long()
    found = []
    for text, length in enumerate(lengths):
        for token in range(length):
            for head in range(16):
                p, q = (
                    torch.softmax(x[text, :length, head * d : head * d + d] @ x[text, token, head * d : head * d + d] / math.sqrt(d), 0)
                    for x, d in ((teacher, 5), (student, 3))
                )  # fmt: skip
                found.append(float((p * (p / q).log()).sum()))
    ours = relation_divergence(student, teacher, mask)
    assert float(ours) == pytest.approx(sum(found) / len(found), rel=1e-4)


def test_gradients_are_finite_beside_padding() -> None:
    student = torch.randn(2, 5, 32, requires_grad=True)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    relation_divergence(student, torch.randn(2, 5, 32), mask).backward()
    assert bool(student.grad.isfinite().all())
    assert float(student.grad[1, 2:].abs().max()) == 0


@pytest.mark.parametrize(
    "architecture", ["LlamaForCausalLM", "BertModel", "DistilBertModel", "MPNetForMaskedLM"]
)
def test_a_student_has_the_relations_of_a_teacher_that_it_is(
    architecture: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    teacher, same = load_model(tiny(architecture)), load_model(tiny(architecture))
    other = load_model(tiny_model(architecture, tmp_path, seed=3))
    losses = []
    for student in (same, other):
        relations = Relations(student, teacher)
        assert not list(relations.parameters())
        with relations.recorded() as recorded:
            student.base_model(input_ids=IDS)
            teacher.base_model(input_ids=IDS)
        assert [len(outputs) for outputs in recorded] == [3, 3]
        losses.append(relations.loss(recorded, MASK))
    assert float(losses[0].detach()) == pytest.approx(0, abs=1e-6)
    assert float(losses[1].detach()) > 1e-4
    losses[1].backward()
    assert sum(p.grad is not None and float(p.grad.abs().max()) > 0 for p in other.parameters()) > 3


@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if not a.endswith(("MaskedLM", "Classification"))] + sorted(FUSED))  # fmt: skip
def test_one_layer_for_all_three_is_told_apart(architecture: str, tiny: Callable[[str], Path]) -> None:
    model = load_model(tiny(architecture))
    names = [name for name, _ in model.named_modules()]
    if architecture in FUSED or architecture == "ModernBertModel":
        assert projections_among(names) is None
        with pytest.raises(UnsupportedForModel, match="one layer"):
            Relations(model, model)
    else:
        assert projections_among(names) is not None
        assert [len(layers) for layers in Relations(model, model)._layers] == [3, 3]


def test_widths_may_differ(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    narrow = tiny_model(
        "LlamaForCausalLM", tmp_path, hidden_size=HIDDEN // 2, num_hidden_layers=2, head_dim=8
    )
    student, teacher = load_model(narrow), load_model(tiny("LlamaForCausalLM"))
    relations = Relations(student, teacher)
    with relations.recorded() as recorded:
        student.base_model(input_ids=IDS)
        teacher.base_model(input_ids=IDS)
    assert float(relations.loss(recorded, MASK).detach()) > 0
