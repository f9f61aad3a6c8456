"""What is one tenant's does not exist for another: in paths, in bodies, in lists, in caches and in the store."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from job_support import claim, finish
from key_support import MakeKey, bearer, operations
from model_files import llama_files, zipped

from app.access import Role
from app.db.engine import Database

JOB = {"recipe": "int8"}
STEP = {"technique": "quantize.weights"}
FREE_PARAMETERS = {"number", "path"}
"""Parts of paths that name nothing by themselves."""
BODIES_WITH_IDS = {"create_model", "create_dataset", "create_job", "create_plan"}
"""Operations whose bodies name things; each has its test here."""


@dataclass(frozen=True)
class Tenant:
    """A tenant's administrator."""

    client: TestClient
    headers: dict[str, str]

    def call(self, method: str, url: str, **arguments: Any) -> httpx.Response:
        """Make a call with the tenant's key."""
        headers = self.headers | arguments.pop("headers", {})
        return self.client.request(method, url, headers=headers, **arguments)

    def model(self, seed: int = 0) -> str:
        """A model of its own; the same bytes for the same seed."""
        content = zipped(llama_files(rope_theta=10_000 + seed))
        made = self.call("PUT", "/v1/models/content", params={"name": "m.zip"}, content=content)
        return str(made.json()["id"])

    def dataset(self) -> str:
        """A dataset of its own."""
        made = self.call("PUT", "/v1/datasets/content", params={"name": "a.txt"}, content=b"words " * 50)
        return str(made.json()["id"])


@pytest.fixture
def make_tenant(make_key: MakeKey, client: TestClient) -> Callable[[str], Tenant]:
    """Call with a name for a tenant."""
    return lambda name: Tenant(client, bearer(make_key(Role.ADMINISTRATOR, tenant=name)))


def everything_of(owner: Tenant, database: Database) -> dict[str, str]:
    """One of each kind: name of the path's parameter -> id."""
    upload = owner.call("POST", "/v1/uploads", json={"name": "a.txt", "size": 12}).json()["id"]
    model, dataset = owner.model(), owner.dataset()
    job = owner.call("POST", "/v1/jobs", json={"model": model, **JOB}).json()["id"]
    files = {"model.safetensors": ("model", b"w"), "report.json": ("report", b"{}")}
    (artifact, _) = finish(database, claim(database, job), files)
    key = owner.call("POST", "/v1/keys", json={"name": "k", "role": "reader"}).json()["id"]
    webhook = owner.call("POST", "/v1/webhooks", json={"url": "https://93.184.215.14/"}).json()
    message = owner.call("POST", webhook["urls"]["test"]).json()["id"]
    return {
        "upload_id": upload, "model_id": model, "dataset_id": dataset, "job_id": job, "artifact_id": artifact,
        "key_id": key, "webhook_id": webhook["id"], "message_id": message,
    }  # fmt: skip


def never_made(real: str) -> str:
    return real[:4] + "0" * 26


def words(answer: httpx.Response, real: str) -> tuple[int, str]:
    """Status and problem of an answer, without what differs from call to call."""
    body = {k: v for k, v in answer.json().items() if k != "request_id"} if answer.content else {}
    return answer.status_code, str(body).replace(real, "ID").replace(never_made(real), "ID")


def test_every_route_with_an_id_answers_404_to_another_tenant(
    make_key: MakeKey,
    any_database: Database,
    client: TestClient,
    make_tenant: Callable[[str], Tenant],
) -> None:
    owner, stranger = make_tenant("acme"), make_tenant("umbrella")
    ids = everything_of(owner, any_database)
    before = {n: owner.call(m, p).text for n, m, p in operations(client, ids) if m == "GET"}
    for path, methods in client.get("/openapi.json").json()["paths"].items():
        for operation in methods.values():
            named = {p["name"] for p in operation.get("parameters", ()) if p["in"] == "path"}
            assert named <= ids.keys() | FREE_PARAMETERS, f"{path}: give this test an id of the new kind"
    tried = 0
    for name, method, path in operations(client, ids):
        real = next((real for real in ids.values() if real in path), None)
        if real is None:
            continue
        tried += 1
        body: dict[str, Any] = {"content": b"Hello there."} if method == "PUT" else {}
        if name == "create_part_urls":
            body = {"json": {"parts": [{"number": 1, "sha256": "0" * 64}]}}
        foreign = stranger.call(method, path, **body)
        absent = stranger.call(method, path.replace(real, never_made(real)), **body)
        assert foreign.status_code == 404, name
        assert words(foreign, real) == words(absent, real), name
        for accept in ("text/event-stream", "text/html"):
            assert stranger.call(method, path, headers={"Accept": accept}, **body).status_code == 404, name
    assert tried > 20
    after = {n: owner.call(m, p).text for n, m, p in operations(client, ids) if m == "GET"}
    volatile = {"get_metrics", "get_readiness", "list_keys"}
    assert {n for n in before if before[n] != after[n]} <= volatile
    mine = [
        n
        for n, m, p in operations(client, ids)
        if m in ("GET", "HEAD") and owner.call(m, p).status_code >= 400
    ]
    assert mine == [], "the owner can see what the stranger cannot"


def test_nothing_that_lists_or_counts_tells_of_another_tenant(
    make_key: MakeKey, any_database: Database, client: TestClient, make_tenant: Callable[[str], Tenant]
) -> None:
    owner, stranger = make_tenant("acme"), make_tenant("umbrella")
    empty = stranger.call("GET", "/metrics").text
    ids = everything_of(owner, any_database)
    digests = {f["sha256"] for f in owner.call("GET", f"/v1/models/{ids['model_id']}").json()["files"]}
    for name, method, path in operations(client):
        if method == "GET" and "01k0b6x2v9m4c8d7e5f3g1h0j2" not in path:
            text = stranger.call("GET", path).text
            assert not [word for word in (*ids.values(), *digests, "acme") if word in text], name
    counted = [line for line in empty.splitlines() if line.startswith("modelpress_")]
    now = stranger.call("GET", "/metrics").text.splitlines()
    assert [line for line in now if line.startswith("modelpress_")] == counted
    for query in ({"model": ids["model_id"]}, {"after": never_made(ids["job_id"])}, {"status": "succeeded"}):
        assert stranger.call("GET", "/v1/jobs", params=query).json()["items"] == []


def _bodies(ids: dict[str, str], own_model: str) -> dict[str, list[tuple[str, dict[str, Any], str]]]:
    """Operation -> (path, body, id in it), for each place where a body can name a thing."""
    upload, model, dataset = ids["upload_id"], ids["model_id"], ids["dataset_id"]

    def job(**spec: Any) -> dict[str, Any]:
        return {"model": own_model, "spec": {"steps": [STEP], **spec}}

    student = {"technique": "distill.logits", "student": {"source": "model", "model": model}}
    jobs = [
        ({"model": model, **JOB}, model),
        (job(steps=[student]), model),
        (job(calibration={"dataset": dataset}), dataset),
        (job(training={"dataset": dataset}), dataset),
        (job(evaluation={"text": {"dataset": dataset}}), dataset),
    ]
    return {
        "create_model": [
            ("/v1/models", {"upload": upload}, upload),
            ("/v1/models", {"files": [{"path": "config.json", "upload": upload}]}, upload),
        ],
        "create_dataset": [("/v1/datasets", {"upload": upload}, upload)],
        "create_job": [("/v1/jobs", body, named) for body, named in jobs],
        "create_plan": [("/v1/plans", body, named) for body, named in jobs],
    }


def test_an_id_in_a_body_is_as_unknown_as_one_that_was_never_made(
    make_key: MakeKey, any_database: Database, client: TestClient, make_tenant: Callable[[str], Tenant]
) -> None:
    owner, stranger = make_tenant("acme"), make_tenant("umbrella")
    ids = everything_of(owner, any_database)
    for name, calls in _bodies(ids, stranger.model()).items():
        for path, body, real in calls:
            foreign = stranger.call("POST", path, json=body)
            invented = stranger.call("POST", path, json=_replaced(body, real, never_made(real)))
            assert foreign.status_code in (404, 422), (name, body, foreign.text)
            assert "There is no" in foreign.text, (name, body, foreign.text)
            assert words(foreign, real) == words(invented, real), (name, body)
    assert owner.call("GET", f"/v1/uploads/{ids['upload_id']}").status_code == 200, "nothing used it up"


def test_every_body_that_can_name_a_thing_is_tried_above(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    found = {
        operation["operationId"]
        for methods in document["paths"].values()
        for operation in methods.values()
        if _has_id(operation.get("requestBody", {}), document["components"]["schemas"], set())
    }
    assert (
        found
        == BODIES_WITH_IDS
        == _bodies(dict.fromkeys(("upload_id", "model_id", "dataset_id"), "x"), "y").keys()
    )


def _has_id(value: Any, schemas: dict[str, Any], seen: set[str]) -> bool:
    if isinstance(value, list):
        return any(_has_id(item, schemas, seen) for item in value)
    if not isinstance(value, dict):
        return False
    if str(value.get("pattern", "")).startswith(("^upl_", "^mdl_", "^dst_", "^job_", "^art_", "^key_")):
        return True
    reference = value.get("$ref", "").rsplit("/", 1)[-1]
    if reference and reference not in seen:
        seen.add(reference)
        return _has_id(schemas[reference], schemas, seen)
    return any(_has_id(item, schemas, seen) for item in value.values())


def _replaced(value: Any, old: str, new: str) -> Any:
    if isinstance(value, dict):
        return {key: _replaced(item, old, new) for key, item in value.items()}
    if isinstance(value, list):
        return [_replaced(item, old, new) for item in value]
    return new if value == old else value


def test_a_kept_answer_is_given_to_its_own_tenant_alone(
    make_key: MakeKey, any_database: Database, client: TestClient, make_tenant: Callable[[str], Tenant]
) -> None:
    owner, stranger = make_tenant("acme"), make_tenant("umbrella")
    call = {"json": {"name": "a.txt", "size": 12}, "headers": {"Idempotency-Key": "k"}}
    answers = [tenant.call("POST", "/v1/uploads", **call) for tenant in (owner, stranger, owner, stranger)]
    assert [a.headers.get("idempotency-replayed") for a in answers] == [None, None, "true", "true"]
    first, second, third, fourth = (answer.json()["id"] for answer in answers)
    assert (third, fourth) == (first, second)
    assert first != second


def test_bytes_two_tenants_share_stay_until_the_last_of_them_deletes_its_own(
    make_key: MakeKey, any_database: Database, client: TestClient, make_tenant: Callable[[str], Tenant]
) -> None:
    from app.storage import get_store

    first, second = make_tenant("acme"), make_tenant("umbrella")
    model, same = first.model(), second.model()
    blobs = {blob.sha256 for blob in get_store().iter_blobs()}
    assert len(blobs) == len(first.call("GET", f"/v1/models/{model}").json()["files"])
    assert first.call("DELETE", f"/v1/models/{model}").status_code == 204
    assert {blob.sha256 for blob in get_store().iter_blobs()} == blobs
    assert second.call("GET", f"/v1/models/{same}/files/config.json").status_code == 200
    assert second.call("DELETE", f"/v1/models/{same}").status_code == 204
    assert not list(get_store().iter_blobs())


def test_keys_are_made_for_ones_own_tenant(
    make_key: MakeKey, any_database: Database, client: TestClient, make_tenant: Callable[[str], Tenant]
) -> None:
    owner, stranger = make_tenant("acme"), make_tenant("umbrella")
    made = owner.call("POST", "/v1/keys", json={"name": "k", "role": "submitter"}).json()
    model = Tenant(client, bearer(made["key"])).model()
    assert owner.call("GET", f"/v1/models/{model}").status_code == 200
    assert stranger.call("GET", f"/v1/models/{model}").status_code == 404
