"""What a tenant may use is asked where it is used up, however many ask at once."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from job_support import claim
from key_support import MakeKey, bearer
from model_files import llama_files, zipped
from sqlalchemy import update

from app.db import job_claims
from app.db.engine import Database
from app.db.quota_queries import Limits
from app.db.tables import WorkerTime
from app.errors import NotFound
from app.services.quotas import set_limits

AddModel = Callable[..., str]


def limit(database: Database, *, stored_bytes: int | None = None, queued_jobs: int | None = None) -> None:
    with database.write() as session:
        set_limits(session, "default", Limits(stored_bytes, queued_jobs))


def test_of_jobs_submitted_at_once_no_more_than_the_quota_are_queued(
    any_database: Database, server_url: str, add_model: AddModel
) -> None:
    body = {"model": add_model(), "recipe": "int8"}
    limit(any_database, queued_jobs=3)
    with httpx.Client(base_url=server_url, timeout=60) as http, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: http.post("/v1/jobs", json=body), range(8)))
        assert sorted(answer.status_code for answer in answers) == [202] * 3 + [429] * 5
        assert len(http.get("/v1/jobs").json()["items"]) == 3
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert refused.json()["code"] == "quota_queued_jobs"
    assert int(refused.headers["retry-after"]) > 0


def test_a_job_that_starts_makes_room_and_a_retry_takes_some(
    any_database: Database, client: TestClient, add_model: AddModel
) -> None:
    body = {"model": add_model(), "recipe": "int8"}
    limit(any_database, queued_jobs=1)
    first = client.post("/v1/jobs", json=body).json()
    assert client.post("/v1/jobs", json=body).status_code == 429
    claim(any_database, first["id"])
    second = client.post("/v1/jobs", json=body).json()
    client.post(second["urls"]["cancel"])
    assert client.post("/v1/jobs", json=body).status_code == 202
    assert client.post(second["urls"]["retry"]).json()["code"] == "quota_queued_jobs"


def test_uploads_announced_at_once_stay_within_the_quota(any_database: Database, server_url: str) -> None:
    limit(any_database, stored_bytes=1000)
    with httpx.Client(base_url=server_url, timeout=60) as http, ThreadPoolExecutor(8) as pool:
        body = {"name": "a", "size": 300}
        answers = list(pool.map(lambda _: http.post("/v1/uploads", json=body), range(8)))
        assert sorted(answer.status_code for answer in answers) == [201] * 3 + [403] * 5
        made = [answer.json()["id"] for answer in answers if answer.status_code == 201]
        assert http.get("/v1/quota").json()["stored_bytes"] == {"used": 900, "limit": 1000}
        assert http.delete(f"/v1/uploads/{made[0]}").status_code == 204
        assert http.post("/v1/uploads", json=body).status_code == 201


@pytest.mark.parametrize(
    ("path", "name", "content"),
    [("models", "m.zip", zipped(llama_files())), ("datasets", "a.txt", b"some words " * 200)],
)
def test_what_comes_as_a_body_is_counted_and_leaves_nothing_when_refused(
    any_database: Database, client: TestClient, path: str, name: str, content: bytes
) -> None:
    from app.storage import get_store

    send: dict[str, Any] = {"params": {"name": name}, "content": content}
    limit(any_database, stored_bytes=1000)
    refused = client.put(f"/v1/{path}/content", **send)
    assert (refused.status_code, refused.json()["code"]) == (403, "quota_stored_bytes")
    assert not list(get_store().iter_blobs())
    limit(any_database)
    made = client.put(f"/v1/{path}/content", **send).json()
    assert client.get("/v1/quota").json()["stored_bytes"] == {"used": made["bytes"], "limit": None}


def use_worker(database: Database, job_id: str, seconds: float) -> None:
    """Have a worker hold a job for so long, and fail it."""
    taken = claim(database, job_id)
    with database.write() as session:
        job_claims.fail(session, taken, {"code": "x", "detail": "x"})
        held = {"held_until": WorkerTime.started_at + seconds}
        session.execute(update(WorkerTime).where(WorkerTime.job_id == job_id).values(held))


def test_no_job_is_accepted_once_the_months_worker_seconds_are_used_up(
    any_database: Database, client: TestClient, add_model: AddModel
) -> None:
    body = {"model": add_model(), "recipe": "int8"}
    with any_database.write() as session:
        set_limits(session, "default", Limits(None, None, worker_seconds=100))
    first = client.post("/v1/jobs", json=body).json()
    waiting = client.post("/v1/jobs", json=body).json()
    use_worker(any_database, first["id"], 99)
    assert client.post("/v1/jobs", json=body).status_code == 202
    use_worker(any_database, waiting["id"], 21)
    refused = client.post("/v1/jobs", json=body)
    quota = client.get("/v1/quota").json()["worker_seconds"]
    assert (refused.status_code, refused.json()["code"]) == (403, "quota_worker_seconds")
    assert "120 worker seconds" in refused.json()["detail"]
    assert quota["refreshes_at"] in refused.json()["hint"]
    assert (quota["used"], quota["limit"]) == (120, 100)
    assert client.post(first["urls"]["retry"]).json()["code"] == "quota_worker_seconds"
    assert client.delete(first["urls"]["self"]).status_code == 204
    assert "modelpress_worker_seconds_this_month 120." in client.get("/metrics").text
    assert client.post("/v1/jobs", json=body).status_code == 403
    limit(any_database)
    assert client.post("/v1/jobs", json=body).status_code == 202


def test_a_tenant_is_not_held_to_what_others_use(
    make_key: MakeKey, any_database: Database, client: TestClient
) -> None:
    acme, umbrella = (bearer(make_key(tenant=name)) for name in ("acme", "umbrella"))
    with any_database.write() as session:
        set_limits(session, "acme", Limits(100, None))
    body = {"name": "a", "size": 100}
    assert client.post("/v1/uploads", json=body, headers=umbrella).status_code == 201
    assert [client.post("/v1/uploads", json=body, headers=acme).status_code for _ in "12"] == [201, 403]


def test_limits_are_set_on_tenants_there_are(database: Database) -> None:
    with pytest.raises(NotFound), database.write() as session:
        set_limits(session, "nobody", Limits(1, 1))
