from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from technique_runs import context_for
from tiny_models import Tensors, changed

from app.spec.base import Step
from app.spec.gguf import QuantizeGguf
from app.spec.quantize import QuantizeCalibrated, QuantizeWeights
from app.spec.quantize_onnx import QuantizeOnnx
from workers.engine.quantize.silent_channels import SilentChannels, ZeroOutputs, carrying_outputs
from workers.engine.technique import StepOutcome, run_step

Tiny = Callable[[str], Path]
GATE, UP, DOWN = (f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down"))


def with_zeros(source: Path, target: Path, rows: dict[str, Sequence[int]], *, dim: int = 0) -> Path:
    """A copy of a model with some rows (or columns) of weights set to zero."""

    def clear(tensors: Tensors) -> None:
        for name, indices in rows.items():
            tensors[f"{name}.weight"].index_fill_(dim, torch.tensor(indices), 0.0)

    return changed(source, target, clear)


def outcome_of(step: Step, source: Path, text: Path, tmp_path: Path) -> StepOutcome:
    target = tmp_path / "target"
    target.mkdir()
    return run_step(step, context_for(step, source, target, text))


@pytest.mark.parametrize(
    ("step", "fate"),
    [
        (QuantizeCalibrated(group_size=32, calibration_tokens=256), "rounded to nearest"),
        (QuantizeGguf(mix="Q4_0", calibration_tokens=256), "became zero"),
        (QuantizeOnnx(calibration_tokens=256), "rounded to nearest"),
    ],
    ids=lambda value: value.technique if isinstance(value, Step) else "",
)
def test_zero_channels_and_the_dead_inputs_they_feed_are_counted_and_named(
    step: Step, fate: str, tiny: Tiny, tiny_text: Path, tmp_path: Path
) -> None:
    source = with_zeros(tiny("LlamaForCausalLM"), tmp_path / "source", {GATE: [5], UP: [3, 5]})
    flags = {flag.code: flag.detail for flag in outcome_of(step, source, tiny_text, tmp_path).flags}
    assert f"3 in 2 layers ({GATE}: 1, {UP}: 2)" in flags["zero_channels"]
    # Each channel is a product of both: one zero factor silences it.
    assert f"2 in 1 layer ({DOWN}: 2)" in flags["dead_inputs"]
    assert fate in flags["dead_inputs"]


def test_quantize_weights_counts_zero_channels(tiny: Tiny, tiny_text: Path, tmp_path: Path) -> None:
    source = with_zeros(tiny("LlamaForCausalLM"), tmp_path / "source", {UP: [0, 127]})
    (flag,) = outcome_of(QuantizeWeights(group_size=32), source, tiny_text, tmp_path).flags
    assert flag.code == "zero_channels"
    assert f"2 in 1 layer ({UP}: 2)" in flag.detail


def test_outputs_are_columns_where_weights_are_stored_inputs_first(
    tiny: Tiny, tiny_text: Path, tmp_path: Path
) -> None:
    name = "transformer.h.2.mlp.c_fc"
    source = with_zeros(tiny("GPT2LMHeadModel"), tmp_path / "source", {name: [1]}, dim=1)
    (flag,) = outcome_of(QuantizeWeights(bits=8), source, tiny_text, tmp_path).flags
    assert f"1 in 1 layer ({name}: 1)" in flag.detail


def test_sound_weights_raise_nothing(tiny: Tiny, tiny_text: Path, tmp_path: Path) -> None:
    step = QuantizeCalibrated(group_size=32, calibration_tokens=256)
    assert outcome_of(step, tiny("LlamaForCausalLM"), tiny_text, tmp_path).flags == ()


def test_however_many_layers_there_are_few_are_named() -> None:
    silent = SilentChannels()
    for index in range(40):
        silent.add_zero_outputs(f"model.layers.{index}.up_proj.weight", 2)
    (flag,) = silent.flags(dead_weights="")
    assert "80 in 40 layers" in flag.detail
    assert "and 35 more" in flag.detail
    assert "layers.5." not in flag.detail


@pytest.mark.parametrize("inputs_first", [False, True])
def test_zero_outputs_are_counted_over_the_parts_of_a_weight(inputs_first: bool) -> None:
    weight = torch.ones(6, 5)
    # A column, and three rows in two parts, the last of which has nothing else.
    weight[[0, 4, 5]] = 0
    weight[:, 3] = 0
    outputs = ZeroOutputs(inputs_first)
    for rows in weight.split(2):
        outputs.add(carrying_outputs(rows, inputs_first=inputs_first))
    assert outputs.count == (1 if inputs_first else 3)
