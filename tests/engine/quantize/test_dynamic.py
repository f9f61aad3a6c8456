"""quantize.dynamic: the same numbers as PyTorch's own, read back by its own modules, and refused where it would mislead."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from technique_runs import tensors_of
from tiny_models import facts_of, tiny_model
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM

from app.errors import InvalidRequest, UnsupportedForModel
from app.spec.compatibility import check_spec
from app.spec.compression import CompressionSpec
from app.spec.plan import plan_job
from app.spec.quantize_dynamic import QuantizeDynamic
from workers.engine.architectures.loading import load_model
from workers.engine.export.dynamic_int8 import load_dynamic_int8
from workers.engine.technique import StepContext, StepOutcome, run_step

Tiny = Callable[[str], Path]
TOKENS = torch.arange(5, 45).reshape(2, 20)
SNIPPET = re.compile(r"```python\n(import warnings\n.*?)```", re.DOTALL)


def quantize(source: Path, target: Path, **settings: Any) -> StepOutcome:
    context = StepContext(source=source, target=target, original=source, facts=facts_of(source), threads=2)
    return run_step(QuantizeDynamic(**settings), context)


def quantized_by_torch(source: Path) -> nn.Module:
    """The model with every nn.Linear quantized by PyTorch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.ao.quantization import quantize_dynamic

        return quantize_dynamic(load_model(source), {nn.Linear}, dtype=torch.qint8)


@torch.inference_mode()
def outputs(model: nn.Module) -> Tensor:
    first: Tensor = model(TOKENS)[0]
    return first


@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [("LlamaForCausalLM", torch.float32), ("LlamaForCausalLM", torch.bfloat16), ("BertModel", torch.float32)],
)
def test_codes_and_scales_are_those_of_pytorch(architecture: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source = tiny_model(architecture, tmp_path / "source", dtype=dtype)
    outcome = quantize(source, tmp_path / "target")
    reference, tensors = quantized_by_torch(source), tensors_of(tmp_path / "target")
    assert outcome.layers
    for layer in outcome.layers:
        weight = reference.get_submodule(layer.name.removesuffix(".weight")).weight()  # type: ignore[operator]
        assert torch.equal(tensors[f"{layer.name}_int8"], weight.int_repr())
        assert tensors[f"{layer.name}_scale"].item() == weight.q_scale()
        assert weight.q_zero_point() == 0


def test_with_the_head_the_loaded_model_gives_what_pytorchs_own_gives(tmp_path: Path) -> None:
    source = tiny_model("LlamaForCausalLM", tmp_path / "source")
    quantize(source, tmp_path / "target", include_head=True)
    loaded, info = load_dynamic_int8(tmp_path / "target", AutoModelForCausalLM)
    assert not any(info.values())
    assert torch.equal(outputs(loaded), outputs(quantized_by_torch(source)))
    assert not torch.equal(outputs(loaded), outputs(load_model(source)))


def test_the_loader_on_the_page_is_enough(tiny: Tiny, tmp_path: Path) -> None:
    page = (Path(__file__).parents[3] / "docs" / "techniques.md").read_text()
    (code,) = SNIPPET.findall(page)
    names: dict[str, Any] = {}
    exec(code, names)
    for architecture, auto in (("LlamaForCausalLM", AutoModelForCausalLM), ("BertModel", AutoModel)):
        quantize(tiny(architecture), tmp_path / architecture)
        by_page = names["load_dynamic_int8"](tmp_path / architecture, auto)
        assert torch.equal(outputs(by_page), outputs(load_dynamic_int8(tmp_path / architecture, auto)[0]))


def test_plain_transformers_refuses_the_files_rather_than_loading_them_wrongly(
    tiny: Tiny, tmp_path: Path
) -> None:
    quantize(tiny("LlamaForCausalLM"), tmp_path)
    with pytest.raises(ValueError, match="quant_method"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_codes_that_the_model_has_no_layer_for_are_an_error(tiny: Tiny, tmp_path: Path) -> None:
    quantize(tiny("LlamaForCausalLM"), tmp_path)
    file = tmp_path / "model.safetensors"
    stray = {"stray.weight_int8": torch.zeros(2, 2, dtype=torch.int8), "stray.weight_scale": torch.ones(1)}
    save_file(load_file(file) | stray, file, metadata={"format": "pt"})
    with pytest.raises(KeyError, match="stray"):
        load_dynamic_int8(tmp_path, AutoModelForCausalLM)


def test_a_tied_head_is_stored_apart_and_said(tmp_path: Path) -> None:
    source = tiny_model("LlamaForCausalLM", tmp_path / "source", tie_word_embeddings=True)
    outcome = quantize(source, tmp_path / "target", include_head=True)
    before, after = tensors_of(source), tensors_of(tmp_path / "target")
    assert "lm_head.weight" not in before
    assert after["lm_head.weight_int8"].shape == before["model.embed_tokens.weight"].shape
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    assert json.loads((tmp_path / "target" / "config.json").read_text())["tie_word_embeddings"] is False
    assert any("the head was one tensor with the embeddings" in warning for warning in outcome.warnings)
    loaded, _ = load_dynamic_int8(tmp_path / "target", AutoModelForCausalLM)
    assert torch.equal(outputs(loaded), outputs(quantized_by_torch(source)))


@pytest.mark.parametrize("include_head", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_bytes_are_predicted(include_head: bool, tied: bool, tmp_path: Path) -> None:
    source = tiny_model("LlamaForCausalLM", tmp_path / "source", tie_word_embeddings=tied)
    step = QuantizeDynamic(include_head=include_head, ignore=("*.1.*",))
    quantize(source, tmp_path / "target", **step.model_dump(exclude={"technique"}))
    planned = plan_job(CompressionSpec(steps=(step,)), facts_of(source)).output_bytes
    assert planned == (tmp_path / "target" / "model.safetensors").stat().st_size


def test_a_weight_that_is_no_number_is_refused_by_name(tmp_path: Path) -> None:
    source = tiny_model("LlamaForCausalLM", tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InvalidRequest, match=r"layers\.1\.mlp\.up_proj"):
        quantize(source, tmp_path / "target")


@pytest.mark.parametrize(
    ("architecture", "why"), [("GPT2LMHeadModel", "Conv1D"), ("MixtralForCausalLM", "experts")]
)
def test_layers_that_are_no_linear_are_refused_with_the_reason(
    architecture: str, why: str, tiny: Tiny, tmp_path: Path
) -> None:
    spec = CompressionSpec(steps=(QuantizeDynamic(),))
    (fault,) = check_spec(spec, facts_of(tiny(architecture)))
    assert fault.pointer == "/steps/0/technique"
    assert why in fault.detail
    with pytest.raises(UnsupportedForModel, match=why):
        quantize(tiny(architecture), tmp_path)


def test_an_encoder_has_no_head_to_include(tiny: Tiny) -> None:
    spec = CompressionSpec(steps=(QuantizeDynamic(include_head=True),))
    (fault,) = check_spec(spec, facts_of(tiny("BertModel")))
    assert fault.pointer == "/steps/0/include_head"
