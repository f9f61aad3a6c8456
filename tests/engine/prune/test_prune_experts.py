from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import BLOCKS, EXPERTS, changed, facts_of

from app.spec import calibration_memory
from app.spec.compatibility import check_spec
from app.spec.compression import CompressionSpec
from app.spec.prune_experts import PruneExperts
from app.spec.report import StepReport
from workers.engine.architectures.loading import load_model, load_tokenizer
from workers.engine.calibration.windows import model_windows
from workers.engine.measure.coverage import compose
from workers.engine.prune.experts import most_needed, prune_experts
from workers.engine.technique import StepContext, StepOutcome

Tiny = Callable[[str], Path]
MIXTURE = "MixtralForCausalLM"


def _run(
    source: Path, target: Path, text: Path, *, more_devices: tuple[str, ...] = (), **step: Any
) -> StepOutcome:
    target.mkdir()
    context = StepContext(
        source=source, target=target, original=source, facts=facts_of(source), calibration_text=text,
        more_devices=more_devices,
    )  # fmt: skip
    return prune_experts(PruneExperts(**({"calibration_tokens": 256} | step)), context)


def _removed(outcome: StepOutcome, block: int) -> set[int]:
    """Which experts of a block went."""
    names = [layer.name for layer in outcome.layers if layer.action == "removed"]
    return {int(n.split(".experts.")[1].split(".")[0]) for n in names if f".layers.{block}." in n}


@pytest.mark.parametrize("criterion", ["contribution", "usage"])
def test_those_go_that_the_loaded_model_shows_to_add_least(
    criterion: str, tiny: Tiny, tiny_text: Path, tmp_path: Path
) -> None:
    source = tiny(MIXTURE)
    outcome = _run(source, tmp_path / "out", tiny_text, criterion=criterion, drop_ratio=0.5)
    facts, model = facts_of(source), load_model(source)
    windows = model_windows(load_tokenizer(source), tiny_text, facts, tokens=256, length=512)
    blocks = model.model.layers
    added = torch.zeros(len(blocks), EXPERTS, dtype=torch.float64)

    def look(index: int, fused: Any, given: tuple[torch.Tensor, ...]) -> None:
        hidden, chosen, weights = given
        for expert in range(EXPERTS):
            gate, up = (hidden @ fused.gate_up_proj[expert].T).chunk(2, dim=-1)
            output = (torch.nn.functional.silu(gate) * up) @ fused.down_proj[expert].T
            share = (weights * (chosen == expert)).sum(-1)
            counted = output.norm(dim=-1) * share if criterion == "contribution" else share > 0
            added[index, expert] += counted.double().sum()

    for index, block in enumerate(blocks):
        block.mlp.experts.register_forward_pre_hook(lambda m, given, index=index: look(index, m, given))
    with torch.inference_mode():
        model(windows)
    for index in range(len(blocks)):
        assert _removed(outcome, index) == set(
            added[index].topk(EXPERTS // 2, largest=False).indices.tolist()
        )


def test_an_expert_whose_outputs_are_nothing_goes_first_however_often_it_is_chosen(
    tiny: Tiny, tiny_text: Path, tmp_path: Path
) -> None:
    def silenced(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if ".experts.2.w2." in name:
                tensor.zero_()

    source = changed(tiny(MIXTURE), tmp_path / "source", silenced)
    outcome = _run(source, tmp_path / "out", tiny_text)
    assert [_removed(outcome, block) for block in range(4)] == [{2}] * 4
    assert all(share == 0 for _, share in outcome.curves["removed_share_of_contribution"])


def test_layers_of_the_experts_that_are_left_are_followed_into_the_next_step(
    tiny: Tiny, tiny_text: Path, tmp_path: Path
) -> None:
    outcome = _run(tiny(MIXTURE), tmp_path / "out", tiny_text)
    first = StepReport(technique="prune.experts", seconds=1, layers=outcome.layers)
    left = facts_of(tmp_path / "out").compressible()
    then = [
        {"name": t.name, "action": "untouched", "reason": "later", "parameters": t.elements} for t in left
    ]
    second = StepReport(technique="quantize.weights", seconds=1, layers=then)
    coverage = compose(facts_of(tiny(MIXTURE)), [first, second])
    kept = {layer.name for layer in coverage.untouched}
    touched = {layer.name.removesuffix(".weight") for layer in outcome.layers if layer.action != "untouched"}
    assert all(layer.reason == "later" for layer in coverage.untouched)
    assert kept.isdisjoint(touched)
    assert len(kept) + len(touched) == coverage.total


def test_the_earlier_of_two_equal_experts_stays() -> None:
    assert most_needed(torch.tensor([1.0, 3, 1, 3]), 3) == [0, 1, 3]


@pytest.mark.parametrize(
    ("step", "after"), [({}, 6), ({"drop_ratio": 0.9}, 2), ({"round_to": 4}, 4), ({"round_to": 16}, None)]
)
def test_at_least_as_many_stay_as_a_token_meets(step: dict[str, Any], after: int | None) -> None:
    assert PruneExperts(**step).experts_after(8, 2) == after


def test_what_has_no_experts_to_spare_is_refused_at_submit(tiny: Tiny) -> None:
    def faults(facts: Any, **step: Any) -> list[str]:
        return [f.detail for f in check_spec(CompressionSpec(steps=(PruneExperts(**step),)), facts)]

    mixture = facts_of(tiny(MIXTURE))
    assert faults(mixture) == []
    assert "no smaller multiple" in faults(mixture, round_to=4)[0]
    assert "no smaller" in faults(mixture.model_copy(update={"experts_per_token": EXPERTS}))[0]
    assert "has no experts" in faults(facts_of(tiny("LlamaForCausalLM")))[0]


def test_the_same_go_where_there_are_two_devices(
    tiny: Tiny, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One window at a time, else the devices would have nothing to share.
    monkeypatch.setattr(calibration_memory, "_FEATURES_AT_ONCE", 1)
    source = tiny(MIXTURE)
    outcomes = [
        _run(source, tmp_path / name, tiny_text, drop_ratio=0.5, calibration_tokens=4096, more_devices=more)
        for name, more in (("alone", ()), ("shared", ("cpu",)))
    ]
    for block in range(BLOCKS):
        assert _removed(outcomes[0], block) == _removed(outcomes[1], block)
    assert outcomes[0].curves == outcomes[1].curves
