"""The documentation pages work with no internet, and the OpenAPI document is fit for people and generators."""

from __future__ import annotations

import re
import shutil
import subprocess
import warnings
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

_SNAKE = re.compile(r"^[a-z][a-z0-9]*(_[a-z0-9]+)*$")


def operations(client: TestClient) -> dict[str, dict[str, Any]]:
    paths = client.get("/openapi.json").json()["paths"]
    return {f"{m.upper()} {p}": o for p, path in paths.items() for m, o in path.items()}


def rendered(url: str, profile: Path) -> str:
    """The page's DOM as headless Chromium has it once its scripts have run."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        warnings.warn("NO CHROMIUM HERE: nothing has checked that the docs render in a browser", stacklevel=2)
        pytest.skip(
            "chromium is not installed (Debian: apt install chromium): the docs were NOT tried in a browser"
        )
    flags = [
        "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
        "disable-component-update", "disable-sync", "virtual-time-budget=15000", "dump-dom",
        "host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", f"user-data-dir={profile}",
    ]  # fmt: skip
    command = [chromium, *(f"--{flag}" for flag in flags), url]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.filterwarnings("default:NO CHROMIUM HERE")
def test_docs_show_the_operations_in_a_browser_without_internet(server_url: str, tmp_path: Path) -> None:
    page = rendered(f"{server_url}/docs", tmp_path / "profile")
    for operation in (
        "jobs-create_job",
        "jobs-list_job_events",
        "uploads-create_upload",
        "catalogue-list_recipes",
    ):
        assert f'id="operations-{operation}"' in page
    assert "A round trip in five calls" in page


@pytest.mark.filterwarnings("default:NO CHROMIUM HERE")
def test_redoc_shows_the_operations_in_a_browser_without_internet(server_url: str, tmp_path: Path) -> None:
    page = rendered(f"{server_url}/redoc", tmp_path / "profile")
    assert 'id="tag/jobs/operation/create_job"' in page


def test_the_pages_name_no_other_server(client: TestClient) -> None:
    for path in ("/docs", "/redoc", "/static/docs.js"):
        answer = client.get(path)
        assert answer.status_code == 200
        assert "http" not in answer.text
    assert "default-src 'self'" in client.get("/docs").headers["content-security-policy"]


def test_every_asset_of_the_pages_is_served(client: TestClient) -> None:
    for page in ("/docs", "/redoc"):
        for asset in re.findall(r'(?:src|href)="(static/[^"]+)"', client.get(page).text):
            assert client.get(f"/{asset}").status_code == 200, asset


def test_the_root_leads_to_the_docs(client: TestClient) -> None:
    assert client.get("/", follow_redirects=False).headers["location"] == "docs"


def test_operation_ids_are_unique_and_snake_case(client: TestClient) -> None:
    ids = [operation["operationId"] for operation in operations(client).values()]
    assert len(set(ids)) == len(ids)
    assert [i for i in ids if not _SNAKE.match(i)] == []


def test_every_operation_has_one_described_tag_a_summary_and_a_description(client: TestClient) -> None:
    described = {tag["name"] for tag in client.get("/openapi.json").json()["tags"]}
    for name, operation in operations(client).items():
        assert len(operation["tags"]) == 1, name
        assert operation["tags"][0] in described, name
        assert operation["summary"], name
        assert len(operation["description"]) > 20, name


def test_every_error_response_is_documented_as_a_problem(client: TestClient) -> None:
    common = client.get("/openapi.json").json()["components"]["responses"]
    for name, operation in operations(client).items():
        for status, told in operation["responses"].items():
            if int(status) >= 400 and name != "GET /v1/health/ready":
                response = common[told["$ref"].rsplit("/", 1)[1]] if "$ref" in told else told
                schema = response["content"]["application/problem+json"]["schema"]
                assert schema == {"$ref": "#/components/schemas/Problem"}, (name, status)


def test_what_is_common_to_operations_is_documented_where_it_can_occur(client: TestClient) -> None:
    for name, operation in operations(client).items():
        answers = set(operation["responses"])
        body = operation.get("requestBody", {}).get("content", {})
        parsed = "application/json" in body or "multipart/form-data" in body
        assert ("400" in answers) == parsed, name
        assert ("413" in answers) == bool(body), name
        assert ("422" in answers) == ("/v1/" in name), name
        assert ({"401", "403", "429", "503"} <= answers) == ("security" in operation), name
        assert "404" in answers or "{" not in name, name
        assert "Location" in operation["responses"].get("201", {}).get("headers", ["Location"]), name


def test_an_example_of_an_error_holds_nothing_of_who_asked_for_the_document(client: TestClient) -> None:
    answer = client.get("/openapi.json", headers={"X-Request-Id": "the-first-to-ask"})
    assert "the-first-to-ask" not in answer.text


def test_a_body_that_cannot_be_read_is_answered_as_documented(client: TestClient) -> None:
    tried = 0
    for name, operation in operations(client).items():
        if "application/json" in operation.get("requestBody", {}).get("content", {}):
            method, path = name.replace("{job_id}", "job_1").split(" ")
            answer = client.request(method, path, content=b"{", headers={"Content-Type": "application/json"})
            assert answer.status_code == 400, name
            assert str(answer.status_code) in operation["responses"], name
            tried += 1
    assert tried >= 8


def test_parameters_that_may_be_left_out_are_not_therefore_null(client: TestClient) -> None:
    for name, operation in operations(client).items():
        for parameter in operation.get("parameters", ()):
            assert "null" not in str(parameter["schema"]), (name, parameter["name"])


def test_every_reference_in_the_document_leads_somewhere(client: TestClient) -> None:
    text = client.get("/openapi.json").text
    document = client.get("/openapi.json").json()
    names = set(re.findall(r'"#/components/schemas/([^"]+)"', text))
    assert names <= set(document["components"]["schemas"])
    assert not [name for name in document["components"]["schemas"] if name.endswith("View") or "_" in name]


def test_posts_that_make_something_take_an_idempotency_key(client: TestClient) -> None:
    for name, operation in operations(client).items():
        # Plans change nothing; kept answers of the others would hold secrets.
        if name.startswith("POST") and not re.search("plans|keys|webhooks|part-urls", name):
            assert "Idempotency-Key" in {p["name"] for p in operation.get("parameters", ())}, name


def test_required_parameters_of_a_query_are_filled_in(client: TestClient) -> None:
    for name, operation in operations(client).items():
        for parameter in operation.get("parameters", ()):
            if parameter["in"] == "query" and parameter["required"]:
                assert parameter["example"], (name, parameter["name"])
