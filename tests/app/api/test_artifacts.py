"""Artifacts: whole, in ranges, not at all when the client has them, and all in one tar."""

from __future__ import annotations

import base64
import hashlib
import io
import tarfile
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from job_support import claim, finish

from app.api.streams import parse_range
from app.db.engine import Database
from app.errors import RangeNotSatisfiable

CONTENT = bytes(range(256)) * 20
SHA256 = hashlib.sha256(CONTENT).hexdigest()
LONG = "shards/" + "x" * 120 + '/weights with "quotes" and ü.bin'
FILES = {
    "model.safetensors": ("model", CONTENT),
    LONG: ("model", b"12345"),
    "empty.txt": ("model", b""),
    "report.json": ("report", b"{}"),
}


@pytest.fixture
def job(database: Database, client: TestClient, add_model: Callable[..., str]) -> dict[str, Any]:
    job = client.post("/v1/jobs", json={"model": add_model(), "recipe": "int8"}).json()
    finish(database, claim(database, job["id"]), FILES)
    return dict(client.get(job["urls"]["self"]).json())


@pytest.fixture
def content(job: dict[str, Any]) -> str:
    return next(a["urls"]["content"] for a in job["artifacts"] if a["path"] == "model.safetensors")


def test_an_artifact_says_what_it_is(client: TestClient, job: dict[str, Any]) -> None:
    shown = job["artifacts"][0]
    assert client.get(shown["urls"]["self"]).json() == shown
    assert client.get("/v1/artifacts/art_0").json()["code"] == "not_found"


def test_the_whole_file_comes_with_its_digest(client: TestClient, content: str) -> None:
    answer = client.get(content)
    assert (answer.status_code, answer.content) == (200, CONTENT)
    assert answer.headers["etag"] == f'"{SHA256}"'
    digest = base64.b64encode(hashlib.sha256(CONTENT).digest()).decode()
    assert answer.headers["repr-digest"] == f"sha-256=:{digest}:"
    assert answer.headers["accept-ranges"] == "bytes"
    assert answer.headers["content-length"] == str(len(CONTENT))
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_head_gives_the_headers_alone(client: TestClient, content: str) -> None:
    answer = client.head(content, headers={"Range": "bytes=0-1"})
    assert (answer.status_code, answer.content) == (200, b"")
    assert answer.headers["content-length"] == str(len(CONTENT))
    assert answer.headers["etag"] == f'"{SHA256}"'


@pytest.mark.parametrize(
    ("wanted", "first", "last"),
    [
        ("bytes=0-99", 0, 99),
        ("bytes=5000-", 5000, 5119),
        ("bytes=-20", 5100, 5119),
        ("bytes=5100-9999", 5100, 5119),
    ],
)
def test_a_range_is_served(client: TestClient, content: str, wanted: str, first: int, last: int) -> None:
    answer = client.get(content, headers={"Range": wanted})
    assert (answer.status_code, answer.content) == (206, CONTENT[first : last + 1])
    assert answer.headers["content-range"] == f"bytes {first}-{last}/5120"


@pytest.mark.parametrize(
    "wanted", ["bytes=0-1,5-6", "lines=1-2", "bytes=x-2", "bytes=9-3", "bytes=-", "nonsense"]
)
def test_what_is_no_single_range_gives_the_whole(client: TestClient, content: str, wanted: str) -> None:
    answer = client.get(content, headers={"Range": wanted})
    assert (answer.status_code, len(answer.content)) == (200, 5120)


def test_a_range_behind_the_end_is_a_problem(client: TestClient, content: str) -> None:
    answer = client.get(content, headers={"Range": "bytes=5120-"})
    assert (answer.status_code, answer.headers["content-range"]) == (416, "bytes */5120")
    assert answer.json()["code"] == "range_not_satisfiable"


def test_no_range_of_an_empty_file_exists() -> None:
    with pytest.raises(RangeNotSatisfiable):
        parse_range("bytes=0-0", 0)
    assert parse_range(None, 0) is None


def test_a_range_is_only_resumed_on_the_same_file(client: TestClient, content: str) -> None:
    ranged = {"Range": "bytes=10-19"}
    assert client.get(content, headers=ranged | {"If-Range": f'"{SHA256}"'}).status_code == 206
    assert client.get(content, headers=ranged | {"If-Range": '"other"'}).content == CONTENT
    behind = {"Range": "bytes=9999999-", "If-Range": '"other"'}
    assert client.get(content, headers=behind).content == CONTENT


@pytest.mark.parametrize("tags", [f'"{SHA256}"', f'"x", W/"{SHA256}"', "*"])
def test_who_has_the_file_is_told_so(client: TestClient, content: str, tags: str) -> None:
    answer = client.get(content, headers={"If-None-Match": tags})
    assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", f'"{SHA256}"')


def test_names_are_safe_in_headers(client: TestClient, job: dict[str, Any]) -> None:
    url = next(a["urls"]["content"] for a in job["artifacts"] if a["path"] == LONG)
    disposition = client.get(url).headers["content-disposition"]
    assert 'filename="weights with _quotes_ and _.bin"' in disposition
    assert "filename*=UTF-8''weights%20with%20%22quotes%22%20and%20%C3%BC.bin" in disposition


def test_the_tar_holds_every_file_and_has_the_length_it_says(client: TestClient, job: dict[str, Any]) -> None:
    answer = client.get(job["urls"]["download"])
    assert int(answer.headers["content-length"]) == len(answer.content)
    with tarfile.open(fileobj=io.BytesIO(answer.content), mode="r:") as tar:
        found = {m.name: tar.extractfile(m).read() for m in tar.getmembers()}  # type: ignore[union-attr]
    assert found == {f"{job['id']}/{path}": content for path, (_, content) in FILES.items()}


def test_a_download_that_breaks_off_goes_on_over_a_real_server(
    server_url: str, database: Database, add_model: Callable[..., str]
) -> None:
    with httpx.Client(base_url=server_url) as http:
        job = http.post("/v1/jobs", json={"model": add_model(), "recipe": "int8"}).json()
        finish(database, claim(database, job["id"]), {"big.bin": ("model", CONTENT * 1000)})
        url = http.get(job["urls"]["result"]).json()["artifacts"][0]["urls"]["content"]
        with http.stream("GET", url) as answer:
            begun = next(answer.iter_bytes(100_000))
        rest = http.get(url, headers={"Range": f"bytes={len(begun)}-", "If-Range": answer.headers["etag"]})
        assert (rest.status_code, begun + rest.content) == (206, CONTENT * 1000)
        assert len(http.get(job["urls"]["download"]).content) > len(CONTENT) * 1000
