"""Who may call what: API keys, their roles, and their end."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import Callable
from typing import Any

import pytest
from fastapi.testclient import TestClient
from job_support import claim, finish
from key_support import SECRET, MakeKey, bearer, operations
from sqlalchemy import event, update

from app.access import Role
from app.db.engine import Database, get_database
from app.db.tables import ApiKey, Base
from app.services import keys
from app.settings import Settings

OPEN = {"get_liveness", "get_readiness"}
ADMINISTRATORS = {"create_key", "list_keys", "get_key", "revoke_key", "list_audit_entries"}
WRITING_THAT_READERS_MAY = {"create_plan"}


def key_id(token: str) -> str:
    return f"key_{token.split('_')[1]}"


def test_without_a_key_nothing_answers_but_health_and_docs(guarded: None, client: TestClient) -> None:
    for name, method, path in operations(client):
        answer = client.request(method, path)
        assert (answer.status_code == 401) == (name not in OPEN), name
        if name not in OPEN:
            assert answer.headers["www-authenticate"] == 'Bearer realm="modelpress"'
            assert answer.headers["content-type"] == "application/problem+json"
    assert client.get("/v1/nowhere").status_code == 401
    for page in ("/", "/docs", "/redoc", "/openapi.json", "/static/docs.js"):
        assert client.get(page).status_code == 200, page


def test_a_role_may_do_what_is_its_own_and_what_those_below_it_may(
    make_key: MakeKey, client: TestClient
) -> None:
    def least_role(name: str, method: str) -> Role:
        if name in ADMINISTRATORS:
            return Role.ADMINISTRATOR
        reading = method in ("GET", "HEAD") or name in WRITING_THAT_READERS_MAY
        return Role.READER if reading else Role.SUBMITTER

    ranks = list(Role)
    for rank, role in enumerate(ranks):
        headers = bearer(make_key(role))
        for name, method, path in operations(client):
            answer = client.request(method, path, headers=headers)
            refused = ranks.index(least_role(name, method)) > rank and name not in OPEN
            assert (answer.status_code == 403) == refused, (role, name)
            if refused:
                assert 'error="insufficient_scope"' in answer.headers["www-authenticate"]


def test_a_newline_after_a_path_opens_nothing(make_key: MakeKey, client: TestClient) -> None:
    headers = bearer(make_key(Role.SUBMITTER))
    for name, method, path in operations(client):
        if name in ADMINISTRATORS:
            assert client.request(method, f"{path}%0A", headers=headers).status_code == 403, name


def test_the_document_says_which_operations_need_a_key(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    for methods in document["paths"].values():
        for operation in methods.values():
            is_open = operation["operationId"] in OPEN
            assert operation.get("security") == (None if is_open else [{"key": []}])
            assert {"401", "403"} <= operation["responses"].keys() or is_open


def test_an_administrator_makes_a_key_that_is_shown_once(
    make_key: MakeKey, any_database: Database, client: TestClient
) -> None:
    headers = bearer(make_key())
    answer = client.post("/v1/keys", json={"name": "ci", "role": "reader"}, headers=headers)
    assert (answer.status_code, answer.headers["cache-control"]) == (201, "no-store")
    made = answer.json()
    assert client.get("/v1/jobs", headers=bearer(made["key"])).status_code == 200
    later = client.get(answer.headers["location"], headers=headers)
    assert later.json()["last_used_at"]
    secret = made["key"].rsplit("_", 1)[1]
    assert secret not in later.text + client.get("/v1/keys", headers=headers).text


def test_the_database_holds_an_hmac_and_no_key(make_key: MakeKey, any_database: Database) -> None:
    token = make_key()
    with any_database.read() as session:
        rows = [str(row) for table in Base.metadata.sorted_tables for row in session.execute(table.select())]
        digest = session.get_one(ApiKey, key_id(token)).digest
    assert not [row for row in rows if token.rsplit("_", 1)[1] in row]
    assert digest == hmac.new(SECRET.encode(), token.encode(), hashlib.sha256).hexdigest()


def test_a_revoked_key_ends_with_the_next_call(
    make_key: MakeKey, any_database: Database, client: TestClient
) -> None:
    administrator, token = make_key(), make_key(Role.READER)
    assert client.get("/v1/jobs", headers=bearer(token)).status_code == 200
    for _ in range(2):
        gone = client.delete(f"/v1/keys/{key_id(token)}", headers=bearer(administrator))
        assert gone.status_code == 204
    answer = client.get("/v1/jobs", headers=bearer(token))
    assert (answer.status_code, answer.json()["code"]) == (401, "key_revoked")
    assert 'error="invalid_token"' in answer.headers["www-authenticate"]


def test_a_key_ends_when_its_time_is_over(
    make_key: MakeKey, any_database: Database, client: TestClient
) -> None:
    token = make_key(days=1)
    assert client.get("/v1/jobs", headers=bearer(token)).status_code == 200
    with any_database.write() as session:
        session.execute(update(ApiKey).values(expires_at=ApiKey.expires_at - 86_401))
    assert client.get("/v1/jobs", headers=bearer(token)).json()["code"] == "key_expired"


def test_what_is_no_key_of_ours_is_told_so_in_the_same_words(make_key: MakeKey, client: TestClient) -> None:
    token = make_key()
    other_secret = token[:-1] + ("0" if token[-1] != "0" else "1")
    other_id = token.replace(token.split("_")[1], "0" * 26)
    answers = [client.get("/v1/jobs", headers=bearer(t)) for t in (other_secret, other_id, "mp_", "unknown")]
    assert {answer.status_code for answer in answers} == {401}
    assert len({(a.json()["code"], a.json()["detail"]) for a in answers}) == 1
    basic = client.get("/v1/jobs", headers={"Authorization": f"Basic {token}"})
    assert basic.status_code == 401


def test_a_key_is_worth_nothing_to_a_service_with_another_secret(
    make_key: MakeKey, override_settings: Callable[..., Settings], request: pytest.FixtureRequest
) -> None:
    token = make_key()
    override_settings(secret_key="t" * 32)
    client: TestClient = request.getfixturevalue("client")
    assert client.get("/v1/jobs", headers=bearer(token)).status_code == 401


def test_last_use_costs_one_write_a_minute(
    make_key: MakeKey, any_database: Database, client: TestClient
) -> None:
    token = make_key()
    written: list[str] = []

    def note(_c: object, _cursor: object, statement: str, *_: object) -> None:
        written.extend([statement] if statement.startswith("UPDATE api_keys") else [])

    event.listen(get_database().engine, "before_cursor_execute", note)
    for _ in range(3):
        assert client.get("/v1/jobs", headers=bearer(token)).status_code == 200
    assert len(written) == 1
    with any_database.write() as session:
        session.execute(update(ApiKey).values(last_used_at=ApiKey.last_used_at - 61))
    client.get("/v1/jobs", headers=bearer(token))
    assert len(written) == 3, "the second is the test's own"


def test_streams_and_downloads_come_with_a_key(
    make_key: MakeKey, client: TestClient, add_model: Callable[..., str]
) -> None:
    headers = bearer(make_key(Role.SUBMITTER))
    job = client.post("/v1/jobs", json={"model": add_model(), "recipe": "int8"}, headers=headers).json()
    (artifact,) = finish(get_database(), claim(get_database(), job["id"]), {"a.bin": ("model", b"abc")})
    stream = headers | {"Accept": "text/event-stream"}
    assert '"succeeded"' in client.get(job["urls"]["events"], headers=stream).text
    assert client.get(f"/v1/artifacts/{artifact}/content", headers=headers).content == b"abc"


def test_of_a_stranger_no_byte_of_the_body_is_read(guarded: None, client: TestClient) -> None:
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        raise AssertionError("the body was asked for")

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {
        "type": "http", "method": "PUT", "path": "/v1/models/content", "root_path": "", "query_string": b"name=a",
        "headers": [(b"content-length", b"1000"), (b"idempotency-key", b"k")], "client": ("127.0.0.1", 1),
    }  # fmt: skip
    asyncio.run(client.app(scope, receive, send))  # type: ignore[arg-type, func-returns-value]
    assert sent[0]["status"] == 401
    assert (b"connection", b"close") in sent[0]["headers"]


def test_an_answer_kept_for_a_submitter_is_not_replayed_to_a_reader(
    make_key: MakeKey, client: TestClient, add_model: Callable[..., str]
) -> None:
    body = {"model": add_model(), "recipe": "int8"}
    again = {"Idempotency-Key": "k"}
    made = client.post("/v1/jobs", json=body, headers=bearer(make_key(Role.SUBMITTER)) | again)
    assert made.status_code == 202
    assert (
        client.post("/v1/jobs", json=body, headers=bearer(make_key(Role.READER)) | again).status_code == 403
    )


def test_a_development_service_needs_no_key_but_checks_one_that_comes(client: TestClient) -> None:
    assert client.get("/v1/jobs").status_code == 200
    made = client.post("/v1/keys", json={"name": "me", "role": "reader"}).json()
    assert made["created_by"] == "anonymous"
    assert client.post("/v1/uploads", json={}, headers=bearer(made["key"])).status_code == 403
    assert client.get("/v1/jobs", headers=bearer("mp_none")).status_code == 401


def test_a_development_service_answers_no_other_machine(client: TestClient) -> None:
    for host, status in {"192.0.2.7": 401, "2001:db8::1": 401, "127.0.0.1": 200, "::1": 200}.items():
        elsewhere = TestClient(client.app, client=(host, 50000))
        assert elsewhere.get("/v1/jobs").status_code == status, host


def test_a_development_service_answers_no_page_of_another_site(
    override_settings: Callable[..., Settings], request: pytest.FixtureRequest
) -> None:
    override_settings(public_url="https://models.example.org/press")
    client: TestClient = request.getfixturevalue("client")
    ours = ("localhost:8000", "127.0.0.1", "[::1]:8000", "models.example.org", "me.localhost")
    for host in ours:
        assert client.get("/v1/jobs", headers={"host": host}).status_code == 200, host
    for host in ("rebound.example.com:8000", "127.0.0.1.nip.io", "models.example.org.evil.net"):
        assert client.get("/v1/jobs", headers={"host": host}).status_code == 401, host
        assert client.get("/v1/health/live", headers={"host": host}).status_code == 200
    origins = {
        "http://evil.example": 401,
        "null": 401,
        "http://testserver": 200,
        "https://models.example.org": 200,
    }
    for origin, status in origins.items():
        answer = client.post("/v1/plans", json={}, headers={"origin": origin})
        assert (answer.status_code == 401) == (status == 401), origin


def test_without_a_setting_the_secret_is_a_file_for_its_owner_alone(settings: Settings) -> None:
    secret = keys.server_secret(settings)
    file = settings.data_dir / "secret.key"
    assert file.read_bytes() == secret
    assert (len(secret), file.stat().st_mode & 0o777) == (52, 0o600)
    keys.server_secret.cache_clear()
    assert keys.server_secret(settings) == secret
    assert [path.name for path in settings.data_dir.glob("*secret*")] == ["secret.key"]
