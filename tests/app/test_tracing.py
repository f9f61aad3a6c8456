"""Traces of requests, and what happens where they are not wanted, cannot be had, or find no collector."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest
from fastapi.testclient import TestClient
from key_support import MakeKey, bearer
from otlp_collector import Collector

from app import tracing
from app.access import Role
from app.db.engine import Database
from app.db.tables import Job
from app.errors import InvalidRequest

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
SPAN = "00f067aa0ba902b7"


def test_a_request_has_a_span_below_the_callers_and_its_job_keeps_it(
    collector: Collector,
    any_database: Database,
    client: TestClient,
    add_model: Callable[..., str],
) -> None:
    headers = {"traceparent": f"00-{TRACE}-{SPAN}-01", "x-request-id": "mine"}
    body = {"model": add_model(), "recipe": "int8"}
    answer = client.post("/v1/jobs", json=body, headers=headers)
    client.get("/v1/jobs", params={"label": "secret:word"})
    tracing.stop()
    span, listed = collector.spans
    assert (span.name, span.kind, span.service) == ("POST /v1/jobs", "SERVER", "modelpress-api")
    assert (span.trace_id, span.parent_id, span.failed) == (TRACE, SPAN, False)
    assert (
        span.attributes.items()
        >= {
            "http.request.method": "POST",
            "http.route": "/v1/jobs",
            "http.response.status_code": 202,
            "modelpress.request_id": "mine",
            "modelpress.principal": "anonymous",
            "modelpress.tenant": "default",
        }.items()
    )
    assert listed.name == "GET /v1/jobs"
    assert "word" not in str(listed)
    with any_database.read() as session:
        assert session.get_one(Job, answer.json()["id"]).traceparent == f"00-{TRACE}-{span.span_id}-01"


def test_spans_show_routes_and_failures_and_no_keys(
    collector: Collector, make_key: MakeKey, client: TestClient
) -> None:
    token = make_key(Role.READER, tenant="acme")
    client.get("/v1/jobs/job_1", headers=bearer(token))
    client.get("/v1/models")
    for polled in ("/v1/health/live", "/metrics"):
        client.get(polled, headers=bearer(token))
    tracing.stop()
    missing, refused = collector.spans
    assert (missing.name, missing.attributes["http.response.status_code"]) == ("GET /v1/jobs/{job_id}", 404)
    assert missing.attributes["modelpress.tenant"] == "acme"
    assert refused.attributes["http.response.status_code"] == 401
    assert token not in str(collector.spans)


def test_the_log_names_the_trace(collector: Collector, settings: object) -> None:
    code = (
        "from app.main import app; from fastapi.testclient import TestClient\n"
        f"with TestClient(app) as c: c.get('/v1/recipes', headers={{'traceparent': '00-{TRACE}-{SPAN}-01'}})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    (line,) = [line for line in map(json.loads, done.stderr.splitlines()) if line["event"] == "request"]
    assert line["trace_id"] == TRACE
    assert [span.trace_id for span in collector.spans] == [TRACE], "sent when the app ends"


def test_where_no_traces_are_wanted_nothing_is_imported_for_them() -> None:
    code = (
        "import sys, app.main, workers.tasks\n"
        "sdk = ('opentelemetry.sdk.trace', 'opentelemetry.exporter', 'google.protobuf')\n"
        "print([m for m in sdk if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.fixture
def silent_collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{listener.getsockname()[1]}")
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "6")
        yield
        tracing.stop()


@pytest.mark.timed
def test_a_collector_that_does_not_answer_delays_nothing(
    silent_collector: None, client: TestClient, add_model: Callable[..., str]
) -> None:
    began = time.monotonic()
    answer = client.post("/v1/jobs", json={"model": add_model(), "recipe": "int8"})
    assert answer.status_code == 202
    assert time.monotonic() - began < 4
    began = time.monotonic()
    tracing.stop()
    assert time.monotonic() - began < 3


@pytest.mark.parametrize(
    ("variables", "because"),
    [
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, "zipkin"),
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "not by grpc"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "collector:4318"}, "collector:4318"),
        ({"OTEL_BSP_SCHEDULE_DELAY": "0"}, "must be positive"),
    ],
)
def test_what_cannot_be_done_is_said_at_the_start(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], because: str
) -> None:
    for name, value in ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"} | variables).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InvalidRequest, match=because) as no:
        tracing.start("api")
    assert no.value.hint


def test_without_the_extra_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "otlp")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(InvalidRequest) as no:
        tracing.check()
    assert "modelpress[traces]" in str(no.value.hint)
