"""GPT-2, whose linear layers are stored (in, out)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import facts_of

from app.errors import UnsupportedForModel
from app.spec.prune import PruneMagnitude
from app.spec.quantize import QuantizeCalibrated, QuantizeWeights
from workers.engine.architectures.loading import load_model
from workers.engine.architectures.transposed import use_linear_layers
from workers.engine.technique import StepContext, run_step

Tiny = Callable[[str], Path]


def context(source: Path, target: Path, text: Path | None = None) -> StepContext:
    target.mkdir()
    return StepContext(
        source=source, target=target, original=source, facts=facts_of(source), calibration_text=text
    )


@torch.inference_mode()
def test_linear_layers_compute_what_conv1d_does(tiny: Tiny) -> None:
    model, tokens = load_model(tiny("GPT2LMHeadModel")), torch.arange(10, 30).view(2, 10)
    before = model(tokens)[0]
    use_linear_layers(model)
    layer = model.transformer.h[0].mlp.c_fc
    assert isinstance(layer, torch.nn.Linear)
    assert layer.weight.shape == (128, 64)
    torch.testing.assert_close(model(tokens)[0], before)


def test_two_of_four_is_along_inputs(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny("GPT2LMHeadModel")
    run_step(PruneMagnitude(pattern="2:4"), context(source, tmp_path / "out"))
    before, after = (load_file(path / "model.safetensors") for path in (source, tmp_path / "out"))
    name = "transformer.h.2.attn.c_attn.weight"
    fours = [tensors[name].view(16, 4, -1).abs() for tensors in (before, after)]
    smallest = fours[0].argsort(dim=1)[:, :2]
    assert (fours[1].gather(1, smallest) == 0).all()
    assert torch.equal(fours[1].sum(1), fours[0].scatter(1, smallest, 0).sum(1))


def test_report_says_along_what_the_scales_run(tiny: Tiny, tmp_path: Path) -> None:
    outcome = run_step(QuantizeWeights(bits=8), context(tiny("GPT2LMHeadModel"), tmp_path / "out"))
    assert any("along outputs" in warning for warning in outcome.warnings)


def test_compensating_along_inputs_is_refused(tiny: Tiny, tiny_text: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedForModel, match=r"quantize\.weights"):
        run_step(QuantizeCalibrated(), context(tiny("GPT2LMHeadModel"), tmp_path / "out", tiny_text))
    assert list((tmp_path / "out").iterdir()) == []
