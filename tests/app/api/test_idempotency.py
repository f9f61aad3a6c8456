"""A call with an Idempotency-Key happens once, however often it is sent."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import event
from sqlalchemy.orm import Session

from app.access import DEFAULT_TENANT
from app.db import idempotency_queries, job_moves
from app.db.engine import Database, get_database
from app.db.idempotency_queries import Answer
from app.db.tables import Job
from app.errors import Unavailable


def post(client: TestClient | httpx.Client, key: str, model: str, recipe: str = "int8") -> Any:
    return client.post("/v1/jobs", json={"model": model, "recipe": recipe}, headers={"Idempotency-Key": key})


def count(client: TestClient) -> int:
    return len(client.get("/v1/jobs").json()["items"])


def test_the_same_call_gives_the_first_answer_again(
    any_database: Database, client: TestClient, add_model: Callable[..., str]
) -> None:
    model = add_model()
    first, again = post(client, "k", model), post(client, "k", model)
    assert (again.status_code, again.text) == (202, first.text)
    assert again.headers["location"] == first.headers["location"]
    assert again.headers["content-type"] == first.headers["content-type"]
    assert again.headers["idempotency-replayed"] == "true"
    assert "idempotency-replayed" not in first.headers
    assert count(client) == 1


def test_another_body_with_the_same_key_is_refused(client: TestClient, add_model: Callable[..., str]) -> None:
    model = add_model()
    post(client, "k", model)
    answer = post(client, "k", model, recipe="int4")
    assert (answer.status_code, answer.json()["code"]) == (422, "idempotency_mismatch")
    assert count(client) == 1


def test_the_same_key_on_another_path_is_refused(client: TestClient, add_model: Callable[..., str]) -> None:
    job = post(client, "k", add_model()).json()
    answer = client.post(job["urls"]["cancel"], headers={"Idempotency-Key": "k"})
    assert answer.json()["code"] == "idempotency_mismatch"


def test_a_call_still_in_flight_is_a_conflict(client: TestClient, add_model: Callable[..., str]) -> None:
    model = add_model()
    post(client, "k", model)
    with get_database().for_tenant(DEFAULT_TENANT).write() as session:
        digest, _ = idempotency_queries.read_key(session, "k")
        idempotency_queries.take_key(session, "k2", digest, stale_seconds=60)
    answer = post(client, "k2", model)
    assert (answer.status_code, answer.json()["code"]) == (409, "idempotency_in_flight")


def test_a_key_whose_process_died_can_be_used_again(
    any_database: Database, client: TestClient, add_model: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = add_model()
    post(client, "k", model)
    with any_database.for_tenant(DEFAULT_TENANT).write() as session:
        digest, _ = idempotency_queries.read_key(session, "k")
        idempotency_queries.take_key(session, "k2", digest, stale_seconds=60)
    monkeypatch.setattr("app.api.idempotency._ABANDONED_AFTER_SECONDS", -1.0)
    assert post(client, "k2", model).status_code == 202


def test_a_refused_call_leaves_its_key_free(
    any_database: Database, client: TestClient, add_model: Callable[..., str]
) -> None:
    model = add_model()
    assert post(client, "k", model, recipe="none").status_code == 422
    assert post(client, "k", model).status_code == 202


def test_a_call_that_fails_after_it_has_written_leaves_neither_job_nor_key(
    any_database: Database, client: TestClient, add_model: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = add_model()

    def broken(*_: object) -> None:
        raise Unavailable("gone")

    with monkeypatch.context() as patched:
        patched.setattr(job_moves, "mark_dispatched", broken)
        assert post(client, "k", model).status_code == 503
    assert count(client) == 0
    assert post(client, "k", model).status_code == 202


def test_a_commit_that_fails_leaves_its_key_free(
    any_database: Database, client: TestClient, add_model: Callable[..., str]
) -> None:
    model = add_model()

    def written(session: Session, _: object) -> None:
        session.info["breaks"] = any(isinstance(row, Job) for row in session.new)

    def broken(session: Session) -> None:
        if session.info.pop("breaks", False):
            raise Unavailable("gone")

    event.listen(Session, "after_flush", written)
    event.listen(Session, "before_commit", broken)
    try:
        assert post(client, "k", model).status_code == 503
    finally:
        event.remove(Session, "after_flush", written)
        event.remove(Session, "before_commit", broken)
    assert count(client) == 0
    assert post(client, "k", model).status_code == 202


def test_who_lost_a_key_keeps_no_answer_and_drops_nobody_elses(any_database: Database) -> None:
    with any_database.for_tenant(DEFAULT_TENANT).write() as session:
        slow = idempotency_queries.take_key(session, "k", "digest", stale_seconds=60)
    with any_database.for_tenant(DEFAULT_TENANT).write() as session:
        other = idempotency_queries.take_key(session, "k", "digest", stale_seconds=-1)
        assert slow is not None
        assert other is not None
        answer = Answer(202, {}, "{}")
        assert not idempotency_queries.keep_answer(session, slow, answer)
        idempotency_queries.forget_key(session, slow)
        assert idempotency_queries.keep_answer(session, other, answer)
        assert idempotency_queries.read_key(session, "k") == ("digest", answer)


def test_a_key_that_is_too_long_is_refused(client: TestClient, add_model: Callable[..., str]) -> None:
    answer = post(client, "k" * 256, add_model())
    assert answer.json()["errors"][0]["parameter"] == "header/Idempotency-Key"


def test_old_keys_are_forgotten(
    client: TestClient, add_model: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = add_model()
    post(client, "k", model)
    monkeypatch.setattr("app.api.idempotency._KEPT_SECONDS", -1.0)
    assert "idempotency-replayed" not in post(client, "k", model).headers


def test_of_calls_sent_at_once_one_does_the_work(
    any_database: Database, server_url: str, client: TestClient, add_model: Callable[..., str]
) -> None:
    model = add_model()
    with httpx.Client(base_url=server_url, timeout=30) as http, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: post(http, "k", model), range(8)))
    made = {answer.json()["id"] for answer in answers if answer.status_code == 202}
    assert len(made) == count(client) == 1
    assert {answer.status_code for answer in answers} <= {202, 409}
