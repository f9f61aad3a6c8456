"""quantize.gguf on tiny models, read back by the `gguf` package and transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from technique_runs import context_for
from tiny_models import BLOCKS, changed, facts_of, tiny_model
from torch import Tensor

from app.errors import InvalidRequest, UnsupportedForModel
from app.spec.compression import CompressionSpec
from app.spec.gguf import QuantizeGguf
from app.spec.gguf_layout import ARCHITECTURES, gguf_tensors
from app.spec.plan import plan_job
from workers.engine.architectures.loading import load_model, load_tokenizer
from workers.engine.calibration.windows import model_windows
from workers.engine.measure.runner_torch import TorchRunner
from workers.engine.measure.size import measure_size
from workers.engine.technique import StepOutcome, run_step

Tiny = Callable[[str], Path]
TOKENS = torch.arange(60) * 5 % 300 + 5
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


def run(source: Path, target: Path, text: Path, **settings: Any) -> StepOutcome:
    target.mkdir()
    step = QuantizeGguf.model_validate({"calibration_tokens": 1024} | settings)
    return run_step(step, context_for(step, source, target, text))


def outputs(directory: Path, tokens: Tensor = TOKENS) -> Tensor:
    """Logits of the file as a job's verification loads it."""
    return torch.from_numpy(TorchRunner(directory, device="cpu", threads=2).outputs(tokens.numpy()))


def original_outputs(directory: Path, tokens: Tensor = TOKENS) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = load_model(directory)(tokens[None]).logits[0]
    return logits


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_file_of_eight_bits_computes_what_its_source_does(
    architecture: str, tiny: Tiny, tiny_text: Path, tmp_path: Path
) -> None:
    run(tiny(architecture), tmp_path / "out", tiny_text, mix="Q8_0")
    assert relative(outputs(tmp_path / "out"), original_outputs(tiny(architecture))) < 0.03


def test_scaled_rotary_frequencies_of_llama_3_are_kept(tiny_text: Path, tmp_path: Path) -> None:
    source = tiny_model("LlamaForCausalLM", tmp_path / "source", rope_parameters=LLAMA3)
    run(source, tmp_path / "out", tiny_text, mix="Q8_0")
    names = {t.name for t in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    assert "rope_freqs.weight" in names
    assert relative(outputs(tmp_path / "out"), original_outputs(source)) < 0.03


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose inputs are multiples of 256, so that the K formats fit."""
    return tiny_model(
        "LlamaForCausalLM", tmp_path_factory.mktemp("wide"), hidden_size=256, intermediate_size=512, head_dim=64,
        initializer_range=0.03,
    )  # fmt: skip


def test_compensation_brings_the_outputs_closer(wide: Path, tiny_text: Path, tmp_path: Path) -> None:
    errors = []
    (text,) = model_windows(load_tokenizer(wide), tiny_text, facts_of(wide), tokens=1, length=128)
    for compensate in (True, False):
        target = tmp_path / str(compensate)
        outcome = run(wide, target, tiny_text, mix="Q4_K_S", compensate=compensate)
        assert outcome.metrics["formats"] == "Q4_K, Q5_K, Q6_K"
        errors.append(relative(outputs(target, text), original_outputs(wide, text)))
        lost = float(outcome.metrics["relative_output_error"] or 0)
        errors.append(lost)
    assert errors[0] < errors[2]
    assert errors[1] < 0.9 * errors[3]


@pytest.mark.parametrize("mix", ["Q4_K_M", "Q5_K_M", "Q6_K", "Q4_0"])
def test_the_file_has_the_formats_and_bytes_that_were_announced(
    mix: str, wide: Path, tiny_text: Path, tmp_path: Path
) -> None:
    run(wide, tmp_path / "out", tiny_text, mix=mix, compensate=False, calibration_tokens=128)
    file = tmp_path / "out" / "model.gguf"
    stored = {t.name: t.tensor_type.name for t in gguf.GGUFReader(file).tensors}
    step = QuantizeGguf.model_validate({"mix": mix})
    expected = gguf_tensors(facts_of(wide).tensors, "llama", step.mix)
    assert stored == {t.name: t.format.name for t in expected}
    planned = plan_job(CompressionSpec(steps=(step,)), facts_of(wide)).output_bytes
    assert planned == pytest.approx(file.stat().st_size, rel=0.02)


def test_size_counts_the_weights_of_the_file(wide: Path, tiny_text: Path, tmp_path: Path) -> None:
    run(wide, tmp_path / "out", tiny_text, compensate=False, calibration_tokens=128)
    size = measure_size(tmp_path / "out")
    assert sum(size.components.values()) == size.bytes
    assert size.parameters == facts_of(wide).parameters
    assert 4.5 < size.bits_per_weight < 7
    assert {"embeddings", "output head", "attention", "feed-forward"} <= set(size.components)


def test_names_are_those_of_the_package(tiny: Tiny) -> None:
    for architecture, name in ARCHITECTURES.items():
        kind = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == name)
        table = gguf.get_tensor_name_map(kind, BLOCKS)
        for tensor in gguf_tensors(facts_of(tiny(architecture)).tensors, name, "Q4_0"):
            assert tensor.name == table.get_name(tensor.source, try_suffixes=(".weight", ".bias"))


@pytest.mark.parametrize(
    ("architecture", "settings", "named"),
    [
        ("LlamaForCausalLM", {"attention_bias": True}, "bias"),
        ("LlamaForCausalLM", {"hidden_act": "gelu"}, "hidden_act"),
        ("MistralForCausalLM", {"sliding_window": 32}, "sliding_window"),
        ("Gemma2ForCausalLM", {"attn_logit_softcapping": 20.0}, "attn_logit_softcapping"),
        ("Gemma3ForCausalLM", {"query_pre_attn_scalar": 32}, "query_pre_attn_scalar"),
        ("Qwen2ForCausalLM", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic"),
    ],
)  # fmt: skip
def test_what_a_header_cannot_say_is_refused_before_the_work(
    architecture: str, settings: dict[str, Any], named: str, tiny_text: Path, tmp_path: Path
) -> None:
    source = tiny_model(architecture, tmp_path / "source", **settings)
    with pytest.raises((UnsupportedForModel, ValueError), match=named):
        run(source, tmp_path / "out", tiny_text)
    assert list((tmp_path / "out").iterdir()) == []


def test_weights_that_are_nan_are_named_and_no_file_is_left(
    tiny: Tiny, tiny_text: Path, tmp_path: Path
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    source = changed(
        tiny("LlamaForCausalLM"), tmp_path / "broken", lambda tensors: tensors[name][0, 0].fill_(torch.nan)
    )
    with pytest.raises(InvalidRequest, match=name):
        run(source, tmp_path / "out", tiny_text, calibration_tokens=256)
    assert not (tmp_path / "out" / "model.gguf").exists()


def test_the_header_says_what_was_done(tiny: Tiny, tiny_text: Path, tmp_path: Path) -> None:
    run(tiny("LlamaForCausalLM"), tmp_path / "out", tiny_text, compensate=False, calibration_tokens=256)
    fields = gguf.GGUFReader(tmp_path / "out" / "model.gguf").fields
    found = {name: field.contents() for name, field in fields.items() if not name.startswith("tokenizer")}
    assert found["general.architecture"] == "llama"
    assert found["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q4_K_M
    assert found["general.quantization_version"] == 2
    assert (found["modelpress.mix"], found["modelpress.compensated"]) == ("Q4_K_M", False)
    assert found["modelpress.calibration_tokens"] >= 256
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert found["llama.block_count"] == config["num_hidden_layers"]
