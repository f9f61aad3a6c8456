"""NF4 in bitsandbytes' layout: the table by its definition, the file bit by bit, and which layers its loader converts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import facts_of, tiny_model
from torch import Tensor, nn
from transformers.quantizers.quantizers_utils import should_convert_module

from app.errors import VerificationFailed
from app.spec.compression import CompressionSpec
from app.spec.facts import TensorFact
from app.spec.plan import plan_job
from app.spec.quantize import QuantizeCalibrated, QuantizeWeights
from app.spec.stored import stored_tensors
from workers.engine.architectures.loading import load_model
from workers.engine.checkpoint.layout import DTYPE_NAMES, TensorEntry
from workers.engine.export import nf4_packed
from workers.engine.export.nf4_packed import Nf4Layer, doubly_quantized, dynamic_map, stored_scales
from workers.engine.export.nf4_reader import read_nf4
from workers.engine.measure.results import Loading
from workers.engine.measure.runner_torch import TorchRunner
from workers.engine.measure.size import measure_size
from workers.engine.quantize.float_grids import NF4_LEVELS, Nf4Grid
from workers.engine.quantize.layer_fit import LayerFit
from workers.engine.quantize.layer_solver import LayerSolver
from workers.engine.quantize.packed_layers import planned_layer
from workers.engine.technique import StepContext, StepOutcome, run_step

Tiny = Callable[[str], Path]
# Nine blocks a row: blocks of scales end within rows.
ROWS, COLUMNS = 300, 576
NAME = "model.layers.0.mlp.up_proj.weight"


def layer_of(*, double: bool) -> Nf4Layer:
    settings = QuantizeWeights(number_format="nf4", double_quantized=double).settings_of("x")
    entry = TensorEntry(NAME, torch.bfloat16, (ROWS, COLUMNS), Path(), 0, 2 * ROWS * COLUMNS)
    layer = planned_layer(entry, settings)
    assert isinstance(layer, Nf4Layer)
    return layer


def weights() -> Tensor:
    drawn = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)) * 0.05
    drawn[3, :64] = 0
    drawn[70] = 0
    return drawn


def fit_of(layer: Nf4Layer) -> LayerFit:
    return layer.nearest(weights(), layer.grid(0.0))


def written(layer: Nf4Layer, directory: Path) -> dict[str, Tensor]:
    tensors = layer.tensors(fit_of(layer))
    save_file(tensors, directory / "model.safetensors")
    return tensors


def test_the_numbers_are_the_quantiles_of_the_paper() -> None:
    # Dettmers et al. 2023, sec. 3 and appendix E: evenly spaced probabilities on both sides of an exact zero.
    offset = (1 / 32 + 1 / 30) / 2
    above = torch.special.ndtri(torch.linspace(1 - offset, 0.5, 9, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(1 - offset, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat((below, torch.zeros(1, dtype=torch.float64), above.flip(0))) / above[0]
    assert torch.tensor(NF4_LEVELS, dtype=torch.float64) == pytest.approx(levels, abs=3e-5)


def test_codes_are_the_nearest_numbers() -> None:
    exact = torch.randn(5000, generator=torch.Generator().manual_seed(1)) / 2
    levels = torch.tensor(NF4_LEVELS, dtype=torch.float64)
    wanted = levels[(exact.double().unsqueeze(1) - levels).abs().argmin(1)]
    assert torch.equal(Nf4Grid().nearest_(exact.clone()).double(), wanted)


@pytest.mark.parametrize("double", [False, True])
def test_tensors_are_those_announced_and_those_planned(double: bool) -> None:
    layer = layer_of(double=double)
    found = {n: (DTYPE_NAMES[t.dtype], tuple(t.shape)) for n, t in layer.tensors(fit_of(layer)).items()}
    assert {f.name: (f.dtype, f.shape) for f in layer.facts()} == found
    settings = QuantizeWeights(number_format="nf4", double_quantized=double).settings_of("x")
    fact = TensorFact(name=NAME, dtype="BF16", shape=(ROWS, COLUMNS))
    assert {f.name: (f.dtype, f.shape) for f in stored_tensors(fact, settings)} == found
    assert layer.stored_bits() == pytest.approx(4.13 if double else 4.5, abs=0.07)


@pytest.mark.parametrize("double", [False, True])
def test_slabs_join_to_the_whole(double: bool) -> None:
    layer = layer_of(double=double)
    fit = fit_of(layer)
    step = 256 if double else 50
    assert step % layer.row_multiple == 0
    slabs = [layer.parts(fit.of_rows(slice(start, start + step)), start) for start in range(0, ROWS, step)]
    for name, (_, whole) in layer.parts(fit, 0).items():
        pieces = [slab[name] for slab in slabs if name in slab]
        assert torch.equal(torch.cat([piece for _, piece in pieces]), whole)
        starts = [start for start, _ in pieces]
        assert starts == [sum(len(piece) for _, piece in pieces[:n]) for n in range(len(pieces))]


@pytest.mark.parametrize("double", [False, True])
def test_our_reader_and_the_definition_make_the_fitted_weights_of_the_file(
    double: bool, tmp_path: Path
) -> None:
    layer = layer_of(double=double)
    tensors = written(layer, tmp_path)
    restored = fit_of(layer).restored()
    assert torch.equal(dict(read_nf4(tmp_path))[NAME], restored)
    np.testing.assert_allclose(by_definition(tensors), restored.double().numpy(), rtol=2e-7, atol=0)


def by_definition(tensors: dict[str, Tensor]) -> np.ndarray:
    """The weight in float64, number by number."""
    state = json.loads(bytes(tensors[f"{NAME}.quant_state.bitsandbytes__nf4"].tolist()))
    absmax = tensors[f"{NAME}.absmax"].tolist()
    if "nested_blocksize" in state:
        levels, nested = (
            tensors[f"{NAME}.nested_quant_map"].tolist(),
            tensors[f"{NAME}.nested_absmax"].tolist(),
        )
        absmax = [
            levels[place] * nested[n // state["nested_blocksize"]] + state["nested_offset"]
            for n, place in enumerate(absmax)
        ]
    table = tensors[f"{NAME}.quant_map"].tolist()
    halves = [half for octet in tensors[NAME].flatten().tolist() for half in (octet >> 4, octet & 15)]
    values = [table[half] * absmax[n // state["blocksize"]] for n, half in enumerate(halves)]
    return np.array(values, dtype=np.float64).reshape(state["shape"])


def test_of_wide_layers_too_the_scales_that_were_measured_are_stored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # As with 256 of them, and 16,384 inputs: each row has blocks of scales of its own.
    monkeypatch.setattr(nf4_packed, "SCALES_PER_BLOCK", 4)
    step = QuantizeCalibrated(number_format="nf4", double_quantized=True, refinements=1)
    entry = TensorEntry(NAME, torch.bfloat16, (12, 256), Path(), 0, 2 * 12 * 256)
    layer = planned_layer(entry, step.settings_of("x"))
    assert layer.block_rows == 1
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(512, 256, generator=draw) @ torch.randn(256, 256, generator=draw)
    weight = torch.randn(12, 256, generator=draw) * 0.05
    fit = LayerSolver(step, 1).solve({NAME: weight}, {NAME: layer}, inputs.t() @ inputs)[NAME]
    tensors = {name: content for name, (_, content) in layer.parts(fit, 0).items()}
    stored = (
        dynamic_map()[tensors[f"{NAME}.absmax"].int()].view(12, 4) * tensors[f"{NAME}.nested_absmax"][:, None]
    )
    assert torch.equal(stored, fit.scale)


def test_scales_in_8_bits_cost_little_and_groups_of_zeros_nothing() -> None:
    weight, single = weights(), fit_of(layer_of(double=False))
    double = doubly_quantized(weight, single)
    before, after = ((fit.restored() - weight).square().sum() for fit in (single, double))
    assert before < after < 1.02 * before
    assert not double.restored()[weight == 0].any()
    assert (double.scale > 0).all()


def test_a_group_too_small_for_a_stored_scale_costs_the_others_nothing() -> None:
    weight = weights()
    weight[5, :64] *= 1e-9
    layer = layer_of(double=False)
    fit = doubly_quantized(weight, layer.nearest(weight, layer.grid(0.0)))
    _, largest = stored_scales(fit.scale)
    assert float(largest.max()) < 0.5


def test_the_numbers_of_scales_are_dense_near_their_largest_and_reach_far_down() -> None:
    levels = dynamic_map()
    assert len(levels) == 256
    assert torch.equal(levels[:127], -levels[128:255].flip(0))
    assert levels[127] == 0
    assert levels[255] == 1
    spacing = levels[-64:].diff()
    assert float(spacing.max()) < 0.0142
    assert 0 < levels[128] < 1e-6


def test_a_table_of_another_kind_is_not_read_as_nf4(tmp_path: Path) -> None:
    tensors = written(layer_of(double=False), tmp_path)
    tensors[f"{NAME}.quant_map"] = tensors[f"{NAME}.quant_map"].flip(0)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(VerificationFailed, match="not stored as NF4"):
        dict(read_nf4(tmp_path))


def run(source: Path, target: Path, step: QuantizeWeights | QuantizeCalibrated, text: Path) -> StepOutcome:
    target.mkdir()
    return run_step(
        step,
        StepContext(
            source=source,
            target=target,
            original=source,
            facts=facts_of(source),
            calibration_text=text if step.needs_calibration else None,
        ),
    )


@pytest.mark.parametrize(
    "architecture",
    ["LlamaForCausalLM", "Phi3ForCausalLM", "GPTNeoXForCausalLM", "BertForSequenceClassification", "ModernBertModel"],
)  # fmt: skip
def test_what_is_measured_is_the_file_and_bitsandbytes_would_convert_what_it_holds(
    architecture: str, tiny: Tiny, tiny_text: Path, tmp_path: Path
) -> None:
    source, target = tiny(architecture), tmp_path / "q"
    step = QuantizeWeights(number_format="nf4", double_quantized=True, ignore=("*.1.*",))
    outcome = run(source, target, step, tiny_text)
    runner = TorchRunner(target, device="cpu", threads=1)
    assert runner.facts.format == "bitsandbytes"
    assert runner.facts.loading == TorchRunner(source, device="cpu", threads=1).facts.loading
    model, rounded = load_model(source), dict(read_nf4(target))
    stored = load_file(target / "model.safetensors")
    converted = converted_modules(model, json.loads((target / "config.json").read_text()))
    quantized = [layer.name for layer in outcome.layers if layer.action == "quantized"]
    parameters = dict(model.named_parameters())
    for name in quantized:
        within = next(n for n in parameters if name.endswith(n) or n.endswith(name))
        parameters[within].data = rounded[name]
        assert within.removesuffix(".weight") in converted
        assert stored[name].dtype is torch.uint8
    assert len(converted) == len(quantized) == len(outcome.layers) * 3 // 4
    tokens = np.arange(10, 30)
    with torch.inference_mode():
        expected = model(torch.from_numpy(tokens)[None])[0].flatten(0, -2)
    torch.testing.assert_close(torch.from_numpy(runner.outputs(tokens)), expected, rtol=1e-4, atol=1e-5)
    plan = plan_job(CompressionSpec(steps=(step,)), facts_of(source))
    assert plan.output_bytes == pytest.approx((target / "model.safetensors").stat().st_size, abs=64)
    size = measure_size(target)
    assert size.parameters == facts_of(source).parameters
    assert size.low_bit_parameters == sum(
        layer.parameters for layer in outcome.layers if layer.name in quantized
    )


def converted_modules(model: nn.Module, config: dict[str, Any]) -> set[str]:
    """The layers that transformers replaces by bitsandbytes' when it loads such a file."""
    declared = config["quantization_config"]
    assert (declared["quant_method"], declared["bnb_4bit_quant_type"]) == ("bitsandbytes", "nf4")
    skipped = declared["llm_int8_skip_modules"]
    return {
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear and should_convert_module(name, skipped)
    }


@pytest.mark.parametrize("double", [False, True])
def test_calibration_loses_less_of_the_outputs_than_rounding(
    double: bool, tiny_text: Path, tmp_path: Path
) -> None:
    source = tiny_model("LlamaForCausalLM", tmp_path / "m", dtype=torch.bfloat16)
    lost = {}
    for solver in ("gptq", "nearest"):
        step = QuantizeCalibrated(
            number_format="nf4", double_quantized=double, solver=solver, calibration_tokens=1024
        )
        outcome = run(source, tmp_path / solver, step, tiny_text)
        lost[solver] = outcome.metrics["relative_output_error"]
        assert TorchRunner(tmp_path / solver, device="cpu", threads=1).facts.loading == Loading()
        before, after = load_file(source / "model.safetensors"), dict(read_nf4(tmp_path / solver))
        for layer in outcome.layers:
            error = after[layer.name].double() - before[layer.name].double()
            share = error.norm() / before[layer.name].double().norm()
            assert layer.relative_error == pytest.approx(share.item(), rel=1e-3)
    assert lost["gptq"] < 0.8 * lost["nearest"]
