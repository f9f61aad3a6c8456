"""Metrics are counted in the database, so every process gives the same numbers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from fastapi.testclient import TestClient
from job_support import claim, finish
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import update

from app.db.engine import Database
from app.db.tables import Job

ROOT = Path(__file__).parents[3]


def samples(client: TestClient) -> dict[tuple[Any, ...], float]:
    text = client.get("/metrics").text
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_queues_are_there_before_the_first_job(client: TestClient) -> None:
    found = samples(client)
    assert found["modelpress_jobs", ("queue", "cpu"), ("status", "queued")] == 0
    assert found["modelpress_workers", ("queue", "gpu")] == 0
    assert found[("process_resident_memory_bytes",)] > 0


def test_jobs_are_counted_by_queue_and_timed_by_technique_and_outcome(
    any_database: Database, client: TestClient, add_model: Callable[..., str]
) -> None:
    body = {"model": add_model(), "spec": {"steps": [{"technique": "quantize.weights"}]}}
    ids = [client.post("/v1/jobs", json=body).json()["id"] for _ in range(3)]
    for job_id in ids[:2]:
        finish(any_database, claim(any_database, job_id), {"a": ("model", b"xyz")})
    with any_database.write() as session:
        times = {"queued_at": 1000.0, "started_at": 1002.0, "ended_at": 1022.0}
        session.execute(update(Job).where(Job.id == ids[0]).values(times))
        session.execute(update(Job).where(Job.id == ids[1]).values(times | {"ended_at": 1006.0}))
    found = samples(client)
    assert found["modelpress_jobs", ("queue", "cpu"), ("status", "queued")] == 1
    assert found["modelpress_jobs", ("queue", "cpu"), ("status", "succeeded")] == 2
    labels = (("outcome", "succeeded"), ("technique", "quantize.weights"))
    assert found["modelpress_job_duration_seconds_sum", *labels] == 24
    assert found["modelpress_job_duration_seconds_bucket", ("le", "5.0"), *labels] == 1
    assert found["modelpress_job_duration_seconds_bucket", ("le", "60.0"), *labels] == 2
    assert found["modelpress_job_queued_seconds_sum", *labels] == 4
    assert found["modelpress_stored_bytes", ("kind", "artifact")] == 6


def test_uploads_are_counted_with_their_bytes(any_database: Database, client: TestClient) -> None:
    client.post("/v1/uploads", json={"name": "a.txt", "size": 12})
    found = samples(client)
    assert found["modelpress_uploads", ("status", "open")] == 1
    assert found["modelpress_upload_bytes", ("status", "open")] == 12


def test_alerts_and_dashboard_ask_for_metrics_that_exist(client: TestClient) -> None:
    families = {family.name for family in text_string_to_metric_families(client.get("/metrics").text)}
    rules = yaml.safe_load((ROOT / "deploy" / "prometheus-rules.yml").read_text())
    dashboard = json.loads((ROOT / "deploy" / "grafana-dashboard.json").read_text())
    asked = [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    asked += [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    names = {name for query in asked for name in re.findall(r"\b(?:modelpress|process)_[a-z_]+", query)}
    assert len(names) > 5
    assert {re.sub("_(bucket|count|sum|total)$", "", name) for name in names} <= families
