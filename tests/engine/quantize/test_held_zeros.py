"""What was pruned stays zero through quantization, whatever the solver moves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_calibrated import run
from torch import Tensor

from app.spec.prune import PruneCalibrated
from app.spec.quantize import QuantizeCalibrated, QuantizeWeights
from workers.engine.export.compressed_tensors import read_dequantized
from workers.engine.quantize.held_zeros import held_zeros

NAME = "model.layers.1.mlp.down_proj.weight"


def weights_of(directory: Path) -> Tensor:
    return dict(read_dequantized(directory))[NAME]


@pytest.fixture(scope="module")
def pruned(tiny: Callable[[str], Path], tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("pruned")
    step = PruneCalibrated(pattern="2:4", calibration_tokens=512)
    run(tiny("LlamaForCausalLM"), target, tiny_text, step)
    return target


@pytest.mark.parametrize(
    "step",
    [
        QuantizeCalibrated(bits=4, group_size=16, calibration_tokens=512),
        QuantizeCalibrated(bits=3, group_size=16, symmetric=False, calibration_tokens=512),
        QuantizeCalibrated(bits=2, group_size=16, calibration_tokens=512, solver="signround", tuning_steps=5),
        QuantizeCalibrated(number_format="fp8", calibration_tokens=512),
        QuantizeCalibrated(bits=4, calibration_tokens=512, scaling="awq"),
        QuantizeWeights(bits=4, symmetric=False, group_size=16),
    ],
    ids=str,
)
def test_pruned_weights_stay_zero_and_others_do_not_follow(
    step: QuantizeCalibrated | QuantizeWeights, pruned: Path, tiny_text: Path, tmp_path: Path
) -> None:
    run(pruned, tmp_path, tiny_text, step)
    after = weights_of(tmp_path)
    zero = load_file(pruned / "model.safetensors")[NAME] == 0
    assert (after[zero] == 0).all()
    # Four levels have a zero among them; few weights are lost to it.
    assert (after[~zero] == 0).float().mean() < (0.6 if step.bits < 4 else 0.2)


def test_compensation_without_holding_would_fill_them(
    pruned: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.engine.quantize.layer_solver.is_pruned", lambda _: False)
    step = QuantizeCalibrated(bits=4, group_size=16, calibration_tokens=512)
    run(pruned, tmp_path, tiny_text, step)
    zero = load_file(pruned / "model.safetensors")[NAME] == 0
    assert (weights_of(tmp_path)[zero] != 0).any()


def test_a_layer_is_judged_by_itself_where_others_share_its_input(
    tiny: Callable[[str], Path], tiny_text: Path, tmp_path: Path
) -> None:
    step = PruneCalibrated(sparsity=0.3, ignore=("*gate_proj",), calibration_tokens=512)
    source, target = tmp_path / "pruned", tmp_path / "quantized"
    for directory in (source, target):
        directory.mkdir()
    run(tiny("LlamaForCausalLM"), source, tiny_text, step)
    run(source, target, tiny_text, QuantizeCalibrated(bits=8, calibration_tokens=512))
    name = "model.layers.1.mlp.up_proj.weight"
    zero = load_file(source / "model.safetensors")[name] == 0
    assert zero.any()
    assert (dict(read_dequantized(target))[name][zero] == 0).all()


def test_a_few_zeros_are_no_pruning() -> None:
    weight = torch.ones(8, 8)
    weight[0] = 0
    assert held_zeros(weight) is None
    weight[1] = 0
    held = held_zeros(weight)
    assert held is not None
    assert held.sum() == 16
