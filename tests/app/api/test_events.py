"""Events: pages and streams over a real server, which end when the job has ended and go on where they broke."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from job_support import claim, finish
from sqlalchemy.orm import Session
from waiting import wait_until

from app.db import job_queries
from app.db.engine import Database, get_database


@pytest.fixture
def http(server_url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server_url, timeout=20) as http:
        yield http


@pytest.fixture
def job(http: httpx.Client, add_model: Callable[..., str]) -> dict[str, Any]:
    return dict(http.post("/v1/jobs", json={"model": add_model(), "recipe": "int8"}).json())


def parse(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """Events of a stream, as a client sees them: id and type from their fields, the rest from the data."""
    fields: dict[str, str] = {}
    for line in lines:
        if line:
            name, _, value = line.partition(": ")
            fields[name] = value
        elif "data" in fields:
            event = json.loads(fields["data"])
            assert (fields["id"], fields["event"]) == (str(event["number"]), event["type"])
            yield event
            fields = {}


def stream(http: httpx.Client, job: dict[str, Any], **headers: str) -> list[dict[str, Any]]:
    headers["Accept"] = "text/event-stream"
    with http.stream("GET", job["urls"]["events"], headers=headers) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        return list(parse(answer.iter_lines()))


def add_log(database: Database, job_id: str, message: str) -> None:
    with database.write() as session:
        job_queries.add_events(session, job_id, [("log", {"message": message})])


def test_events_come_in_pages(any_database: Database, http: httpx.Client, job: dict[str, Any]) -> None:
    for number in range(4):
        add_log(any_database, job["id"], str(number))
    page = http.get(job["urls"]["events"], params={"after": 1, "limit": 2}).json()
    assert ([e["number"] for e in page["items"]], page["has_more"]) == ([2, 3], True)
    rest = http.get(job["urls"]["events"], params={"after": 3, "limit": 2}).json()
    assert ([e["number"] for e in rest["items"]], rest["has_more"]) == ([4, 5], False)


def test_a_number_no_event_can_have_is_refused(
    any_database: Database, http: httpx.Client, job: dict[str, Any]
) -> None:
    stream = {"Accept": "text/event-stream", "Last-Event-ID": str(2**63)}
    assert http.get(job["urls"]["events"], params={"after": 2**63}).status_code == 422
    assert http.get(job["urls"]["events"], headers=stream).status_code == 422
    assert http.get(job["urls"]["events"], params={"after": 2**63 - 1}).json()["items"] == []


def test_events_of_an_unknown_job_are_a_problem_even_as_a_stream(http: httpx.Client) -> None:
    answer = http.get("/v1/jobs/job_0/events", headers={"Accept": "text/event-stream"})
    assert (answer.status_code, answer.headers["content-type"]) == (404, "application/problem+json")


def test_a_stream_tells_what_happens_and_ends_with_the_job(
    any_database: Database, http: httpx.Client, job: dict[str, Any]
) -> None:
    taken = claim(any_database, job["id"])

    def work() -> None:
        for number in range(3):
            time.sleep(0.1)
            add_log(any_database, job["id"], str(number))
        finish(any_database, taken, {})

    worker = threading.Thread(target=work)
    worker.start()
    events = stream(http, job)
    worker.join()
    assert [e["number"] for e in events] == [1, 2, 3, 4, 5, 6]
    assert events[-1]["data"]["status"] == "succeeded"


def test_a_stream_goes_on_behind_the_last_event_id(http: httpx.Client, job: dict[str, Any]) -> None:
    finish(get_database(), claim(get_database(), job["id"]), {})
    assert [e["number"] for e in stream(http, job, **{"Last-Event-ID": "2"})] == [3]
    assert stream(http, job, **{"Last-Event-ID": "3"}) == []


def test_a_stream_of_a_retried_job_does_not_stop_at_its_first_end(
    http: httpx.Client, job: dict[str, Any]
) -> None:
    http.post(job["urls"]["cancel"])
    http.post(job["urls"]["retry"])
    http.post(job["urls"]["cancel"])
    statuses = [e["data"]["status"] for e in stream(http, job)]
    assert statuses == ["queued", "cancelled", "queued", "cancelled"]


def test_an_event_arrives_within_a_second(http: httpx.Client, job: dict[str, Any]) -> None:
    with http.stream("GET", job["urls"]["events"], headers={"Accept": "text/event-stream"}) as answer:
        events = parse(answer.iter_lines())
        assert next(events)["number"] == 1
        began = time.monotonic()
        add_log(get_database(), job["id"], "now")
        assert next(events)["data"] == {"message": "now"}
        assert time.monotonic() - began < 1


def test_a_silent_stream_is_kept_alive(
    http: httpx.Client, job: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.api.events._KEEP_ALIVE_SECONDS", 0.1)
    with http.stream("GET", job["urls"]["events"], headers={"Accept": "text/event-stream"}) as answer:
        lines = answer.iter_lines()
        assert ": ping" in (next(lines) for _ in range(10))


def test_one_query_answers_for_all_streams(
    http: httpx.Client, add_model: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = add_model()
    jobs = [http.post("/v1/jobs", json={"model": model, "recipe": "int8"}).json() for _ in range(12)]
    asked: list[int] = []

    def counted(session: Session, job_ids: Collection[str]) -> dict[str, int]:
        asked.append(len(job_ids))
        return count_events(session, job_ids)

    count_events = job_queries.count_events
    monkeypatch.setattr(job_queries, "count_events", counted)
    with ThreadPoolExecutor(len(jobs)) as pool:
        streams = [pool.submit(stream, http, job) for job in jobs]
        wait_until(lambda: asked[-1:] == [len(jobs)])
        del asked[:]
        time.sleep(1)
        assert 1 <= len(asked) <= 5
        for job in jobs:
            http.post(job["urls"]["cancel"])
        assert all(len(events.result()) == 2 for events in streams)
