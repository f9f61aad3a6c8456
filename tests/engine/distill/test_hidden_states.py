from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import BLOCKS, HIDDEN, changed, tiny_model

from workers.engine.architectures.block_removal import remove_blocks
from workers.engine.architectures.loading import load_model
from workers.engine.distill.hidden_states import (
    HiddenStates,
    evenly_matched,
    kept_blocks,
    relative_distance,
    stands_for,
)

IDS = torch.arange(5, 25)[None]
MASK = torch.ones_like(IDS)


def test_a_block_stands_for_itself_and_for_those_that_went_after_it() -> None:
    assert stands_for([0, 4, 5], 6) == [3, 4, 5]
    assert stands_for([0, 2], 4) == [1, 3]
    assert stands_for([0, 1, 2, 3], 4) == [0, 1, 2, 3]


def test_blocks_of_another_origin_are_matched_by_their_depth() -> None:
    assert evenly_matched(3, 12) == [3, 7, 11]
    for student in range(1, 20):
        for teacher in range(1, 20):
            matched = evenly_matched(student, teacher)
            assert matched == sorted(matched)
            assert matched[-1] == teacher - 1
            assert min(matched) >= 0


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "GPT2LMHeadModel", "BertModel"])
def test_a_pruned_student_is_known_by_its_weights(
    architecture: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    def half_to_zero(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if tensor.dim() == 2:
                tensors[name] = torch.where(tensor.abs() < tensor.abs().median(), 0.0, tensor)

    (tmp_path / "cut").mkdir()
    remove_blocks(tiny(architecture), tmp_path / "cut", [2], max_shard_bytes=2**30, progress=lambda *_: None)
    pruned = changed(tmp_path / "cut", tmp_path / "pruned", half_to_zero)
    teacher, other = load_model(tiny(architecture)), tiny_model(architecture, tmp_path / "other", seed=7)
    assert kept_blocks(load_model(pruned), teacher) == [0, 1, 3]
    assert kept_blocks(teacher, teacher) == [0, 1, 2, 3]
    assert kept_blocks(load_model(other), teacher) is None
    assert kept_blocks(teacher, load_model(pruned)) is None


def test_distance_is_that_of_the_formula_token_by_token() -> None:
    student, teacher = torch.randn(2, 7, 5, dtype=torch.float64)
    expected = (
        sum(float(((s - t) ** 2).sum() / (t**2).sum()) for s, t in zip(student, teacher, strict=True)) / 7
    )
    assert float(relative_distance(student, teacher)) == pytest.approx(expected)


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "BertModel", "GPT2LMHeadModel"])
def test_only_blocks_before_the_first_that_is_missing_agree(
    architecture: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    remove_blocks(tiny(architecture), tmp_path, [2], max_shard_bytes=2**30, progress=lambda *_: None)
    teacher, student = load_model(tiny(architecture)), load_model(tmp_path)
    hidden = HiddenStates(student, teacher, (HIDDEN, HIDDEN), stands_for([0, 1, 3], BLOCKS))
    assert not list(hidden.parameters())
    with hidden.recorded() as states:
        student.base_model(input_ids=IDS)
        teacher.base_model(input_ids=IDS)
    torch.testing.assert_close(states[0][0], states[1][0])
    # Block 1 stands for the missing block 2 as well.
    assert float(relative_distance(states[0][1], states[1][2]).detach()) > 1e-3
    loss = hidden.loss(states, MASK)
    assert float(loss.detach()) > 0
    loss.backward()
    assert all(
        float(p.grad.abs().max()) > 0 for n, p in student.named_parameters() if ".1." in n and "bias" not in n
    )


def test_a_student_of_another_width_learns_its_projections(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    narrow = tiny_model("LlamaForCausalLM", tmp_path, hidden_size=32, num_hidden_layers=2, head_dim=8, seed=5)
    teacher, student = load_model(tiny("LlamaForCausalLM")), load_model(narrow)
    hidden = HiddenStates(student, teacher, (32, HIDDEN), evenly_matched(2, BLOCKS))
    assert [tuple(p.shape) for p in hidden.parameters()] == [(HIDDEN, 32)] * 2
    with hidden.recorded() as states:
        student.base_model(input_ids=IDS)
        teacher.base_model(input_ids=IDS)
    hidden.loss(states, MASK).backward()
    assert all(float(p.grad.abs().max()) > 0 for p in hidden.parameters())


def test_padding_counts_for_nothing(tiny: Callable[[str], Path]) -> None:
    teacher, student = load_model(tiny("BertModel")), load_model(tiny("BertModel"))
    hidden = HiddenStates(student, teacher, (HIDDEN, HIDDEN), range(BLOCKS))
    mask = torch.cat([torch.ones(1, 12), torch.zeros(1, 8)], 1).long()
    with torch.no_grad(), hidden.recorded() as states:
        student(input_ids=IDS, attention_mask=mask)
        # Another token under the mask.
        teacher(input_ids=torch.cat([IDS[:, :12], IDS[:, 12:] + 3], 1), attention_mask=mask)
    assert float(hidden.loss(states, mask)) == pytest.approx(0, abs=1e-6)
