"""Measurements made up for tests of what is derived from them; every piece can be replaced."""

from __future__ import annotations

from typing import Any

from app.spec.base import Family
from app.spec.facts import ModelFacts, TensorFact
from app.spec.report import Comparison, EvaluationText, LayerOutcome, Measurement, StepReport
from workers.engine.measure.latency import ratio_interval, summarize
from workers.engine.measure.results import Evaluated, Loading, RunnerFacts, Verification

LINEARS = ("self_attn.q_proj", "mlp.up_proj")


def model_facts(*, blocks: int = 3, **changes: Any) -> ModelFacts:
    """A language model of a few blocks with two linear layers each."""
    names = [f"model.layers.{i}.{linear}.weight" for i in range(blocks) for linear in LINEARS]
    known = {
        "format": "safetensors",
        "architecture": "LlamaForCausalLM",
        "family": Family.CAUSAL_LM,
        "parameters": 10_000,
        "dtype": "F32",
        "weight_bytes": 40_000,
        "hidden_size": 10,
        "num_blocks": blocks,
        "vocab_size": 100,
        "max_positions": 64,
        "tensors": tuple(TensorFact(name=name, dtype="F32", shape=(10, 10)) for name in names),
    }
    return ModelFacts.model_validate(known | changes)


def measurement(*, milliseconds: float = 10.0, **changes: Any) -> Measurement:
    """A model of 10 000 float32 weights, whose runs take about `milliseconds`."""
    known: dict[str, Any] = {
        "runtime": "made up",
        "bytes": 41_000,
        "files": ({"path": "model.safetensors", "bytes": 40_000}, {"path": "config.json", "bytes": 1_000}),
        "weight_bytes": 40_000,
        "components": {"attention": 20_000, "feed-forward": 20_000, "other files": 1_000},
        "parameters": 10_000,
        "bits_per_weight": 32.0,
        "zero_share": 0.0,
        "quality": {"perplexity": 20.0, "bits_per_byte": 1.0},
        "latency": (summarize("prefill 1×128 tokens", [milliseconds * (1 + 0.01 * i) for i in range(5)]),),
        "peak_memory_bytes": 500_000_000,
    }
    return Measurement.model_validate(known | changes)


def runner_facts(**changes: Any) -> RunnerFacts:
    """A model that loaded without a word."""
    known = {"runtime": "made up", "format": "safetensors", "loading": Loading(), "load_seconds": 1.0}
    return RunnerFacts.model_validate(known | changes)


def evaluated(
    *, result: dict[str, Any] | None = None, comparison: dict[str, Any] | None = None, **changes: Any
) -> Evaluated:
    """An original and a result that is half its size, twice as fast and as good, unless said otherwise."""
    before = measurement()
    smaller = {"milliseconds": 5.0, "bytes": 21_000, "weight_bytes": 20_000, "low_bit_parameters": 10_000}
    after = measurement(**(smaller | (result or {})))
    compared = {
        "bytes_ratio": after.bytes / before.bytes,
        "latency_ratio": after.latency[0].median_ms / before.latency[0].median_ms,
        "latency_ratio_interval": ratio_interval(before.latency[0], after.latency[0]),
        "peak_memory_ratio": 1.0,
        "perplexity_ratio": 1.01,
        "delta_ln_perplexity": (0.01, 0.0, 0.02),
        "kl_mean": 0.01,
        "kl_median": 0.005,
        "kl_p99": 0.1,
        "kl_max": 0.5,
        "top1_agreement": 0.97,
        "answer_flips": 0.01,
    }
    known: dict[str, Any] = {
        "original": before,
        "result": after,
        "comparison": Comparison.model_validate(compared | (comparison or {})),
        "verification": verification(),
        "text": EvaluationText(source="dst_mine", sha256="ab", tokens=100, windows=4, sequence_length=25),
    }
    return Evaluated.model_validate(known | changes)


def verification(**changes: Any) -> Verification:
    """Files that were found sound."""
    known = {"original": runner_facts(), "result": runner_facts(), "output_cosine": 0.99}
    return Verification.model_validate(known | changes)


def quantized_step(facts: ModelFacts, **changes: Any) -> StepReport:
    """A step that quantized every layer, named by its module."""
    layers = tuple(
        LayerOutcome(
            name=fact.name.removesuffix(".weight"),
            action="quantized",
            parameters=fact.elements,
            bits=4.5,
            relative_error=0.05,
        )
        for fact in facts.tensors
    )
    return StepReport.model_validate(
        {"technique": "quantize.weights", "seconds": 1.0, "layers": layers} | changes
    )
