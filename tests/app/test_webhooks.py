"""Webhooks: what happened is told once it is committed, signed, again and again until it is heard, and to no one else."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from fastapi.testclient import TestClient
from job_support import claim, finish
from key_support import MakeKey, bearer
from model_files import llama_files, zipped
from sqlalchemy import update
from waiting import wait_until

from app.access import Role
from app.db import webhook_queries
from app.db.engine import Database, get_database
from app.db.tables import WebhookMessage
from app.services import webhook_delivery
from app.services.webhook_delivery import WAITS, Deliveries
from app.settings import Settings, get_settings

AddModel = Callable[..., str]


class Receiver:
    """A server of a user's: remembers what it was sent, and answers as it is told."""

    def __init__(self) -> None:
        self.got: list[tuple[dict[str, str], bytes]] = []
        self.answer = 200
        self.word = b"word"
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                outer.got.append(({k.lower(): v for k, v in self.headers.items()}, body))
                self.send_response(outer.answer)
                self.send_header("content-length", "4")
                self.end_headers()
                self.wfile.write(outer.word)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/hook"


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    thread = threading.Thread(target=receiver.server.serve_forever)
    thread.start()
    yield receiver
    receiver.server.shutdown()
    receiver.server.server_close()
    thread.join()


@pytest.fixture
def allowing(override_settings: Callable[..., Settings]) -> None:
    """Loopback is a network that the administrator allows."""
    override_settings(outbound_networks="127.0.0.0/8, ::1/128")


def make(client: TestClient, url: str, **more: Any) -> dict[str, Any]:
    answer = client.post("/v1/webhooks", json={"url": url, **more})
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


def deliver(database: Database) -> int:
    with Deliveries(database, get_settings()) as deliveries:
        return deliveries.start_due()


def make_due(database: Database) -> None:
    """Let the time of the next attempt come."""
    with database.write() as session:
        session.execute(update(WebhookMessage).values(next_attempt_at=0.0))


def messages(client: TestClient, webhook: dict[str, Any], **query: str) -> list[dict[str, Any]]:
    return list(client.get(webhook["urls"]["messages"], params=query).json()["items"])


def verify(secret: str, headers: dict[str, str], body: bytes) -> bool:
    """As a receiver does it, by the text of Standard Webhooks."""
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    key = base64.b64decode(secret.removeprefix("whsec_"))
    expected = base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
    return f"v1,{expected}" in headers["webhook-signature"].split()


@pytest.mark.usefixtures("allowing")
def test_the_end_of_a_job_is_told_as_a_signed_cloud_event(
    any_database: Database, client: TestClient, add_model: AddModel, receiver: Receiver
) -> None:
    webhook = make(client, receiver.url)
    body = {"model": add_model(), "recipe": "int8", "labels": {"team": "speech"}}
    job_id = client.post("/v1/jobs", json=body).json()["id"]
    finish(any_database, claim(any_database, job_id), {"report.json": ("report", b"{}")})
    assert deliver(any_database) == 1
    ((headers, sent),) = receiver.got
    assert verify(webhook["secret"], headers, sent)
    assert not verify(webhook["secret"], headers, sent + b" ")
    event = json.loads(sent)
    assert (event["specversion"], event["type"], event["subject"]) == (
        "1.0",
        "modelpress.job.succeeded",
        job_id,
    )
    assert event["id"] == headers["webhook-id"]
    assert event["data"]["labels"] == {"team": "speech"}
    assert event["data"]["url"] == f"/v1/jobs/{job_id}"
    assert headers["content-type"].startswith("application/cloudevents+json")
    assert deliver(any_database) == 0, "it is not sent twice"
    (message,) = messages(client, webhook)
    assert (message["status"], message["attempts"], message["answer_status"]) == ("delivered", 1, 200)


@pytest.mark.usefixtures("allowing")
def test_what_was_rolled_back_is_not_told(
    any_database: Database, client: TestClient, receiver: Receiver
) -> None:
    webhook = make(client, receiver.url)
    with any_database.write() as session:
        webhook_queries.add_message(session, webhook["id"], "default", "job.failed", {})
        session.rollback()
    assert deliver(any_database) == 0


@pytest.mark.usefixtures("allowing")
def test_a_message_is_tried_ten_times_and_then_dead_and_can_be_replayed(
    any_database: Database, client: TestClient, receiver: Receiver
) -> None:
    webhook = make(client, receiver.url)
    receiver.answer = 500
    client.post(webhook["urls"]["test"])
    for attempt in range(1, len(WAITS) + 2):
        assert deliver(any_database) == 1
        (message,) = messages(client, webhook)
        assert message["attempts"] == attempt
        assert deliver(any_database) == 0, "the next attempt is later"
        make_due(any_database)
    assert (message["status"], message["answer_status"], message["error"]) == ("dead", 500, "word")
    assert len(receiver.got) == 10
    assert len({headers["webhook-id"] for headers, _ in receiver.got}) == 1
    assert deliver(any_database) == 0
    assert [m["id"] for m in messages(client, webhook, status="dead")] == [message["id"]]
    receiver.answer = 204
    replayed = client.post(f"{webhook['urls']['messages']}/{message['id']}/replay")
    assert (replayed.status_code, replayed.json()["status"]) == (202, "pending")
    assert deliver(any_database) == 1
    assert messages(client, webhook)[0]["status"] == "delivered"


@pytest.mark.usefixtures("allowing")
def test_whatever_breaks_while_a_message_is_sent_is_an_attempt_that_failed(
    any_database: Database, client: TestClient, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    webhook = make(client, receiver.url)
    client.post(webhook["urls"]["test"])

    def breaks(*_: object) -> None:
        raise RuntimeError("nobody thought of this")

    with monkeypatch.context() as broken:
        broken.setattr(webhook_delivery, "cloud_event", breaks)
        assert deliver(any_database) == 1
    (message,) = messages(client, webhook)
    assert (message["status"], message["attempts"]) == ("pending", 1)
    make_due(any_database)
    receiver.answer, receiver.word = 500, b"w\0rd"
    assert deliver(any_database) == 1
    assert messages(client, webhook)[0]["error"] == "wrd"


def test_the_attempts_span_three_days() -> None:
    assert 3 * 86_400 < sum(WAITS) < 3.5 * 86_400


@pytest.mark.usefixtures("allowing")
def test_a_server_that_is_gone_is_told_nothing_more_until_it_is_enabled(
    any_database: Database, client: TestClient, receiver: Receiver
) -> None:
    webhook = make(client, receiver.url)
    receiver.answer = 410
    for _ in range(2):
        client.post(webhook["urls"]["test"])
    assert deliver(any_database) == 2
    assert {m["status"] for m in messages(client, webhook)} == {"dead"}
    url = webhook["urls"]["self"]
    assert client.get(url).json()["disabled_reason"] == "It answered 410 Gone."
    refused = client.post(f"{webhook['urls']['messages']}/{messages(client, webhook)[0]['id']}/replay")
    assert (refused.status_code, refused.json()["code"]) == (409, "webhook_disabled")
    assert client.post(f"{url}/enable").json()["disabled_reason"] is None
    receiver.answer = 200
    client.post(webhook["urls"]["test"])
    assert deliver(any_database) == 1
    assert messages(client, webhook)[0]["status"] == "delivered"


@pytest.mark.usefixtures("allowing")
def test_after_a_rotation_both_secrets_verify_for_a_day(
    any_database: Database, client: TestClient, receiver: Receiver
) -> None:
    webhook = make(client, receiver.url)
    rotated = client.post(f"{webhook['urls']['self']}/rotate-secret").json()
    assert rotated["secret"] != webhook["secret"]
    assert "secret" not in client.get(webhook["urls"]["self"]).json()
    client.post(webhook["urls"]["test"])
    deliver(any_database)
    headers, body = receiver.got[-1]
    assert verify(webhook["secret"], headers, body)
    assert verify(rotated["secret"], headers, body)
    with any_database.write() as session:
        endpoint = webhook_queries.get_endpoint(session, webhook["id"])
        assert endpoint is not None
        endpoint.previous_secret_until = 1.0
    client.post(webhook["urls"]["test"])
    deliver(any_database)
    headers, body = receiver.got[-1]
    assert not verify(webhook["secret"], headers, body)
    assert verify(rotated["secret"], headers, body)


@pytest.mark.usefixtures("allowing")
def test_of_senders_at_once_each_message_is_taken_by_one(
    any_database: Database, client: TestClient, receiver: Receiver
) -> None:
    webhook = make(client, receiver.url)
    for _ in range(12):
        client.post(webhook["urls"]["test"])

    def deliver_all() -> None:
        while deliver(any_database):
            pass

    threads = [threading.Thread(target=deliver_all) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(receiver.got) == 12
    assert len({headers["webhook-id"] for headers, _ in receiver.got}) == 12


@pytest.mark.usefixtures("allowing")
def test_a_message_whose_sender_died_is_sent_by_another(
    any_database: Database, client: TestClient, receiver: Receiver
) -> None:
    webhook = make(client, receiver.url)
    client.post(webhook["urls"]["test"])
    with any_database.write() as session:
        (due,) = webhook_queries.take_due(
            session, webhook_queries.Places(total=10, each=10, full=()), claim_seconds=60
        )
    assert deliver(any_database) == 0
    make_due(any_database)
    assert deliver(any_database) == 1
    with any_database.write() as session:
        webhook_queries.end_attempt(
            session, due, status="dead", retry_in_seconds=0, answer_status=None, error="late"
        )
    (message,) = messages(client, webhook)
    assert (message["status"], message["attempts"]) == ("delivered", 2)


def test_a_url_of_ours_is_refused_before_it_is_called(client: TestClient) -> None:
    for url in ("http://127.0.0.1/", "http://169.254.169.254/latest", "ftp://example.org/", "nonsense"):
        answer = client.post("/v1/webhooks", json={"url": url})
        assert answer.status_code == 422, url
        assert answer.json()["errors"][0]["pointer"] == "/url"


@pytest.mark.usefixtures("allowing")
def test_a_network_that_is_no_longer_allowed_is_not_called(
    database: Database, client: TestClient, receiver: Receiver, override_settings: Callable[..., Settings]
) -> None:
    webhook = make(client, receiver.url)
    client.post(webhook["urls"]["test"])
    override_settings(outbound_networks="")
    deliver(database)
    assert receiver.got == []
    assert "not on the open internet" in messages(client, webhook)[0]["error"]


@pytest.mark.usefixtures("allowing")
def test_only_the_tenant_of_a_job_is_told_of_it(
    any_database: Database, make_key: MakeKey, client: TestClient, receiver: Receiver
) -> None:
    keys = {name: bearer(make_key(Role.ADMINISTRATOR, tenant=name)) for name in ("acme", "umbrella")}
    for name, key in keys.items():
        made = client.post("/v1/webhooks", json={"url": f"{receiver.url}-{name}"}, headers=key)
        assert made.status_code == 201, made.text
    model = client.put(
        "/v1/models/content", params={"name": "m.zip"}, content=zipped(llama_files()), headers=keys["acme"]
    ).json()
    job = client.post("/v1/jobs", json={"model": model["id"], "recipe": "int8"}, headers=keys["acme"]).json()
    client.post(f"/v1/jobs/{job['id']}/cancel", headers=keys["acme"])
    # Making keys changed the settings, and so the process's database.
    assert deliver(get_database()) == 1
    assert json.loads(receiver.got[0][1])["type"] == "modelpress.job.cancelled"


@pytest.mark.usefixtures("allowing")
def test_an_endpoint_that_hangs_delays_no_other(
    any_database: Database, client: TestClient, receiver: Receiver
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        slow = make(client, f"http://127.0.0.1:{deaf.getsockname()[1]}/")
        for _ in range(40):
            client.post(slow["urls"]["test"])
        quick = make(client, receiver.url)
        client.post(quick["urls"]["test"])
        with Deliveries(any_database, get_settings()) as deliveries:
            assert deliveries.start_due() == 4 + 1
            wait_until(lambda: messages(client, quick)[0]["status"] == "delivered", seconds=5)
            assert deliveries.start_due() == 0
            client.post(quick["urls"]["test"])
            assert deliveries.start_due() == 1
            wait_until(lambda: messages(client, quick)[0]["status"] == "delivered", seconds=5)
            deaf.close()
    assert sum(m["attempts"] for m in messages(client, slow, limit="200")) == 4
