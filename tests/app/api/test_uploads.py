"""Uploads over HTTP: parts in any order, again, cut, too long, with the wrong bytes."""

from __future__ import annotations

import base64
import hashlib
import os
import resource
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from urllib.parse import urlsplit

import httpx
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import update

from app.db.engine import Database, get_database
from app.db.tables import Upload
from app.services.uploads import remove_expired_uploads
from app.settings import Settings
from app.storage import get_staging

PART = 1000
CONTENT = bytes(i * 31 % 256 for i in range(2500))


@pytest.fixture(autouse=True)
def small_parts(override_settings: Callable[..., Settings]) -> None:
    override_settings(part_bytes=PART)


def start(client: TestClient | httpx.Client, content: bytes = CONTENT, **more: str) -> dict:
    answer = client.post("/v1/uploads", json={"name": "file.bin", "size": len(content), **more})
    assert answer.status_code == 201, answer.text
    return answer.json()


def send(
    client: TestClient | httpx.Client, upload: dict, number: int, content: bytes | None = None, **headers: str
):
    part = CONTENT[(number - 1) * PART : number * PART] if content is None else content
    return client.put(f"{upload['urls']['self']}/parts/{number}", content=part, headers=headers)


def digest_header(content: bytes) -> str:
    return f"sha-256=:{base64.b64encode(hashlib.sha256(content).digest()).decode()}:"


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2), (2, 3, 1)])
def test_parts_may_come_in_any_order(client: TestClient, order: tuple[int, ...]) -> None:
    upload = start(client)
    assert (upload["part_bytes"], upload["part_count"], upload["missing"]) == (PART, 3, [1, 2, 3])
    for number in order:
        assert send(client, upload, number).status_code == 200
    done = client.post(upload["urls"]["complete"]).json()
    assert (done["status"], done["sha256"]) == ("completed", hashlib.sha256(CONTENT).hexdigest())
    assert get_staging().upload_path(upload["id"]).read_bytes() == CONTENT


def test_parts_may_come_at_the_same_time(client: TestClient) -> None:
    content = os.urandom(20 * PART)
    upload = start(client, content)
    with ThreadPoolExecutor(4) as pool:
        sent = pool.map(
            lambda n: send(client, upload, n, content[(n - 1) * PART : n * PART]).status_code,
            range(20, 0, -1),
        )
        assert set(sent) == {200}
    assert client.post(upload["urls"]["complete"]).json()["sha256"] == hashlib.sha256(content).hexdigest()


def test_what_is_missing_is_said_and_completing_refused(client: TestClient) -> None:
    upload = start(client)
    send(client, upload, 2)
    assert client.get(upload["urls"]["self"]).json()["missing"] == [1, 3]
    refused = client.post(upload["urls"]["complete"])
    assert (refused.status_code, refused.json()["code"]) == (409, "upload_incomplete")


def test_a_part_sent_again_changes_nothing_and_other_bytes_are_refused(client: TestClient) -> None:
    upload = start(client)
    first = send(client, upload, 1)
    assert send(client, upload, 1).json() == first.json()
    other = send(client, upload, 1, bytes(PART))
    assert (other.status_code, other.json()["code"]) == (409, "part_differs")
    send(client, upload, 2)
    send(client, upload, 3)
    assert client.post(upload["urls"]["complete"]).json()["sha256"] == hashlib.sha256(CONTENT).hexdigest()


def test_completing_twice_is_harmless(client: TestClient) -> None:
    upload = start(client)
    for number in (1, 2, 3):
        send(client, upload, number)
    first = client.post(upload["urls"]["complete"])
    assert client.post(upload["urls"]["complete"]).json() == first.json()


def test_a_wrong_part_digest_is_refused_and_the_part_can_come_again(client: TestClient) -> None:
    upload = start(client)
    wrong = send(client, upload, 1, **{"Content-Digest": digest_header(b"other")})
    assert (wrong.status_code, wrong.json()["code"]) == (422, "digest_mismatch")
    assert client.get(upload["urls"]["self"]).json()["missing"] == [1, 2, 3]
    right = send(client, upload, 1, **{"Content-Digest": digest_header(CONTENT[:PART])})
    assert right.json()["sha256"] == hashlib.sha256(CONTENT[:PART]).hexdigest()


def test_a_digest_that_cannot_be_read_is_refused(client: TestClient) -> None:
    answer = send(client, start(client), 1, **{"Content-Digest": "md5=:AAAA:"})
    assert (answer.status_code, answer.json()["code"]) == (422, "digest_unreadable")


def test_a_wrong_digest_of_the_whole_removes_the_upload(client: TestClient, settings: Settings) -> None:
    upload = start(client, sha256="0" * 64)
    for number in (1, 2, 3):
        send(client, upload, number)
    answer = client.post(upload["urls"]["complete"])
    assert (answer.status_code, answer.json()["code"]) == (422, "hash_mismatch")
    assert client.get(upload["urls"]["self"]).status_code == 404
    assert not list((settings.data_dir / "staging" / "uploads").iterdir())


@pytest.mark.parametrize(("content", "status"), [(bytes(PART + 1), 413), (bytes(PART - 1), 422), (b"", 422)])
@pytest.mark.parametrize("declared", [True, False])
def test_a_part_of_another_length_is_refused(
    client: TestClient, content: bytes, status: int, declared: bool
) -> None:
    upload = start(client)
    url = f"{upload['urls']['self']}/parts/1"
    answer = client.put(url, content=content if declared else iter([content]))
    assert answer.status_code == status
    assert client.get(upload["urls"]["self"]).json()["missing"] == [1, 2, 3]


def test_a_part_that_does_not_exist_is_refused(client: TestClient) -> None:
    answer = send(client, start(client), 4, b"x")
    assert (answer.status_code, answer.json()["code"]) == (422, "no_such_part")


def test_an_upload_over_the_limit_is_refused_before_a_byte_is_sent(
    client: TestClient, settings: Settings
) -> None:
    answer = client.post("/v1/uploads", json={"name": "a", "size": 10**18})
    assert (answer.status_code, answer.json()["code"]) == (413, "payload_too_large")


@pytest.mark.parametrize("name", ["../a", "a/b", "", "a\nb", "x" * 300])
def test_a_name_that_is_a_path_is_refused(client: TestClient, name: str) -> None:
    assert client.post("/v1/uploads", json={"name": name, "size": 1}).status_code == 422


def test_a_deleted_upload_is_gone_with_its_bytes(client: TestClient) -> None:
    upload = start(client)
    send(client, upload, 1)
    assert client.delete(upload["urls"]["self"]).status_code == 204
    assert send(client, upload, 2).status_code == 404
    assert not get_staging().upload_path(upload["id"]).exists()


def test_expired_uploads_and_strays_are_removed(client: TestClient, settings: Settings) -> None:
    upload, other = start(client), start(client)
    stray = get_staging().upload_path("upl_stray")
    stray.write_bytes(b"left by a process that died")
    os.utime(stray, (0, 0))
    with get_database().write() as session:
        session.execute(update(Upload).where(Upload.id == upload["id"]).values(expires_at=0.0))
    with get_database().write() as session:
        assert remove_expired_uploads(session) == 2
    assert client.get(upload["urls"]["self"]).status_code == 404
    assert [p.name for p in stray.parent.iterdir()] == [other["id"]]


def test_a_full_disk_is_said_before_a_byte_is_sent(
    override_settings: Callable[..., Settings], request: pytest.FixtureRequest
) -> None:
    settings = override_settings(min_free_disk_bytes=2**60)
    client = request.getfixturevalue("client")
    answer = client.post("/v1/uploads", json={"name": "a", "size": 10})
    assert (answer.status_code, answer.json()["code"]) == (507, "storage_full")
    assert not list((settings.data_dir / "staging").rglob("upl_*"))


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """The kernel refuses to write past `size` bytes of any file, as a full disk would."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_disk_that_fills_up_during_a_body_leaves_nothing(client: TestClient, settings: Settings) -> None:
    # SQLite's own files are smaller than this; the body is larger.
    with file_size_limit(8 * 2**20):
        answer = client.put("/v1/models/content", params={"name": "m.zip"}, content=bytes(9 * 2**20))
    assert (answer.status_code, answer.json()["code"]) == (507, "storage_full")
    assert not [p for p in (settings.data_dir / "staging").rglob("*") if p.is_file()]
    assert client.get("/v1/models").status_code == 200


def test_a_disk_that_fills_up_during_a_part_leaves_the_part_to_be_sent_again(
    override_settings: Callable[..., Settings], request: pytest.FixtureRequest
) -> None:
    half = 8 * 2**20
    override_settings(part_bytes=half)
    client = request.getfixturevalue("client")
    content = os.urandom(2 * half)
    upload = start(client, content)
    with file_size_limit(half):
        assert send(client, upload, 1, content[:half]).status_code == 200
        full = send(client, upload, 2, content[half:])
    assert (full.status_code, full.json()["code"]) == (507, "storage_full")
    assert client.get(upload["urls"]["self"]).json()["missing"] == [2]
    assert send(client, upload, 2, content[half:]).status_code == 200
    assert client.post(upload["urls"]["complete"]).json()["sha256"] == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("part_bytes", [5 * 2**19, 3 * 2**20 + 1000])
def test_large_parts_keep_every_byte_aligned_or_not(
    override_settings: Callable[..., Settings], request: pytest.FixtureRequest, part_bytes: int
) -> None:
    override_settings(part_bytes=part_bytes)
    client = request.getfixturevalue("client")
    content = os.urandom(7 * 2**20 + 77)
    upload = start(client, content)
    for number in range(1, upload["part_count"] + 1):
        part = content[(number - 1) * part_bytes : number * part_bytes]
        assert (
            send(client, upload, number, part, **{"Content-Digest": digest_header(part)}).status_code == 200
        )
        assert send(client, upload, number, part).status_code == 200
    assert client.post(upload["urls"]["complete"]).json()["sha256"] == hashlib.sha256(content).hexdigest()
    assert get_staging().upload_path(upload["id"]).read_bytes() == content


def raw_part(url: str, upload: dict, sent: bytes) -> socket.socket:
    """Begin to send part 1 over a bare socket."""
    parts = urlsplit(url)
    assert parts.hostname
    assert parts.port
    connection = socket.create_connection((parts.hostname, parts.port))
    head = f"PUT {upload['urls']['self']}/parts/1 HTTP/1.1\r\nHost: x\r\nContent-Length: {PART}\r\n\r\n"
    connection.sendall(head.encode() + sent)
    return connection


def test_a_cut_connection_leaves_no_part_and_it_can_be_sent_again(server_url: str) -> None:
    with httpx.Client(base_url=server_url) as http:
        upload = start(http)
        raw_part(server_url, upload, CONTENT[:500]).close()
        time.sleep(0.2)
        assert http.get(upload["urls"]["self"]).json()["missing"] == [1, 2, 3]
        for number in (1, 2, 3):
            assert send(http, upload, number).status_code == 200
        done = http.post(upload["urls"]["complete"]).json()
        assert done["sha256"] == hashlib.sha256(CONTENT).hexdigest()


def test_a_part_that_is_on_its_way_is_not_taken_from_another_request(server_url: str) -> None:
    with httpx.Client(base_url=server_url) as http:
        upload = start(http)
        connection = raw_part(server_url, upload, CONTENT[:500])
        time.sleep(0.3)
        busy = send(http, upload, 1)
        assert (busy.status_code, busy.json()["code"]) == (409, "part_in_progress")
        connection.sendall(CONTENT[500:PART])
        assert b" 200 " in connection.recv(1000)
        connection.close()


def test_a_declared_length_over_the_limit_is_answered_without_reading(server_url: str) -> None:
    parts = urlsplit(server_url)
    assert parts.hostname
    with httpx.Client(base_url=server_url) as http:
        upload = start(http)
    with socket.create_connection((parts.hostname, parts.port or 80)) as connection:
        head = f"PUT {upload['urls']['self']}/parts/1 HTTP/1.1\r\nHost: x\r\nContent-Length: {10**12}\r\n\r\n"
        connection.sendall(head.encode())
        assert b" 413 " in connection.recv(4000)


def test_uploads_work_alike_on_every_database(any_database: Database, request: pytest.FixtureRequest) -> None:
    client = request.getfixturevalue("client")
    upload = start(client)
    for number in (1, 2, 3):
        assert send(client, upload, number).status_code == 200
    assert client.post(upload["urls"]["complete"]).json()["status"] == "completed"
    assert client.delete(upload["urls"]["self"]).status_code == 204
