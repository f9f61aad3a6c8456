from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from technique_runs import ALIKE
from tiny_models import BLOCKS, HEADS, TEXT_ARCHITECTURES, facts_of
from torch import Tensor

from app.spec.architectures import ARCHITECTURES
from app.spec.attention import has_attention_maps
from app.spec.compatibility import check_spec
from app.spec.compression import CompressionSpec
from workers.engine.architectures.block_removal import remove_blocks
from workers.engine.architectures.loading import load_model
from workers.engine.distill.attention_maps import AttentionMaps, map_divergence
from workers.engine.distill.blocks import recompute_activations

IDS = torch.arange(5, 25)[None]
MASK = torch.ones_like(IDS)
SHOWING = [
    pytest.param(name, marks=[pytest.mark.slow] if name in ALIKE else [])
    for name in TEXT_ARCHITECTURES
    if name.endswith(("CausalLM", "HeadModel", "Model")) and has_attention_maps(ARCHITECTURES[name])
]


def _maps(lengths: tuple[int, ...], heads: int) -> Tensor:
    """What tokens look at in texts of these lengths, padded to the longest, drawn at random."""
    maps = torch.zeros(len(lengths), heads, max(lengths), max(lengths), dtype=torch.float64)
    for text, length in enumerate(lengths):
        maps[text, :, :length, :length] = torch.randn(heads, length, length, dtype=torch.float64).softmax(-1)
    return maps


def test_divergence_is_that_of_the_formula_without_padding() -> None:
    torch.manual_seed(0)
    lengths = (5, 3)
    student, teacher = _maps(lengths, 4), _maps(lengths, 4)
    mask = (torch.arange(5) < torch.tensor(lengths)[:, None]).long()
    found = [
        sum(float(p * (p / q).log()) for p, q in zip(teacher[text, head, token, :length], student[text, head, token, :length], strict=True))
        for text, length in enumerate(lengths)
        for head in range(4)
        for token in range(length)
    ]  # fmt: skip
    assert float(map_divergence(student, teacher, mask)) == pytest.approx(sum(found) / len(found), rel=1e-4)
    averaged = map_divergence(student.mean(1, keepdim=True), teacher.mean(1, keepdim=True), mask)
    torch.testing.assert_close(map_divergence(student.mean(1, keepdim=True), teacher, mask), averaged)


@pytest.mark.parametrize("architecture", SHOWING)
@torch.inference_mode()
def test_every_block_shows_what_tokens_look_at(architecture: str, tiny: Callable[[str], Path]) -> None:
    model = load_model(tiny(architecture), attention="eager")
    maps = AttentionMaps(model, model, range(BLOCKS))
    with maps.recorded() as recorded:
        model(input_ids=IDS, attention_mask=MASK)
    for side in recorded:
        assert sorted(side) == list(range(BLOCKS))
        for weights in side.values():
            assert weights.shape == (1, HEADS, IDS.shape[1], IDS.shape[1])
            torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    assert float(maps.loss(recorded, MASK)) == pytest.approx(0, abs=1e-6)


def test_a_cut_student_is_taught_by_its_own_blocks_and_recomputing_changes_no_gradient(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    directory = tiny("LlamaForCausalLM")
    remove_blocks(directory, tmp_path, [0, 2], max_shard_bytes=2**30, progress=lambda *_: None)
    teacher = load_model(directory, attention="eager")
    gradients: list[dict[str, Tensor]] = []
    for recompute in (False, True):
        student = load_model(tmp_path, attention="eager")
        if recompute:
            recompute_activations(student)
        maps = AttentionMaps(student, teacher, [1, 3])
        with maps.recorded() as recorded:
            with torch.no_grad():
                taught = teacher(input_ids=IDS, use_cache=False, output_attentions=True).attentions
            student(input_ids=IDS, use_cache=False)
        assert all(torch.equal(recorded[1][index], taught[index]) for index in (1, 3))
        maps.loss(recorded, MASK).backward()
        gradients.append({n: p.grad for n, p in student.named_parameters() if p.grad is not None})
    assert gradients[0]["model.layers.1.self_attn.q_proj.weight"].abs().max() > 0
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("architecture", ["MPNetModel", "DebertaV2Model"])
def test_attention_that_shows_nothing_is_refused(architecture: str, tiny: Callable[[str], Path]) -> None:
    step: dict[str, Any] = {"technique": "distill.logits", "attention_weight": 1.0}
    spec = CompressionSpec.model_validate({"steps": [step], "training": {}})
    faults = check_spec(spec, facts_of(tiny(architecture)))
    assert [fault.pointer for fault in faults] == ["/steps/0/attention_weight"]
