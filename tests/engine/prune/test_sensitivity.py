"""What is predicted of pruning a layer alone, and what comes of sharing out sparsity by it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from technique_runs import digests
from tiny_models import BLOCKS, facts_of
from torch.nn.functional import kl_div

from app.spec.prune import SENSITIVITY_SPARSITIES, PruneCalibrated
from app.spec.report import SENSITIVITY
from workers.engine.architectures.loading import load_model, load_tokenizer
from workers.engine.calibration.windows import model_windows
from workers.engine.technique import StepContext, StepOutcome, run_step

Tiny = Callable[[str], Path]
TOKENS = 1024


class Stopped(Exception):  # noqa: N818 - what a cancelled job raises is no error
    """Raised by progress to stop."""


def run(source: Path, target: Path, text: Path, settings: dict[str, Any], **extra: Any) -> StepOutcome:
    target.mkdir()
    context = StepContext(
        source=source, target=target, original=source, facts=facts_of(source), calibration_text=text, **extra
    )
    return run_step(PruneCalibrated(calibration_tokens=TOKENS, **settings), context)


@torch.inference_mode()
def divergence(source: Path, target: Path, text: Path) -> float:
    """KL in nats a token on the text that was calibrated on."""
    windows = model_windows(load_tokenizer(source), text, facts_of(source), tokens=TOKENS, length=512)
    before, after = (load_model(path)(windows).logits.log_softmax(-1) for path in (source, target))
    return float(kl_div(after, before, log_target=True, reduction="sum")) / windows.numel()


@pytest.mark.parametrize("compensate", [True, False])
def test_the_curve_of_a_layer_is_what_pruning_it_alone_costs(
    compensate: bool, tiny: Tiny, tiny_text: Path, tmp_path: Path
) -> None:
    source = tiny("LlamaForCausalLM")
    settings: dict[str, Any] = {"compensate": compensate, "criterion": "magnitude"}
    curves = run(source, tmp_path / "all", tiny_text, settings | {"allocation": "sensitivity"}).curves
    modules = [name.removeprefix(SENSITIVITY) for name in curves if name.startswith(SENSITIVITY)]
    assert len(modules) == 7 * BLOCKS
    for module in (
        "model.layers.0.self_attn.o_proj",
        "model.layers.1.mlp.up_proj",
        "model.layers.3.mlp.down_proj",
    ):
        others = tuple(other for other in modules if other != module)
        target = tmp_path / module
        run(source, target, tiny_text, settings | {"ignore": others, "sparsity": 0.3})
        predicted = dict(curves[SENSITIVITY + module])[0.3]
        assert 0.5 < predicted / divergence(source, target, tiny_text) < 2


def test_curves_rise_and_stand_in_the_outcome_with_what_was_allotted(
    tiny: Tiny, tiny_text: Path, tmp_path: Path
) -> None:
    outcome = run(
        tiny("BertModel"), tmp_path / "out", tiny_text, {"allocation": "sensitivity", "sparsity": 0.6}
    )
    for name, curve in outcome.curves.items():
        if name.startswith(SENSITIVITY):
            assert tuple(x for x, _ in curve) == SENSITIVITY_SPARSITIES
            assert [y for _, y in curve] == sorted(y for _, y in curve)
    assert outcome.metrics["sparsity"] == pytest.approx(0.6, abs=2e-3)
    sparsities = [layer.sparsity or 0 for layer in outcome.layers]
    assert min(sparsities) >= 0.4 - 2e-3
    assert max(sparsities) <= 0.8 + 2e-3
    assert max(sparsities) - min(sparsities) > 0.1
    assert len(outcome.curves["block_sparsity"]) == BLOCKS
    assert [x for x, _ in outcome.curves["block_sensitivity_at_0.5"]] == list(range(BLOCKS))


def test_it_costs_less_than_the_same_sparsity_everywhere(tiny: Tiny, tiny_text: Path, tmp_path: Path) -> None:
    source = tiny("LlamaForCausalLM")
    lost = []
    for allocation in ("sensitivity", "uniform"):
        run(source, tmp_path / allocation, tiny_text, {"allocation": allocation})
        lost.append(divergence(source, tmp_path / allocation, tiny_text))
    assert lost[0] < 0.95 * lost[1]


def test_stopped_while_it_looks_it_ends_with_the_same_bytes(
    tiny: Tiny, tiny_text: Path, tmp_path: Path
) -> None:
    source, journal = tiny("LlamaForCausalLM"), tmp_path / "journal"
    settings = {"allocation": "sensitivity", "criterion": "taylor"}

    def stop(_share: float, _message: str) -> None:
        # Its gradients are written, and it has not been looked at.
        if (journal / "gradients-00001").exists():
            raise Stopped

    with pytest.raises(Stopped):
        run(source, tmp_path / "stopped", tiny_text, settings, journal=journal, progress=stop)
    assert not (journal / "probed-00001").exists()
    run(source, tmp_path / "resumed", tiny_text, settings, journal=journal)
    run(source, tmp_path / "whole", tiny_text, settings)
    assert digests(tmp_path / "resumed") == digests(tmp_path / "whole")
