"""Downloads from S3: by a presigned URL that needs nothing else, or through us, for clients that cannot reach it."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest
from cutting_proxy import cutting_proxy
from fastapi.testclient import TestClient
from job_support import claim, finish
from s3_server import S3Server

from app.client import Client
from app.db.engine import get_database
from app.settings import Settings

CONTENT = bytes(range(256)) * 20
SHA256 = hashlib.sha256(CONTENT).hexdigest()
NAME = 'shards/weights with "quotes" and ü.bin'
FILES = {
    NAME: ("model", CONTENT),
    "empty.txt": ("model", b""),
    "report.json": ("report", b"{}"),
    "report.html": ("report_html", b"<p>a page</p>"),
}
UseS3 = Callable[..., Settings]


@contextmanager
def recording_server(content: bytes) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """The URL of a server that answers all with the content, and the headers it was asked with."""
    asked: list[dict[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append({name.lower(): value for name, value in self.headers.items()})
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
        server.shutdown()
        thread.join()


def make_job(client: TestClient | httpx.Client, model: str, files: dict[str, Any] = FILES) -> dict[str, Any]:
    job = client.post("/v1/jobs", json={"model": model, "recipe": "int8"}).json()
    finish(get_database(), claim(get_database(), job["id"]), files)
    return dict(client.get(job["urls"]["self"]).json())


def content_url(job: dict[str, Any], path: str = NAME) -> str:
    return str(next(a["urls"]["content"] for a in job["artifacts"] if a["path"] == path))


def test_a_download_is_sent_to_a_url_that_needs_no_credentials(
    s3_server: S3Server,
    use_s3: UseS3,
    request: pytest.FixtureRequest,
    settings: Settings,
    add_model: Callable[..., str],
) -> None:
    use_s3(s3_server)
    client: TestClient = request.getfixturevalue("client")
    job = make_job(client, add_model())
    answer = client.get(content_url(job), follow_redirects=False)
    assert (answer.status_code, answer.headers["cache-control"]) == (307, "private, no-store")
    url = answer.headers["location"]
    assert url.startswith(s3_server.url)
    file = httpx.get(url, headers={"Range": "bytes=10-19"})
    assert (file.status_code, file.content) == (206, CONTENT[10:20])
    assert "filename*=UTF-8''weights%20with%20%22quotes%22" in file.headers["content-disposition"]
    assert file.headers["content-type"] == "application/json"
    signed, last = url[:-1], url[-1]
    assert httpx.get(signed + ("0" if last != "0" else "1")).status_code == 403

    head = client.head(content_url(job), follow_redirects=False)
    assert head.status_code == 307
    assert httpx.head(head.headers["location"]).headers["content-length"] == str(len(CONTENT))

    again = client.get(content_url(job), headers={"If-None-Match": f'"{SHA256}"'}, follow_redirects=False)
    assert again.status_code == 304
    beyond = client.get(content_url(job), headers={"Range": "bytes=9999999-"}, follow_redirects=False)
    assert beyond.status_code == 416

    # A page runs under the policy that we send with it, so it never comes from elsewhere.
    page = client.get(job["urls"]["report"], headers={"Accept": "text/html"}, follow_redirects=False)
    assert (page.status_code, page.text) == (200, "<p>a page</p>")
    assert "sandbox" in page.headers["content-security-policy"]


def test_a_download_may_pass_through_us(
    s3_server: S3Server,
    use_s3: UseS3,
    request: pytest.FixtureRequest,
    settings: Settings,
    add_model: Callable[..., str],
) -> None:
    use_s3(s3_server, s3_downloads="streamed")
    client: TestClient = request.getfixturevalue("client")
    job = make_job(client, add_model())
    url = content_url(job)
    whole = client.get(url)
    assert (whole.status_code, whole.content, whole.headers["etag"]) == (200, CONTENT, f'"{SHA256}"')
    head = client.head(url)
    assert (head.content, head.headers["content-length"]) == (b"", str(len(CONTENT)))
    ranged = {"Range": "bytes=10-19"}
    part = client.get(url, headers=ranged | {"If-Range": f'"{SHA256}"'})
    assert (part.status_code, part.content) == (206, CONTENT[10:20])
    assert part.headers["content-range"] == f"bytes 10-19/{len(CONTENT)}"
    assert client.get(url, headers=ranged | {"If-Range": '"other"'}).content == CONTENT
    assert client.get(url, headers={"Range": "bytes=0-1,3-4"}).content == CONTENT
    assert client.get(url, headers={"Range": "bytes=9999999-"}).status_code == 416
    assert client.get(content_url(job, "empty.txt")).content == b""

    tar_file = client.get(job["urls"]["download"]).content
    with tarfile.open(fileobj=io.BytesIO(tar_file), mode="r:") as tar:
        found = {m.name: tar.extractfile(m).read() for m in tar.getmembers()}  # type: ignore[union-attr]
    assert found == {f"{job['id']}/{path}": content for path, (_, content) in FILES.items()}


def test_a_client_shows_the_store_none_of_its_credentials(
    s3_server: S3Server,
    use_s3: UseS3,
    request: pytest.FixtureRequest,
    add_model: Callable[..., str],
    make_key: Callable[..., str],
    tmp_path: Path,
) -> None:
    with recording_server(CONTENT) as (public_url, asked):
        use_s3(s3_server, s3_public_endpoint_url=public_url)
        service: str = request.getfixturevalue("server_url")
        with Client(service, key=make_key()) as client:
            job = make_job(client._http, add_model())
            artifact = next(a for a in job["artifacts"] if a["path"] == NAME)
            client.download(artifact, tmp_path / "weights.bin")
    assert (tmp_path / "weights.bin").read_bytes() == CONTENT
    assert len(asked) == 1
    assert not {"authorization", "cookie"} & asked[0].keys()


def test_a_download_from_s3_that_breaks_off_goes_on(
    s3_server: S3Server,
    use_s3: UseS3,
    request: pytest.FixtureRequest,
    settings: Settings,
    add_model: Callable[..., str],
    tmp_path: Path,
) -> None:
    large = CONTENT * 200
    counted: list[int] = []
    with cutting_proxy(s3_server.url, 300_000, direction="down") as proxy:
        use_s3(s3_server, s3_public_endpoint_url=proxy.url)
        service: str = request.getfixturevalue("server_url")
        with Client(service) as client:
            job = make_job(client._http, add_model(), {"big.bin": ("model", large)})
            client.download(job["artifacts"][0], tmp_path / "big.bin", on_bytes=counted.append)
        assert proxy.connections == 2
    assert (tmp_path / "big.bin").read_bytes() == large
