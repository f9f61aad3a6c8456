"""Traces of jobs: attempts and their parts, under the request that submitted the job."""

from __future__ import annotations

import signal

import pytest
from bench import STAGES, Bench
from otlp_collector import Collector

from app import tracing
from app.db.tables import Job

pytestmark = pytest.mark.timed

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
SPAN = "00f067aa0ba902b7"
ALL = len(STAGES)
FINISHED = ("emit", {"type": "finished", "verdict": "accepted"})


@pytest.fixture
def traced(collector: Collector, fast_bench: Bench) -> Collector:
    tracing.start("worker")
    return collector


def submit(bench: Bench, *, flags: str = "01") -> str:
    job_id = bench.submit()
    with bench.database.write() as session:
        session.get_one(Job, job_id).traceparent = f"00-{TRACE}-{SPAN}-{flags}"
    return job_id


def test_attempts_of_a_job_are_in_one_trace_with_their_stages(traced: Collector, fast_bench: Bench) -> None:
    job_id = submit(fast_bench)
    begun = ("emit", {"type": "stage_started", "stage": 2, "name": "no name of ours"})
    fast_bench.supervisor(("stages", 2), begun, ("die", signal.SIGKILL)).run(job_id)
    fast_bench.due_now(job_id)
    fast_bench.supervisor(("stages", ALL), FINISHED).run(job_id)
    tracing.stop()
    assert {(span.trace_id, span.service) for span in traced.spans} == {(TRACE, "modelpress-worker")}
    died, done = traced.named("job attempt")
    assert {(a.parent_id, a.kind) for a in (died, done)} == {(SPAN, "CONSUMER")}
    parts = [
        [span for span in sorted(traced.spans, key=lambda s: s.start) if span.parent_id == attempt.span_id]
        for attempt in (died, done)
    ]
    before = ["fetch inputs", "start process"]
    assert [span.name for span in parts[0]] == [*before, *STAGES[:3]]
    assert [span.name for span in parts[1]] == [*before, *STAGES[2:], "publish"]
    assert [span.name for span in traced.spans if span.failed] == [STAGES[2], "job attempt"]
    assert died.attributes["error.type"] == "process_died"
    assert (
        done.attributes.items()
        >= {
            "modelpress.job.id": job_id,
            "modelpress.job.attempt": 2,
            "modelpress.job.technique": "quantize.weights",
            "modelpress.job.queue": "cpu",
            "modelpress.job.outcome": "succeeded",
            "modelpress.model.architecture": "A",
            "modelpress.model.bytes": 7,
            "modelpress.tenant": "default",
        }.items()
    )
    for attempt, children in zip((died, done), parts, strict=True):
        times = [t for span in children for t in (span.start, span.end)]
        assert [attempt.start, *times, attempt.end] == sorted([attempt.start, *times, attempt.end])


def test_a_job_whose_request_was_not_sampled_is_not_either(traced: Collector, fast_bench: Bench) -> None:
    assert fast_bench.supervisor(("stages", ALL), FINISHED).run(submit(fast_bench, flags="00")) == "succeeded"
    tracing.stop()
    assert traced.spans == []


def test_a_job_without_a_trace_begins_one(traced: Collector, fast_bench: Bench) -> None:
    assert fast_bench.supervisor(("stages", ALL), FINISHED).run(fast_bench.submit()) == "succeeded"
    tracing.stop()
    (attempt,) = traced.named("job attempt")
    assert attempt.parent_id == ""
    assert {span.trace_id for span in traced.spans} == {attempt.trace_id}
