"""Liveness asks nothing; readiness asks everything and says which part is missing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from fastapi.testclient import TestClient
from s3_server import S3Server

from app.db import worker_queries
from app.db.engine import get_database
from app.services.health import check_readiness
from app.settings import Settings, get_settings


@pytest.fixture(autouse=True)
def always_now(monkeypatch: pytest.MonkeyPatch) -> None:
    """No answer is kept, unless a test asks for it."""
    monkeypatch.setattr("app.services.health._RECENT_SECONDS", -1.0)


def test_an_answer_holds_for_a_while(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def workers() -> int:
        return int(client.get("/v1/health/ready").json()["checks"]["workers"]["facts"]["count"])

    monkeypatch.setattr("app.services.health._RECENT_SECONDS", 60.0)
    assert workers() == 0
    with get_database().write() as session:
        worker_queries.announce(session, "w", queues="cpu", hardware={}, sandbox="process")
    assert workers() == 0
    monkeypatch.setattr("app.services.health._RECENT_SECONDS", -1.0)
    assert workers() == 1


def test_a_service_without_its_dependencies_is_alive(
    override_settings: Callable[..., Settings], request: pytest.FixtureRequest
) -> None:
    override_settings(database_url="postgresql://nobody@127.0.0.1:1/none")
    client: TestClient = request.getfixturevalue("client")
    assert client.get("/v1/health/live").status_code == 200
    answer = client.get("/v1/health/ready")
    assert (answer.status_code, answer.json()["status"]) == (503, "unavailable")
    assert not answer.json()["checks"]["database"]["ok"]


def test_without_broker_and_workers_it_is_degraded_and_says_so(client: TestClient) -> None:
    answer = client.get("/v1/health/ready")
    checks = answer.json()["checks"]
    assert (answer.status_code, answer.json()["status"]) == (200, "degraded")
    assert {name: check["ok"] for name, check in checks.items()} == {
        "database": True, "storage": True, "broker": False, "workers": False, "sandbox": True,
    }  # fmt: skip
    assert checks["database"]["facts"]["schema_version"]
    assert checks["storage"]["facts"] == {}


def test_with_everything_there_it_is_ready_and_tells_queues_and_sandboxes(
    override_settings: Callable[..., Settings], any_broker: Any, request: pytest.FixtureRequest
) -> None:
    override_settings(redis_url=any_broker.url)
    client: TestClient = request.getfixturevalue("client")
    with get_database().write() as session:
        worker_queries.announce(session, "w", queues="cpu", hardware={}, sandbox="process")
    answer = client.get("/v1/health/ready").json()
    assert answer["status"] == "ready"
    assert answer["checks"]["workers"]["facts"] == {"count": 1, "queues": ["cpu"], "sandboxes": ["process"]}


def test_a_full_disk_makes_it_unavailable(
    override_settings: Callable[..., Settings], request: pytest.FixtureRequest
) -> None:
    override_settings(min_free_disk_bytes=2**60)
    client: TestClient = request.getfixturevalue("client")
    answer = client.get("/v1/health/ready")
    assert answer.status_code == 503
    assert "nearly full" in answer.json()["checks"]["storage"]["detail"]


def test_a_store_that_is_away_or_refuses_us_makes_it_unavailable_and_names_nothing_of_ours(
    s3_server: S3Server, use_s3: Callable[..., Settings], request: pytest.FixtureRequest
) -> None:
    use_s3(s3_server)
    client: TestClient = request.getfixturevalue("client")
    assert client.get("/v1/health/ready").json()["checks"]["storage"]["ok"]
    for changes, ours in (
        ({"s3_endpoint_url": "http://127.0.0.1:9"}, "127.0.0.1"),
        ({"store": "s3://nobodys-bucket"}, "nobodys-bucket"),
    ):
        use_s3(s3_server, **changes)
        answer = client.get("/v1/health/ready")
        assert answer.status_code == 503
        assert "(storage_unavailable)" in answer.json()["checks"]["storage"]["detail"]
        assert ours not in answer.text


def test_the_weakest_sandbox_is_shown_and_must_not_be_below_the_minimum(
    override_settings: Callable[..., Settings], request: pytest.FixtureRequest
) -> None:
    override_settings(sandbox="landlock")
    client: TestClient = request.getfixturevalue("client")

    def check(*levels: str) -> dict[str, Any]:
        with get_database().write() as session:
            for level in levels:
                worker_queries.announce(session, f"w-{level}", queues="cpu", hardware={}, sandbox=level)
        return dict(client.get("/v1/health/ready").json()["checks"]["sandbox"])

    good = check("namespaces", "landlock")
    assert (good["ok"], good["facts"]) == (True, {"weakest": "landlock", "minimum": "landlock"})
    bad = check("namespaces", "process")
    assert not bad["ok"]
    assert "MODELPRESS_SANDBOX=landlock" in bad["detail"]
    override_settings(sandbox="process")
    assert check_readiness(get_settings()).checks["sandbox"].detail.startswith("WARNING")
