"""Plans: what a job would take, exact where it can be, and a way out where it is too much."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from job_support import make_facts
from model_files import llama_files, llama_shapes, safetensors, safetensors_header

from app.db import worker_queries
from app.db.engine import get_database
from app.intake.read_model import read_model
from app.spec.base import Family
from app.spec.compression import CompressionSpec
from app.spec.distill import DistillLogits
from app.spec.optimize import OptimizeOnnx
from app.spec.plan import nearest_spec, plan_job
from app.spec.prune import PruneCalibrated, PruneDepth, PruneMagnitude
from app.spec.quantize import LayerOverride, QuantizeCalibrated, QuantizeWeights
from app.spec.quantize_onnx import QuantizeOnnx
from app.spec.step_costs import INTERPRETER_BYTES

MIB = 2**20


def plan(client: TestClient, model: str, **body: Any) -> dict[str, Any]:
    answer = client.post("/v1/plans", json={"model": model, "recipe": "int8"} | body)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def test_a_plan_covers_every_stage_and_keeps_nothing(
    client: TestClient, add_model: Callable[..., str]
) -> None:
    spec = {"steps": [{"technique": "quantize.weights", "bits": 8}]}
    answer = plan(client, add_model(), recipe=None, spec=spec)
    assert [stage["name"] for stage in answer["plan"]["stages"]] == [
        "load", "baseline", "step 1: quantize.weights", "export", "verify", "report",
    ]  # fmt: skip
    assert answer["plan"]["fits"]
    assert answer["spec"]["steps"][0]["bits"] == 8
    assert client.get("/v1/jobs").json()["items"] == []


def test_a_plan_is_refused_for_the_same_reasons_as_a_job(
    client: TestClient, add_model: Callable[..., str]
) -> None:
    spec = {"steps": [{"technique": "quantize.weights", "group_size": 48}]}
    answer = client.post("/v1/plans", json={"model": add_model(), "spec": spec})
    assert (answer.status_code, answer.json()["code"]) == (422, "unsupported_for_model")


def test_a_plan_over_budget_names_the_nearest_spec_that_fits(
    client: TestClient, add_model: Callable[..., str]
) -> None:
    model = add_model(vocab_size=100_000)
    spec = {"steps": [{"technique": "quantize.weights"}], "resources": {"memory_budget": 800 * MIB}}
    answer = plan(client, model, recipe=None, spec=spec)
    assert not answer["plan"]["fits"]
    assert plan(client, model, recipe=None, spec=answer["nearest_spec"])["plan"]["fits"]
    assert answer["nearest_spec"]["steps"] == answer["spec"]["steps"]


def test_the_largest_worker_caps_the_budget(client: TestClient, add_model: Callable[..., str]) -> None:
    model = add_model()
    assert plan(client, model)["plan"]["memory_budget"] is None
    with get_database().write() as session:
        for name, size in (("small", 500 * MIB), ("large", 600 * MIB)):
            hardware = {"memory_bytes": size}
            worker_queries.announce(session, name, queues="cpu", hardware=hardware, sandbox="process")
    assert plan(client, model)["plan"]["memory_budget"] == 600 * MIB


@pytest.mark.parametrize(
    "step",
    [
        QuantizeWeights(bits=8),
        QuantizeWeights(bits=4, group_size=8, symmetric=False),
        QuantizeWeights(bits=3, ignore=("*down_proj",)),
        QuantizeWeights(group_size="auto", overrides=(LayerOverride(layers="*q_proj", bits=8),)),
        QuantizeWeights(number_format="fp8", activations="dynamic"),
        QuantizeWeights(number_format="nvfp4", ignore=("*down_proj",)),
        PruneMagnitude(),
    ],
    ids=lambda step: f"{step.technique}-{getattr(step, 'bits', '')}",
)
def test_the_weights_a_step_writes_have_the_bytes_that_were_planned(
    step: QuantizeWeights | PruneMagnitude, tmp_path: Path
) -> None:
    from workers.engine.technique import StepContext, run_step

    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    header = safetensors_header(llama_shapes())
    # Small finite weights: the bytes that intake is tested with are no numbers to be quantized.
    size = max(entry["data_offsets"][1] for entry in header.values())
    files = llama_files() | {"model.safetensors": safetensors(header, b"\x00\x00\x80\x3d" * (size // 4))}
    for name, content in files.items():
        (source / name).write_bytes(content)
    facts = read_model({name: source / name for name in files}).facts
    run_step(step, StepContext(source=source, target=target, original=source, facts=facts))
    written = sum(path.stat().st_size for path in target.glob("*.safetensors"))
    assert plan_job(CompressionSpec(steps=(step,)), facts).output_bytes == pytest.approx(written, rel=0.01)


def test_removing_half_the_blocks_leaves_the_bytes_of_a_model_with_half_the_blocks() -> None:
    facts = make_facts()
    half = tuple(t for t in facts.tensors if "layers.2." not in t.name and "layers.3." not in t.name)
    whole = plan_job(CompressionSpec(steps=(PruneMagnitude(),)), make_facts(tensors=half)).output_bytes
    assert plan_job(CompressionSpec(steps=(PruneDepth(drop_blocks=2),)), facts).output_bytes == whole


def test_memory_of_streaming_steps_does_not_grow_with_the_model() -> None:
    spec = CompressionSpec(steps=(QuantizeWeights(),))
    small, large = make_facts(), make_facts(tensors=make_facts().tensors * 1000)
    steps = [plan_job(spec, facts).stages[2].peak_memory_bytes for facts in (small, large)]
    assert steps[0] == steps[1] > INTERPRETER_BYTES


@pytest.mark.parametrize("step", [DistillLogits(sequence_length=64), OptimizeOnnx(), QuantizeOnnx()])
def test_memory_of_other_steps_grows_with_the_model(
    step: DistillLogits | OptimizeOnnx | QuantizeOnnx,
) -> None:
    spec = CompressionSpec(steps=(step,))
    small, large = make_facts(), make_facts(tensors=make_facts().tensors * 1000)
    steps = [plan_job(spec, facts).stages[2].peak_memory_bytes for facts in (small, large)]
    assert steps[1] > steps[0] + 100 * MIB


def test_logits_of_an_encoder_are_not_planned_for() -> None:
    spec = CompressionSpec(steps=(QuantizeWeights(),))
    peaks = [
        plan_job(spec, make_facts(family, vocab_size=1_000_000)).peak_memory_bytes
        for family in (Family.CAUSAL_LM, Family.ENCODER)
    ]
    assert peaks[0] > peaks[1] + 500 * MIB


def test_no_smaller_spec_is_offered_where_none_fits() -> None:
    spec = CompressionSpec(steps=(QuantizeWeights(),))
    assert nearest_spec(spec, make_facts(), worker_memory=100 * MIB) is None


def test_a_smaller_batch_is_tried_before_anything_else_is_given_up() -> None:
    spec = CompressionSpec(steps=(DistillLogits(batch_size=64, sequence_length=128),))
    facts = make_facts(vocab_size=50_000)
    budget = plan_job(spec, facts).peak_memory_bytes - MIB
    nearest = nearest_spec(spec, facts, worker_memory=budget)
    assert nearest is not None
    assert isinstance(nearest.steps[0], DistillLogits)
    assert nearest.steps[0].batch_size < 64
    assert nearest.steps[0].sequences == spec.steps[0].sequences
    assert nearest.steps[0].sequence_length == 128
    assert nearest.evaluation == spec.evaluation


def test_recomputed_activations_are_planned_with_less_memory_and_more_time() -> None:
    facts = make_facts(vocab_size=50_000)
    plain, recomputed = (
        plan_job(CompressionSpec(steps=(DistillLogits(batch_size=64, gradient_checkpointing=on),)), facts)
        for on in (False, True)
    )
    assert recomputed.peak_memory_bytes < plain.peak_memory_bytes
    assert recomputed.seconds > plain.seconds


def test_cached_logits_are_planned_with_less_memory_and_more_disk() -> None:
    facts = make_facts(vocab_size=50_000)
    live, cached = (
        plan_job(CompressionSpec(steps=(DistillLogits(batch_size=64, cached_logits=k),)), facts)
        for k in (None, 64)
    )
    tokens = 200 * 64 * 128
    assert cached.disk_bytes - live.disk_bytes == 64 * 4 * tokens
    assert cached.peak_memory_bytes < live.peak_memory_bytes


def test_disk_for_states_and_finished_blocks_is_planned() -> None:
    facts = make_facts()
    disk = {}
    for tokens in (1024, 2048):
        spec = CompressionSpec(steps=(QuantizeCalibrated(calibration_tokens=tokens),))
        disk[tokens] = plan_job(spec, facts).disk_bytes
    assert disk[2048] - disk[1024] == 2 * 4 * 1024 * facts.hidden_size
    calibrated = CompressionSpec(steps=(QuantizeCalibrated(calibration_tokens=1024),))
    nearest = CompressionSpec(steps=(QuantizeWeights(),))
    result = plan_job(nearest, facts).stages[2].output_bytes
    assert result is not None
    states = 2 * 4 * 1024 * facts.hidden_size
    assert plan_job(calibrated, facts).disk_bytes == plan_job(nearest, facts).disk_bytes + states + result


def test_running_backwards_is_planned_with_the_inputs_of_every_block_on_disk() -> None:
    facts = make_facts()
    forward, backward = (
        plan_job(CompressionSpec(steps=(PruneCalibrated(criterion=criterion),)), facts).disk_bytes
        for criterion in ("wanda", "taylor")
    )
    assert backward - forward > facts.num_blocks * 4 * 16_384 * facts.hidden_size
