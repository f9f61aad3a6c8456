from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from safetensors.torch import load_file, save_file
from tiny_models import facts_of, tiny_model

from app.errors import JobFailed
from app.spec.optimize import OptimizeOnnx
from workers.engine.checkpoint.reader import Checkpoint
from workers.engine.export.onnx_int8 import Quantized
from workers.engine.optimize import onnx as onnx_step
from workers.engine.optimize import onnx_variants
from workers.engine.optimize.onnx import _choose
from workers.engine.optimize.onnx_outcome import describe, layer_outcomes, why_not_int8
from workers.engine.optimize.onnx_variants import Variant
from workers.engine.technique import StepContext, StepOutcome, run_step


def _variant(name: str, *, cosine: float = 1.0, layers: tuple[str, ...] = ()) -> Variant:
    quantized = dict.fromkeys(layers, Quantized(8.5, 0.01))
    return Variant(
        name=name,
        directory=Path(name),
        bytes=100,
        load_ms=1.0,
        difference=0.0,
        cosine=cosine,
        quantized=quantized,
    )


def _steady(ms: float) -> tuple[float, ...]:
    return (ms,) * 7


EXPORTED = _variant("exported")
INT8 = _variant("int8", layers=("encoder.layer.0.a.weight",))
SPEC = OptimizeOnnx()


@pytest.mark.parametrize(
    ("optimized", "kept"), [(96.0, "optimized"), (98.0, "exported"), (120.0, "exported")]
)
def test_another_graph_is_kept_only_if_more_than_3_percent_faster(optimized: float, kept: str) -> None:
    times = {"exported": _steady(100.0), "optimized": _steady(optimized)}
    assert _choose([EXPORTED, _variant("optimized")], times).name == kept


def test_int8_must_beat_the_best_before_it() -> None:
    variants = [EXPORTED, _variant("optimized"), INT8]
    times = {"exported": _steady(100.0), "optimized": _steady(80.0)}
    assert _choose(variants, times | {"int8": _steady(79.0)}).name == "optimized"
    assert _choose(variants, times | {"int8": _steady(70.0)}).name == "int8"


@pytest.mark.parametrize("cosine", [0.9, float("nan")])
def test_int8_that_changes_the_outputs_is_not_kept_however_fast(cosine: float) -> None:
    broken = _variant("int8", cosine=cosine, layers=("a",))
    times = {"torch": _steady(90.0), "exported": _steady(100.0), "int8": _steady(10.0)}
    assert _choose([EXPORTED, broken], times).name == "exported"
    assert "mean cosine" in why_not_int8(SPEC, [EXPORTED, broken], EXPORTED, times)
    outcome = describe(SPEC, [EXPORTED, broken], EXPORTED, times, ())
    assert any("int8 was left out" in warning and "10.0 ms" in warning for warning in outcome.warnings)
    assert any("no faster than PyTorch" in warning for warning in outcome.warnings)


def test_reason_quotes_what_was_measured() -> None:
    times = {"exported": _steady(11.0), "int8": _steady(12.3)}
    reason = why_not_int8(SPEC, [EXPORTED, INT8], EXPORTED, times)
    assert "1.12 of the time of exported" in reason
    assert "12.3 and 11.0 ms" in reason


def test_times_taken_on_a_busy_machine_come_with_a_warning() -> None:
    quiet = {"torch": _steady(20.0), "exported": _steady(11.0)}
    busy = quiet | {"torch": (20.0, 90.0, 95.0, 99.0, 90.0, 92.0, 91.0)}
    assert describe(SPEC, [EXPORTED], EXPORTED, quiet, ()).warnings == ()
    assert "other work" in describe(SPEC, [EXPORTED], EXPORTED, busy, ()).warnings[0]


def test_a_layer_that_the_graph_does_not_hold_is_untouched_and_says_so(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny_model("BertForMaskedLM", tmp_path))
    names = [tensor.name for tensor in facts_of(tmp_path).compressible()]
    graph_names = tuple(name.removeprefix("bert.") for name in names[1:])
    outcomes = layer_outcomes(
        tuple(checkpoint.tensors.values()), _variant("int8", layers=graph_names), "", base_prefix="bert."
    )
    actions = {layer.name: layer.action for layer in outcomes}
    assert actions == {names[0]: "untouched"} | dict.fromkeys(names[1:], "quantized")
    assert next(layer.reason for layer in outcomes if layer.name == names[0])


def _run(source: Path, target: Path, **settings: object) -> StepOutcome:
    target.mkdir()
    context = StepContext(source=source, target=target, original=source, facts=facts_of(source), threads=2)
    return run_step(OptimizeOnnx.model_validate(settings), context)


def _with_outlier_channel(directory: Path) -> None:
    """Let one input of each down_proj be 300 times the others, the model's function unchanged."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    for block in range(2):
        tensors[f"model.layers.{block}.mlp.up_proj.weight"][0] *= 300
        tensors[f"model.layers.{block}.mlp.down_proj.weight"][:, 0] /= 300
    save_file(tensors, file, metadata={"format": "pt"})


def test_activations_with_outliers_get_the_layout_with_a_scale_per_block(tmp_path: Path) -> None:
    source = tiny_model("LlamaForCausalLM", tmp_path / "source", num_hidden_layers=2, intermediate_size=512)
    _with_outlier_channel(source)
    outcome = _run(source, tmp_path / "target")
    assert outcome.metrics["int8_cosine"] < onnx_variants.LEAST_COSINE < outcome.metrics["int8_blocks_cosine"]
    assert outcome.metrics["kept"] != "int8"
    assert outcome.metrics["exported_max_difference"] < 1e-5
    assert all(len(outcome.curves[f"{name}_ms"]) >= 5 for name in ("torch", "exported", "optimized", "int8"))


def test_int8_of_a_wide_encoder_that_is_kept_has_a_quarter_of_the_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # However fast it is: a busy machine must not decide what is looked at here.
    monkeypatch.setattr(onnx_step, "_FASTER", float("inf"))
    wide = {"dim": 256, "hidden_dim": 1024, "n_layers": 2}
    source = tiny_model("DistilBertModel", tmp_path / "source", **wide)
    outcome = _run(source, tmp_path / "target")
    metrics = outcome.metrics
    assert str(metrics["kept"]).startswith("int8")
    assert (tmp_path / "target" / "model.onnx").stat().st_size < 0.32 * metrics["exported_bytes"]
    assert {layer.action for layer in outcome.layers} == {"quantized"}
    assert {layer.bits for layer in outcome.layers} == {8 + 40 / 256, 8 + 40 / 1024}
    tables = {t.name for t in onnx.load(tmp_path / "target" / "model.onnx").graph.initializer}
    assert "embeddings.word_embeddings.weight_rows_quantized" in tables


def test_without_quantization_all_layers_stay_and_say_why(tmp_path: Path) -> None:
    source = tiny_model("DistilBertModel", tmp_path / "source", n_layers=1)
    for file in source.glob("tokenizer*"):
        file.unlink()
    outcome = _run(source, tmp_path / "target", quantization="none", graph_optimization="basic")
    assert any("random tokens" in warning for warning in outcome.warnings)
    assert outcome.metrics["kept"] in ("exported", "optimized")
    assert "int8_ms" not in outcome.metrics
    assert {(layer.action, layer.reason) for layer in outcome.layers} == {
        ("untouched", 'quantization is "none" in the spec')
    }


def test_a_graph_that_computes_something_else_fails_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_variants, "_FLOAT_TOLERANCE", 0.0)
    source = tiny_model("DistilBertModel", tmp_path / "source", n_layers=1)
    with pytest.raises(JobFailed) as caught:
        _run(source, tmp_path / "target")
    assert caught.value.code == "onnx_outputs_differ"
    assert list((tmp_path / "target").iterdir()) == []


@pytest.mark.slow
def test_a_head_is_quantized_when_asked_for(tmp_path: Path) -> None:
    source = tiny_model(
        "LlamaForCausalLM", tmp_path / "source", num_hidden_layers=1, hidden_size=256, head_dim=64
    )
    outcome = _run(source, tmp_path / "target", quantize_head=True)
    assert outcome.metrics["int8_cosine"] > 0.9
    assert outcome.metrics["int8_bytes"] < 0.3 * outcome.metrics["exported_bytes"]
