"""Real processes, real files: tiny models measured the whole way."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import Tensors, changed, facts_of

from app.errors import JobFailed, VerificationFailed
from app.spec.base import Step
from app.spec.compression import Evaluation
from app.spec.optimize import OptimizeOnnx
from app.spec.quantize import QuantizeWeights
from workers.engine.calibration.builtin import builtin_text
from workers.engine.measure.evaluate import check_original, evaluate
from workers.engine.measure.results import Evaluated, Pair, Prepared
from workers.engine.measure.runner_client import RunnerClient
from workers.engine.measure.verify import verify_export
from workers.engine.measure.windows import prepare_evaluation
from workers.engine.technique import StepContext, run_step

Tiny = Callable[[str], Path]


def rounded(tensors: Tensors) -> None:
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and "layer" in name:
            tensor.copy_((tensor * 64).round() / 64)


def prepare(model: Path, work: Path, *, length: int = 64) -> Prepared:
    work.mkdir(parents=True, exist_ok=True)
    evaluation = Evaluation(tokens=256, sequence_length=length)
    text, windows = builtin_text("evaluation"), work / "windows.npz"
    return prepare_evaluation(model, facts_of(model), evaluation, text=text, windows_file=windows)


def measured(model: Path, result: Path, work: Path, **pair: object) -> Evaluated:
    prepared = prepare(model, work)
    arguments = {"original": model, "result": result, "work": work, "threads": 1, "latency_rounds": 3} | pair
    return evaluate(Pair(**arguments), facts_of(model), prepared)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def language(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[Evaluated, list[float]]:
    """A language model against itself with rounded weights, and the progress it reported."""
    work, model = tmp_path_factory.mktemp("language"), tiny("LlamaForCausalLM")
    progress: list[float] = []
    result = changed(model, work / "result", rounded)
    found = measured(model, result, work, progress=lambda fraction, _: progress.append(fraction))
    return found, progress


def test_language_model_is_measured_on_all_sides(language: tuple[Evaluated, list[float]]) -> None:
    found, _ = language
    comparison = found.comparison
    assert comparison is not None
    assert comparison.kl_mean is not None
    assert comparison.perplexity_ratio is not None
    assert comparison.delta_ln_perplexity is not None
    assert 1e-4 < comparison.kl_mean < 1
    assert 0.8 < comparison.perplexity_ratio < 1.3
    low, high = comparison.delta_ln_perplexity[1:]
    assert low <= torch.tensor(comparison.perplexity_ratio).log() <= high
    assert [latency.what for latency in found.result.latency] == ["prefill 1×64 tokens", "decode 1 token"]
    assert all(len(latency.samples_ms) == 3 for latency in found.original.latency)
    assert found.result.peak_memory_bytes is not None
    assert 50e6 < found.result.peak_memory_bytes < 5e9
    assert found.verification.samples[0].prompt
    assert not found.verification.tokenizer_changes


def test_perplexity_agrees_with_transformers_own_loss(
    tiny: Tiny, tmp_path: Path, language: tuple[Evaluated, list[float]]
) -> None:
    from workers.engine.architectures.loading import load_model
    from workers.engine.measure.windows import load_windows

    model = tiny("LlamaForCausalLM")
    windows = torch.stack([torch.from_numpy(w) for w in load_windows(prepare(model, tmp_path).windows_file)])
    with torch.inference_mode():
        loss = load_model(model)(windows, labels=windows).loss
    assert language[0].original.quality["perplexity"] == pytest.approx(float(loss.exp()), rel=1e-4)


def test_progress_rises_to_the_end(language: tuple[Evaluated, list[float]]) -> None:
    _, progress = language
    assert progress == sorted(progress)
    assert progress[-1] == 1.0
    # A call after each of 4 windows and 3 + 2 rounds.
    assert len(progress) >= 4 + 5


def test_results_survive_json(language: tuple[Evaluated, list[float]]) -> None:
    assert Evaluated.model_validate_json(language[0].model_dump_json()) == language[0]


@pytest.mark.slow
def test_weights_lost_by_the_export_fail_verification(tiny: Tiny, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    model = tiny("LlamaForCausalLM")
    broken = changed(model, tmp_path / "broken", lambda tensors: tensors.pop(name))
    with pytest.raises(VerificationFailed, match=name):
        measured(model, broken, tmp_path / "work")


@pytest.mark.slow
def test_result_of_nan_fails_verification(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("LlamaForCausalLM")
    broken = changed(model, tmp_path / "broken", lambda t: t["model.norm.weight"].fill_(torch.nan))
    with pytest.raises(VerificationFailed, match="NaN"):
        measured(model, broken, tmp_path / "work")


@pytest.mark.slow
def test_original_of_nan_is_refused_before_any_work(tiny: Tiny, tmp_path: Path) -> None:
    model = changed(
        tiny("LlamaForCausalLM"), tmp_path / "model", lambda t: t["model.norm.weight"].fill_(torch.nan)
    )
    work = tmp_path / "work"
    with pytest.raises(JobFailed) as caught:
        check_original(
            model, prepare(model, work), work=work, device="cpu", threads=1, progress=lambda *_: None
        )
    assert caught.value.code == "original_is_broken"


@pytest.mark.slow
def test_a_dead_process_is_told_with_its_last_words(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["NoSuchModel"]}))
    with (
        pytest.raises(VerificationFailed, match="NoSuchModel"),
        RunnerClient(tmp_path, role="result") as client,
    ):
        client.ready()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "runtime", "runs"),
    [
        (
            QuantizeWeights(bits=4, group_size=16),
            "weights decompressed",
            ["prefill 1×64 tokens", "decode 1 token"],
        ),
        (OptimizeOnnx(quantization="none"), "onnxruntime", ["prefill 1×64 tokens"]),
    ],
)
def test_what_techniques_write_is_measured_in_its_own_runtime(
    step: Step, runtime: str, runs: list[str], tiny: Tiny, tmp_path: Path
) -> None:
    model, result = tiny("LlamaForCausalLM"), tmp_path / "result"
    result.mkdir()
    run_step(step, StepContext(source=model, target=result, original=model, facts=facts_of(model), threads=2))
    found = measured(model, result, tmp_path / "work")
    assert runtime in found.result.runtime
    assert [latency.what for latency in found.original.latency] == runs
    assert [latency.what for latency in found.result.latency] == runs
    assert found.comparison is not None
    assert found.comparison.kl_mean is not None
    assert found.comparison.kl_mean < 0.5
    assert (found.result.low_bit_parameters > 0) == isinstance(step, QuantizeWeights)
    assert found.result.parameters == pytest.approx(found.original.parameters, rel=0.1)


@pytest.mark.slow
def test_encoder_is_measured_by_its_embeddings(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("BertModel")
    found = measured(model, changed(model, tmp_path / "result", rounded), tmp_path / "work")
    assert found.comparison is not None
    assert found.comparison.cosine_mean is not None
    assert found.comparison.cosine_min is not None
    assert found.comparison.rank_correlation is not None
    assert 0.9 < found.comparison.cosine_min <= found.comparison.cosine_mean < 1
    assert 0.5 < found.comparison.rank_correlation <= 1
    assert [latency.what[:8] for latency in found.result.latency] == ["batch 1×", "batch 8×"]
    assert found.comparison.perplexity_ratio is None


@pytest.mark.slow
def test_classifier_is_measured_by_its_choices(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("BertForSequenceClassification")
    found = measured(model, changed(model, tmp_path / "result", rounded), tmp_path / "work")
    assert found.comparison is not None
    assert found.comparison.top1_agreement is not None
    assert found.comparison.kl_mean is not None
    assert 0 < found.comparison.kl_mean < 1
    assert found.comparison.cosine_mean is None


@pytest.mark.slow
def test_disabled_evaluation_still_verifies_the_files_even_without_a_tokenizer(
    tiny: Tiny, tmp_path: Path
) -> None:
    model = tiny("LlamaForCausalLM")
    bare = changed(model, tmp_path / "original", lambda _: None)
    for tokenizer in bare.glob("tokenizer*"):
        tokenizer.unlink()
    result = changed(bare, tmp_path / "result", rounded)
    found = evaluate(Pair(original=bare, result=result, work=tmp_path / "work"), facts_of(model), None)
    assert found.comparison is None
    assert found.verification.output_cosine > 0.9
    assert found.result.bytes > 0


@pytest.mark.slow
def test_doubled_weights_and_another_tokenizer_are_seen(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("Gemma2ForCausalLM")

    def untie(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    result = changed(model, tmp_path / "result", untie)
    config = json.loads((result / "config.json").read_text()) | {"tie_word_embeddings": False}
    (result / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny("BertModel") / name, result / name)
    pair = Pair(original=model, result=result, work=tmp_path / "work")
    pair.work.mkdir()
    with (
        RunnerClient(model, role="original") as original,
        RunnerClient(result, role="result") as copy,
    ):
        found = verify_export(pair, (original, copy), facts_of(model), None)
    assert (found.original.tied, found.result.tied) == (True, False)
    assert len(found.tokenizer_changes) == 2
    assert found.output_cosine == pytest.approx(1, abs=1e-5)
