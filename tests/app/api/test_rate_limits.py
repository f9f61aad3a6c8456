"""Calls are counted by tenant, over all API processes, on real brokers; without one nobody is held up."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fastapi.testclient import TestClient
from key_support import MakeKey, bearer

from app.rate_limits import RateLimiter
from app.settings import Settings


def test_over_the_limit_calls_are_refused_until_some_are_paid_off(any_broker: Any) -> None:
    limiter = RateLimiter(any_broker.url, per_minute=60)  # one is paid off in a second
    with ThreadPoolExecutor(8) as pool:
        taken = [a for few in pool.map(lambda _: limiter.take(["acme"] * 5), range(40)) for a in few or ()]
    assert len(taken) == 200
    allowed = sum(allowance.allowed for allowance in taken)
    assert 60 <= allowed < 200, "the burst, and what was paid off meanwhile"
    refused = next(a for a in taken if not a.allowed)
    assert (refused.remaining, refused.reset_seconds) == (0, 1)
    mixed = limiter.take(["umbrella", "other", "umbrella"])
    assert mixed is not None
    assert [(a.allowed, a.remaining) for a in mixed] == [(True, 59), (True, 59), (True, 58)]


def test_two_processes_count_together_and_tell_what_is_left(
    valkey: Any, make_key: MakeKey, override_settings: Callable[..., Settings]
) -> None:
    from app.main import create_app

    settings = override_settings(redis_url=valkey.url, rate_limit_per_minute=3)
    acme, umbrella = (bearer(make_key(tenant=name)) for name in ("acme", "umbrella"))
    with TestClient(create_app(settings)) as one, TestClient(create_app(settings)) as two:
        answers = [client.get("/v1/recipes", headers=acme) for client in (one, two, one, two)]
        assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
        assert answers[0].headers["ratelimit-policy"] == '"tenant";q=3;w=60'
        assert [a.headers["ratelimit"].split(";")[1] for a in answers] == ["r=2", "r=1", "r=0", "r=0"]
        assert answers[3].json()["code"] == "rate_limited"
        assert 0 < int(answers[3].headers["retry-after"]) <= 20
        assert one.get("/v1/recipes", headers=umbrella).status_code == 200
        assert one.get("/v1/health/live").status_code == 200
        assert one.get("/v1/recipes").status_code == 401


def test_without_its_broker_calls_pass(
    override_settings: Callable[..., Settings], request: pytest.FixtureRequest
) -> None:
    override_settings(rate_limit_per_minute=1)
    client: TestClient = request.getfixturevalue("client")
    answers = [client.get("/v1/recipes") for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200] * 3
    assert "ratelimit" not in answers[0].headers
