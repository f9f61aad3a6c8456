"""A model of text without a tokenizer is refused what needs text, when the job is submitted."""

from __future__ import annotations

from job_support import make_facts, make_image_facts

from app.spec.base import Family
from app.spec.compression import CompressionSpec, Evaluation
from app.spec.quantize import QuantizeCalibrated, QuantizeWeights
from app.spec.tokenizer_files import check_tokenizer

BARE = ("config.json", "tokenizer_config.json", "model.safetensors")
CALIBRATED = CompressionSpec(steps=(QuantizeCalibrated(),))


def test_each_use_of_text_is_named_with_a_way_out() -> None:
    faults = list(check_tokenizer(CALIBRATED, make_facts(), BARE))
    assert [fault.pointer for fault in faults] == ["/steps/0/technique", "/evaluation/enabled"]
    assert all("tokenizer.json" in fault.detail for fault in faults)
    assert "set enabled to false" in faults[1].detail
    encoder = list(check_tokenizer(CALIBRATED, make_facts(Family.ENCODER), BARE))
    assert len(encoder) == 2


def test_what_needs_no_text_goes_without() -> None:
    spec = CompressionSpec(steps=(QuantizeWeights(),), evaluation=Evaluation(enabled=False))
    assert not list(check_tokenizer(spec, make_facts(), BARE))
    assert not list(check_tokenizer(CALIBRATED, make_image_facts(), BARE))
    assert not list(check_tokenizer(CALIBRATED, make_facts(format="gguf"), ("model.gguf",)))


def test_any_of_the_usual_files_is_one() -> None:
    for name in ("tokenizer.json", "vocab.txt", "spm.model"):
        assert not list(check_tokenizer(CALIBRATED, make_facts(), (*BARE, name)))
