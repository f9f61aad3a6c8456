"""The head of a language model quantized with its layers: what is stored, what loads it, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_weights import assert_computes_with_dequantized_weights
from tiny_models import facts_of, tiny_model

from app.errors import UnsupportedForModel
from app.spec.compatibility import check_spec
from app.spec.compression import CompressionSpec
from app.spec.quantize import QuantizeCalibrated, QuantizedWeights, QuantizeWeights
from app.spec.sizes import Shape, after_step
from workers.engine.export.compressed_tensors import read_dequantized
from workers.engine.measure.results import Loading
from workers.engine.measure.runner_torch import TorchRunner
from workers.engine.technique import StepContext, StepOutcome, run_step

Tiny = Callable[[str], Path]
# transformers says that it heeds what it is asked for.
pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
HEAD_IN_8 = ({"layers": "lm_head", "bits": 8},)
SETTINGS: dict[str, tuple[type[QuantizedWeights], dict[str, Any]]] = {
    "int4": (QuantizeWeights, {"group_size": 32}),
    "int3-asymmetric": (QuantizeWeights, {"bits": 3, "group_size": 16, "symmetric": False}),
    "head-in-8": (QuantizeWeights, {"overrides": HEAD_IN_8}),
    "calibrated": (QuantizeCalibrated, {"group_size": 32, "calibration_tokens": 256}),
    "calibrated-asymmetric": (QuantizeCalibrated, {"symmetric": False, "calibration_tokens": 256}),
    "calibrated-head-in-8-cache": (
        QuantizeCalibrated,
        {"overrides": HEAD_IN_8, "calibration_tokens": 256, "kv_cache": "fp8"},
    ),
}


def run(source: Path, target: Path, step: QuantizedWeights, text: Path) -> StepOutcome:
    target.mkdir()
    context = StepContext(
        source=source, target=target, original=source, facts=facts_of(source), calibration_text=text
    )
    return run_step(step, context)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_head_is_stored_as_asked_for_and_loads(
    name: str, tiny: Tiny, tiny_text: Path, tmp_path: Path
) -> None:
    kind, given = SETTINGS[name]
    step = kind.model_validate(given | {"include_head": True})
    source, facts = tiny("LlamaForCausalLM"), facts_of(tiny("LlamaForCausalLM"))
    assert check_spec(CompressionSpec(steps=(step,)), facts) == []
    outcome = run(source, tmp_path / "q", step, tiny_text)
    planned = after_step(step, Shape.of(facts.tensors), facts, {})
    assert set(facts_of(tmp_path / "q").tensors) == set(planned.tensors)
    assert TorchRunner(tmp_path / "q", device="cpu", threads=1).facts.loading == Loading()
    before, after = load_file(source / "model.safetensors"), dict(read_dequantized(tmp_path / "q"))
    head = next(layer for layer in outcome.layers if layer.name == "lm_head.weight")
    error = (after[head.name] - before[head.name]).norm() / before[head.name].norm()
    assert head.relative_error == pytest.approx(error.item(), rel=1e-3)
    stored = sum(t.nbytes for t in planned.tensors if t.name.startswith("lm_head."))
    assert head.bits == 8 * stored / head.parameters
    assert int(head.bits) in ((8,) if "head-in-8" in name else (step.bits, step.bits + 1, step.bits + 2))


def test_transformers_computes_with_the_head_of_the_file(tiny: Tiny, tiny_text: Path, tmp_path: Path) -> None:
    run(tiny("LlamaForCausalLM"), tmp_path / "q", QuantizeWeights(include_head=True), tiny_text)
    assert "lm_head.weight_packed" in load_file(tmp_path / "q/model.safetensors")
    assert_computes_with_dequantized_weights(tiny("LlamaForCausalLM"), tmp_path / "q")


@pytest.mark.parametrize("architecture", ["Phi3ForCausalLM", "MixtralForCausalLM"])
def test_a_head_beside_fused_layers_or_experts_loads(
    architecture: str, tiny: Tiny, tiny_text: Path, tmp_path: Path
) -> None:
    run(tiny(architecture), tmp_path / "q", QuantizeWeights(include_head=True), tiny_text)
    runner = TorchRunner(tmp_path / "q", device="cpu", threads=1)
    assert runner.facts.loading == Loading()
    expected = dict(read_dequantized(tmp_path / "q"))["lm_head.weight"]
    torch.testing.assert_close(runner._model.lm_head.weight.data, expected)
    assert not torch.equal(expected, load_file(tiny(architecture) / "model.safetensors")["lm_head.weight"])


def test_the_embedding_stays_as_it_was(tiny: Tiny, tiny_text: Path, tmp_path: Path) -> None:
    source = tiny("LlamaForCausalLM")
    run(source, tmp_path / "q", QuantizeWeights(include_head=True), tiny_text)
    name = "model.embed_tokens.weight"
    files = (load_file(d / "model.safetensors") for d in (source, tmp_path / "q"))
    assert torch.equal(*(file[name] for file in files))


def test_all_slabs_of_a_large_head_are_rounded(tiny_text: Path, tmp_path: Path) -> None:
    # 4 MiB of rows a slab: several, and zero points that begin in the middle of none.
    source = tiny_model("LlamaForCausalLM", tmp_path / "m", vocab_size=40_000)
    step = QuantizeWeights(bits=3, symmetric=False, include_head=True)
    calibrated = QuantizeCalibrated(bits=3, symmetric=False, include_head=True, calibration_tokens=256)
    run(source, tmp_path / "q", step, tiny_text)
    run(source, tmp_path / "c", calibrated, tiny_text)
    heads = [dict(read_dequantized(tmp_path / where))["lm_head.weight"] for where in "qc"]
    original = load_file(source / "model.safetensors")["lm_head.weight"]
    assert torch.equal(*heads)
    errors = ((heads[0] - original).norm(dim=1) / original.norm(dim=1)).numpy()
    assert np.all((errors > 0.02) & (errors < 0.5))


@pytest.mark.parametrize(
    "architecture", ["OPTForCausalLM", "GPT2LMHeadModel", "GPTNeoXForCausalLM", "BertForMaskedLM"]
)
def test_a_head_that_cannot_stand_alone_is_refused(
    architecture: str, tiny: Tiny, tiny_text: Path, tmp_path: Path
) -> None:
    step = QuantizeWeights(include_head=True)
    faults = check_spec(CompressionSpec(steps=(step,)), facts_of(tiny(architecture)))
    assert [fault.pointer for fault in faults] == ["/steps/0/include_head"]
    with pytest.raises(UnsupportedForModel, match="no head that could be quantized"):
        run(tiny(architecture), tmp_path / "q", step, tiny_text)


def test_groups_must_divide_the_heads_inputs(tiny: Tiny) -> None:
    overrides = ({"layers": "lm_head", "group_size": 48},)
    step = QuantizeWeights.model_validate({"include_head": True, "overrides": overrides})
    (fault,) = check_spec(CompressionSpec(steps=(step,)), facts_of(tiny("LlamaForCausalLM")))
    assert "lm_head (64)" in fault.detail
