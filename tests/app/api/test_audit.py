"""Every change is in the audit log, with who, what, when and from where; and nothing else is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from fastapi.testclient import TestClient
from job_support import claim
from key_support import MakeKey, bearer
from model_files import llama_files, zipped
from sqlalchemy import text
from sqlalchemy.exc import ProgrammingError

from app.access import Role
from app.db import job_claims
from app.db.engine import Database

CHANGES_NOTHING = {"create_plan"}
Call = tuple[str, str, dict[str, Any]]


def entries(client: TestClient, headers: dict[str, str] | None = None) -> list[dict[str, Any]]:
    return list(client.get("/v1/audit", params={"limit": 200}, headers=headers).json()["items"])


def upload(client: TestClient, name: str, content: bytes = b"Hello there.") -> str:
    made = client.post("/v1/uploads", json={"name": name, "size": len(content)}).json()
    client.put(f"/v1/uploads/{made['id']}/parts/1", content=content)
    return str(made["id"])


def changing_calls(client: TestClient, database: Database) -> dict[str, Call]:
    """Operation -> a call of it that succeeds: method, path, arguments."""
    archive = zipped(llama_files())
    named = {"params": {"name": "m.zip"}, "content": archive}
    model = client.put("/v1/models/content", **named).json()["id"]  # type: ignore[arg-type]
    job = {"json": {"model": model, "recipe": "int8"}}
    jobs = [client.post("/v1/jobs", **job).json()["id"] for _ in range(3)]  # type: ignore[arg-type]
    client.post(f"/v1/jobs/{jobs[1]}/cancel")
    with database.write() as session:
        failed = job_claims.claim_job(session, jobs[2], owner="test", lease_seconds=60)
        assert failed is not None
        job_claims.fail(session, failed, {"code": "x", "detail": "x"})
    archive_upload, text_upload = upload(client, "m.zip", archive), upload(client, "a.txt")
    for done in (archive_upload, text_upload):
        client.post(f"/v1/uploads/{done}/complete")
    opened, unused = upload(client, "b.txt"), upload(client, "c.txt")
    dataset = client.put("/v1/datasets/content", params={"name": "a.txt"}, content=b"some words").json()["id"]
    other = client.put("/v1/models/content", **named).json()["id"]  # type: ignore[arg-type]
    key = client.post("/v1/keys", json={"name": "k", "role": "reader"}).json()["id"]
    hook = {"json": {"url": "https://93.184.215.14/"}}
    webhook, dropped = (client.post("/v1/webhooks", **hook).json()["urls"] for _ in range(2))  # type: ignore[arg-type]
    message = client.post(webhook["test"]).json()["id"]
    part = client.post("/v1/uploads", json={"name": "d.txt", "size": 3}).json()["id"]
    return {
        "create_upload": ("POST", "/v1/uploads", {"json": {"name": "a", "size": 1}}),
        "create_import": ("POST", "/v1/imports", {"json": {"url": "https://93.184.215.14/a?b"}}),
        "put_upload_part": ("PUT", f"/v1/uploads/{part}/parts/1", {"content": b"abc"}),
        "complete_upload": ("POST", f"/v1/uploads/{opened}/complete", {}),
        "delete_upload": ("DELETE", f"/v1/uploads/{unused}", {}),
        "create_model": ("POST", "/v1/models", {"json": {"upload": archive_upload}}),
        "put_model_content": ("PUT", "/v1/models/content", named),
        "delete_model": ("DELETE", f"/v1/models/{other}", {}),
        "create_dataset": ("POST", "/v1/datasets", {"json": {"upload": text_upload}}),
        "put_dataset_content": (
            "PUT",
            "/v1/datasets/content",
            {"params": {"name": "a.txt"}, "content": b"words"},
        ),
        "delete_dataset": ("DELETE", f"/v1/datasets/{dataset}", {}),
        "compress": (
            "POST",
            "/v1/compress",
            {"data": {"recipe": "int8"}, "files": {"file": ("m.zip", archive)}},
        ),
        "create_job": ("POST", "/v1/jobs", job),
        "cancel_job": ("POST", f"/v1/jobs/{jobs[0]}/cancel", {}),
        "delete_job": ("DELETE", f"/v1/jobs/{jobs[1]}", {}),
        "retry_job": ("POST", f"/v1/jobs/{jobs[2]}/retry", {}),
        "create_key": ("POST", "/v1/keys", {"json": {"name": "k", "role": "reader"}}),
        "revoke_key": ("DELETE", f"/v1/keys/{key}", {}),
        "create_webhook": ("POST", "/v1/webhooks", hook),
        "test_webhook": ("POST", webhook["test"], {}),
        "rotate_webhook_secret": ("POST", f"{webhook['self']}/rotate-secret", {}),
        "enable_webhook": ("POST", f"{webhook['self']}/enable", {}),
        "replay_webhook_message": ("POST", f"{webhook['messages']}/{message}/replay", {}),
        "delete_webhook": ("DELETE", dropped["self"], {}),
    }


def test_every_operation_that_changes_something_is_entered(
    any_database: Database, client: TestClient
) -> None:
    calls = changing_calls(client, any_database)
    document = client.get("/openapi.json").json()["paths"]
    changing = {o["operationId"] for p in document.values() for m, o in p.items() if m not in ("get", "head")}
    # That of parts wants a store in S3.
    assert calls.keys() == changing - CHANGES_NOTHING - {"create_part_urls"}, (
        "give this test a call of each operation"
    )
    for name, (method, path, arguments) in calls.items():
        known = {entry["id"] for entry in entries(client)}
        answer = client.request(method, path, headers={"Idempotency-Key": name}, **arguments)
        assert answer.status_code < 300, (name, answer.text)
        new = [entry for entry in entries(client) if entry["id"] not in known]
        assert new, name
        for entry in new:
            assert (entry["call"], entry["principal"]) == (f"{method} {path}", "anonymous")
            assert (entry["address"], entry["request_id"]) == ("testclient", answer.headers["x-request-id"])


def test_what_changes_nothing_is_not_entered(
    any_database: Database, client: TestClient, add_model: Callable[..., str]
) -> None:
    model = add_model()
    client.get("/v1/jobs")
    assert client.post("/v1/plans", json={"model": model, "recipe": "int8"}).status_code == 200
    for key in ("a", "a"):
        refused = client.post(
            "/v1/jobs", json={"model": model, "recipe": "none"}, headers={"Idempotency-Key": key}
        )
        assert refused.status_code == 422
    assert client.delete("/v1/models/mdl_0").status_code == 404
    assert entries(client) == []


def test_what_workers_do_is_no_ones_change(
    any_database: Database, client: TestClient, add_model: Callable[..., str]
) -> None:
    job = client.post("/v1/jobs", json={"model": add_model(), "recipe": "int8"}).json()
    before = entries(client)
    claim(any_database, job["id"])
    assert entries(client) == before


def test_administrators_see_their_own_tenants_log(
    make_key: MakeKey, any_database: Database, client: TestClient
) -> None:
    acme, umbrella = (bearer(make_key(tenant=name)) for name in ("acme", "umbrella"))
    submitter = make_key(Role.SUBMITTER, tenant="acme")
    client.post("/v1/uploads", json={"name": "a", "size": 1}, headers=bearer(submitter))
    (entry,) = entries(client, acme)
    assert entry["principal"] == f"key_{submitter.split('_')[1]}"
    assert entries(client, umbrella) == []


@pytest.mark.parametrize(
    "statement", ["UPDATE audit_entries SET principal = 'x'", "DELETE FROM audit_entries"]
)
def test_on_postgresql_a_tenant_cannot_rewrite_its_log(
    override_settings: Callable[..., Any], new_postgres_database: Callable[[], str], statement: str
) -> None:
    from app.db.engine import get_database

    override_settings(database_url=new_postgres_database())
    with (
        pytest.raises(ProgrammingError, match="permission denied"),
        get_database().for_tenant("default").write() as session,
    ):
        session.execute(text(statement))
