"""One trace from a request through the queue to the stages of a job in a worker's pool, sent before that is gone."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from otlp_collector import Collector
from service import Service
from waiting import wait_until

pytestmark = pytest.mark.e2e

QUANTIZE = {
    "steps": [{"technique": "quantize.weights", "bits": 8}],
    "evaluation": {"tokens": 256, "sequence_length": 64, "latency_rounds": 3},
}


@pytest.mark.parametrize("any_database", ["sqlite"], indirect=True)
def test_a_job_is_one_trace_from_request_to_process(
    collector: Collector, start_service: Callable[[str], Service], valkey: Any, tmp_path: Path
) -> None:
    from tiny_models import tiny_model

    service = start_service(valkey.url)
    worker = service.start_worker()
    job_id = service.submit(service.upload(tiny_model("LlamaForCausalLM", tmp_path / "tiny")), spec=QUANTIZE)
    wait_until(lambda: service.job(job_id)["stages"][0]["status"] == "done", seconds=120)
    began = time.monotonic()
    worker.process.send_signal(signal.SIGTERM)
    worker.process.wait(timeout=20)
    assert time.monotonic() - began < 10

    (submitted,) = collector.named("POST /v1/jobs")
    (attempt,) = collector.named("job attempt")
    assert (submitted.service, attempt.service) == ("modelpress-api", "modelpress-worker")
    assert (attempt.trace_id, attempt.parent_id) == (submitted.trace_id, submitted.span_id)
    assert attempt.attributes["modelpress.job.outcome"] == "queued"
    parts = sorted(
        (span for span in collector.spans if span.parent_id == attempt.span_id), key=lambda s: s.start
    )
    assert [span.name for span in parts][:3] == ["fetch inputs", "start process", "load"]
    assert {span.trace_id for span in parts} == {submitted.trace_id}
    assert f'"trace_id": "{submitted.trace_id}"' in (tmp_path / "worker-0.log").read_text()
