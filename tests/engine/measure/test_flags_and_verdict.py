from __future__ import annotations

from typing import Any

import pytest
from made_up import evaluated, model_facts, quantized_step, runner_facts, verification

from app.spec.compression import Acceptance, CompressionSpec
from app.spec.report import Flag, LayerOutcome, StepReport
from workers.engine.measure.acceptance import limits, verdict
from workers.engine.measure.flags import Facts, flags
from workers.engine.measure.latency import summarize
from workers.engine.measure.results import Evaluated

FACTS = model_facts()
NOISY = (summarize("prefill 1×128 tokens", [4.0, 30.0, 9.0, 5.0, 22.0]),)
DOUBLED = evaluated().original.parameters + FACTS.vocab_size * FACTS.hidden_size
SPEC = CompressionSpec.model_validate(
    {"steps": [{"technique": "quantize.weights"}], "evaluation": {"text": {"dataset": "dst_mine"}}}
)


def raised(
    measured: Evaluated, *, steps: tuple[StepReport, ...] | None = None, **facts: Any
) -> dict[str, str]:
    found = flags(
        Facts(
            FACTS.model_copy(update=facts),
            SPEC,
            measured,
            (quantized_step(FACTS),) if steps is None else steps,
        )
    )
    return {flag.code: flag.detail for flag in found}


def test_a_sound_result_raises_no_flag() -> None:
    assert raised(evaluated()) == {}


@pytest.mark.parametrize(
    ("measured", "code", "words"),
    [
        (evaluated(result={"milliseconds": 9.9}), "no_speedup", "times as long"),
        (evaluated(result={"latency": NOISY}), "no_speedup", "vary too much"),
        (evaluated(comparison={"perplexity_ratio": 1.1}), "quality_loss", "Noticeable"),
        (evaluated(comparison={"perplexity_ratio": 7.0}), "quality_loss", "Severe"),
        (evaluated(comparison={"perplexity_ratio": None, "cosine_mean": 0.85}), "quality_loss", "Large"),
        (evaluated(comparison={"top1_agreement": 0.05}), "degenerate_output", "5.0%"),
        (evaluated(verification=verification(degenerate="It repeats.")), "degenerate_output", "It repeats."),
        (evaluated(result={"quality": {"mean_similarity": 0.9999}}), "degenerate_output", "same embedding"),
        (evaluated(non_finite_windows=2), "nan", "2 windows"),
        (evaluated(result={"low_bit_parameters": 0}), "fake_quant", "600 weights"),
        (evaluated(result={"bytes": 50_000}), "larger_than_original", "0.1 MB"),
        (evaluated(verification=verification(tokenizer_changes=("Gone.",))), "tokenizer_changed", "Gone."),
        (evaluated(vocabulary=(100, 104)), "tokenizer_changed", "104 outputs"),
        (
            evaluated(
                verification=verification(original=runner_facts(tied=True), result=runner_facts(tied=False))
            ),
            "tied_weights_broken",
            "1,000 weights more",
        ),
        (
            evaluated(
                result={"parameters": DOUBLED},
                verification=verification(
                    original=runner_facts(tied=True), result=runner_facts(format="onnx")
                ),
            ),
            "tied_weights_broken",
            "1,000 weights more",
        ),
    ],
)
def test_each_fault_raises_its_flag_alone(measured: Evaluated, code: str, words: str) -> None:
    found = raised(measured)
    assert set(found) == {code}
    assert words in found[code]


def test_faster_in_one_of_two_kinds_of_run_is_a_speedup() -> None:
    one, many = (
        evaluated().original.latency[0],
        summarize("batch 8×128 tokens", [80.0, 81.0, 82.0, 83.0, 84.0]),
    )
    faster = summarize("batch 8×128 tokens", [50.0, 51.0, 52.0, 53.0, 54.0])
    measured = evaluated()
    before = measured.original.model_copy(update={"latency": (one, many)})
    for second, flagged in ((faster, False), (many, True)):
        after = measured.result.model_copy(update={"latency": (one, second)})
        found = raised(measured.model_copy(update={"original": before, "result": after}))
        assert ("no_speedup" in found) == flagged


def test_a_result_larger_than_the_uploaded_gguf_is_said() -> None:
    found = raised(evaluated(), format="gguf", dtype="Q4_1", weight_bytes=15_000)
    assert "Q4_1 GGUF" in found["larger_than_original"]
    assert "larger_than_original" not in raised(evaluated(), format="gguf", weight_bytes=30_000)


def test_zeros_that_pruning_left_in_the_file_are_said() -> None:
    layers = (LayerOutcome(name="l", action="pruned", parameters=10_000, sparsity=0.5),)
    step = StepReport(technique="prune.magnitude", seconds=1, layers=layers)
    assert "50% of the weights" in raised(evaluated(result={"zero_share": 0.5}), steps=(step,))["dense_zeros"]
    assert "dense_zeros" not in raised(evaluated(result={"zero_share": 0.01}), steps=(step,))


def test_skipped_layers_are_named_with_their_reason() -> None:
    step = quantized_step(FACTS)
    kept = step.layers[0].model_copy(update={"action": "untouched", "reason": "ignored by '*.0.*'"})
    found = raised(evaluated(), steps=(step.model_copy(update={"layers": (kept, *step.layers[1:])}),))
    assert "model.layers.0.self_attn.q_proj (ignored by '*.0.*')" in found["layers_skipped"]


def test_layers_that_width_pruning_is_not_for_are_not_skipped_and_those_it_narrows_hold_no_zeros() -> None:
    layers = (
        LayerOutcome(name="a", action="pruned", parameters=1),
        LayerOutcome(name="b", action="untouched", reason="no layer of the feed-forward part", parameters=1),
    )
    step = StepReport(technique="prune.width", seconds=1, layers=layers)
    assert (
        not {"layers_skipped", "dense_zeros"}
        & raised(evaluated(result={"zero_share": None}), steps=(step,)).keys()
    )


def test_layers_of_a_training_that_gained_nothing_are_not_skipped() -> None:
    layers = (
        LayerOutcome(
            name="a", action="untouched", reason="training did not lower the held-out loss", parameters=1
        ),
    )
    step = StepReport(technique="distill.logits", seconds=1, layers=layers)
    assert "layers_skipped" not in raised(evaluated(), steps=(step,))


def test_blocks_that_depth_pruning_keeps_are_not_skipped() -> None:
    layers = (
        LayerOutcome(name="a", action="removed", parameters=1),
        LayerOutcome(name="b", action="untouched", reason="kept block", parameters=1),
    )
    step = StepReport(technique="prune.depth", seconds=1, layers=layers)
    assert "layers_skipped" not in raised(evaluated(), steps=(step,))


def test_overlap_and_built_in_text_are_said() -> None:
    measured = evaluated()
    assert measured.text is not None
    text = measured.text.model_copy(update={"overlap_share": 0.4})
    assert "40%" in raised(measured.model_copy(update={"text": text}))["evaluation_overlap"]
    plain = CompressionSpec.model_validate({"steps": [{"technique": "prune.depth"}]})
    (flag,) = [f for f in flags(Facts(FACTS, plain, measured, ())) if f.code == "builtin_text"]
    assert "quality and calibration" in flag.detail


def test_what_steps_flagged_stands_in_the_report_once() -> None:
    flag = Flag(
        code="zero_channels", detail="Output channels whose weights are all zero: 2 in 1 layer (l: 2)."
    )
    step = quantized_step(FACTS).model_copy(update={"flags": (flag,)})
    assert flags(Facts(FACTS, SPEC, evaluated(), (step, step))) == (flag,)


def test_limits_are_held_against_what_was_measured() -> None:
    acceptance = Acceptance(max_perplexity_increase=0.02, min_top1_agreement=0.98, max_bytes=21_000)
    found = {limit.name: limit for limit in limits(acceptance, evaluated(), "causal_lm")}
    assert found["max_perplexity_increase"].measured == pytest.approx(0.01)
    assert {name: limit.ok for name, limit in found.items()} == {
        "max_perplexity_increase": True,
        "min_top1_agreement": False,
        "max_bytes": True,
    }


def test_a_ruined_language_model_misses_its_limit_and_is_rejected() -> None:
    # SmolLM2 with its head in PyTorch's dynamic int8: perplexity 35.9 became 116.4.
    ruined = evaluated(comparison={"perplexity_ratio": 116.4 / 35.9})
    (limit,) = limits(Acceptance(max_perplexity_increase=0.5), ruined, "causal_lm")
    assert limit.measured == pytest.approx(2.242, abs=0.001)
    assert not limit.ok
    assert verdict((limit,), (), ruined) == "rejected"


def test_a_limit_for_another_family_is_set_aside_and_says_so() -> None:
    (limit,) = limits(Acceptance(min_cosine=0.9), evaluated(), "causal_lm")
    assert limit.ok
    assert limit.note is not None
    assert "encoders" in limit.note


def test_a_limit_that_could_not_be_measured_is_missed() -> None:
    ruined = evaluated(comparison={"kl_mean": None})
    found = limits(Acceptance(max_kl=1.0), ruined, "causal_lm")
    assert not found[0].ok
    assert verdict(found, (), ruined) == "rejected"


def test_verdicts() -> None:
    measured, blind = evaluated(), evaluated().model_copy(update={"comparison": None})
    assert verdict((), (), measured) == "accepted"
    assert verdict(limits(Acceptance(max_kl=0.001), measured, "causal_lm"), (), measured) == "rejected"
    assert verdict((), (), blind) == "unmeasured"
    assert verdict(limits(Acceptance(max_kl=1.0), blind, "causal_lm"), (), blind) == "unmeasured"
    assert verdict(limits(Acceptance(max_bytes=1), blind, "causal_lm"), (), blind) == "rejected"
    assert verdict((), (Flag(code="degenerate_output", detail=""),), measured) == "rejected"
