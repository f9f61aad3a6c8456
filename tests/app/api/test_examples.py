"""Every example of the OpenAPI document is a call that works as it stands, with real ids where it names made-up ones."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from example_ids import example_of, make_what_examples_name
from fastapi.testclient import TestClient

from app.db.engine import Database

# A person chooses the file, the hub serves it, a name has to be resolved: nothing to run without them.
NEED_MORE = {
    "create_part_urls",
    "put_model_content",
    "compress",
    "create_model",
    "create_import",
    "create_webhook",
}
# In the order in which a person meets them; reading calls come between making and deleting.
MAKING = ("create_upload", "put_upload_part", "complete_upload", "create_dataset", "put_dataset_content")
JOBS = (
    "create_key",
    "test_webhook",
    "replay_webhook_message",
    "rotate_webhook_secret",
    "enable_webhook",
    "create_plan",
    "create_job",
    "cancel_job",
    "retry_job",
)
DELETING = (
    "revoke_key",
    "delete_webhook",
    "delete_dataset",
    "delete_job",
    "delete_model",
    "create_upload",
    "delete_upload",
)
Call = tuple[str, str, dict[str, Any]]
Document = dict[str, Any]


@pytest.fixture
def document(client: TestClient) -> Document:
    return dict(client.get("/openapi.json").json())


@pytest.fixture
def ids(client: TestClient, database: Database) -> dict[str, str]:
    return make_what_examples_name(client, database)


def calls(document: Document) -> dict[str, Call]:
    """Operation id -> (method, path, operation)."""
    return {
        operation["operationId"]: (method, path, operation)
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    }


def examples_of(operation: dict[str, Any], document: Document) -> Iterator[dict[str, Any]]:
    """Arguments of the test client for each body the operation has an example of; of one without a body, once."""
    body = operation.get("requestBody")
    if body is None:
        yield {}
        return
    media_type, content = next(iter(body["content"].items()))
    headers = {"Content-Type": media_type}
    if "example" in content:
        yield {"content": content["example"], "headers": headers}
        return
    # A body that may be left out is one of several things, the last of them null.
    reference = content["schema"].get("anyOf", [content["schema"]])[0]["$ref"]
    schema = document["components"]["schemas"][reference.rsplit("/", 1)[1]]
    yield from ({"content": json.dumps(example), "headers": headers} for example in schema["examples"])


def run(
    client: TestClient, call: Call, arguments: dict[str, Any], ids: dict[str, str]
) -> tuple[int, dict[str, Any]]:
    method, path, operation = call
    query = {}
    for parameter in operation.get("parameters", ()):
        example = parameter.get("example") or next(iter(parameter["schema"].get("examples", ())), None)
        if parameter["in"] == "path":
            path = path.replace(f"{{{parameter['name']}}}", str(example))
        elif parameter["required"]:
            query[parameter["name"]] = example
    content = arguments.get("content")
    for made_up, real in ids.items():
        path = path.replace(made_up, real)
        content = content and content.replace(made_up, real)
    answer = client.request(method, path, params=query, **(arguments | {"content": content}))
    is_json = method != "head" and answer.headers.get("content-type") == "application/json"
    return answer.status_code, dict(answer.json()) if is_json and answer.content[:1] == b"{" else {}


def cancel_all(client: TestClient) -> None:
    for job in client.get("/v1/jobs", params={"status": "queued"}).json()["items"]:
        client.post(job["urls"]["cancel"])


def test_every_example_runs_as_it_is(client: TestClient, document: Document, ids: dict[str, str]) -> None:
    operations = calls(document)
    reading = sorted(name for name, (method, _, _) in operations.items() if method in ("get", "head"))
    ran: dict[str, list[int]] = {}
    for name in (*MAKING[:2], "get_upload", *MAKING[2:], *reading, *JOBS, *DELETING):
        if name == "get_upload" and name in ran:
            continue  # its upload has become a dataset
        if name == DELETING[0]:
            cancel_all(client)
        for arguments in examples_of(operations[name][2], document):
            status, answer = run(client, operations[name], arguments, ids)
            ran.setdefault(name, []).append(status)
            if status == 201 or name == "create_job":
                ids[example_of(answer["id"])] = answer["id"]
    assert {name: codes for name, codes in ran.items() if max(codes) >= 300} == {}
    assert set(operations) - set(ran) == NEED_MORE
