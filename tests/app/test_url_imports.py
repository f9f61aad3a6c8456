"""Imports by URL: the file that comes is the file that is there, whatever breaks; and nothing of ours can be reached."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from https_server import Behaviour, FileServer, make_certificates
from import_support import attempt, look, make_due, start
from key_support import MakeKey, bearer
from model_files import llama_files, zipped
from sqlalchemy import select, update
from waiting import wait_until

from app.access import Role
from app.client import Client, Json
from app.db import import_queries
from app.db.engine import Database, get_database
from app.db.tables import Import, Tenant, Upload
from app.errors import Unavailable
from app.services import import_attempt
from app.services.import_attempt import WAITS
from app.services.import_fetching import import_forever, take_due
from app.services.uploads import remove_expired_uploads
from app.settings import Settings, get_settings
from app.storage import ArtifactStore, get_staging

MIB = 2**20
WORDS = b"Some words of a text. " * 100
Override = Callable[..., Settings]


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_certificates(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def server(certificates: tuple[Path, Path]) -> Iterator[FileServer]:
    with FileServer(certificates[1]).running() as server:
        yield server


@pytest.fixture(autouse=True)
def reachable(
    certificates: tuple[Path, Path], override_settings: Override, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loopback is a network that the administrator allows, and the test's authority is trusted."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates[0]))
    override_settings(outbound_networks="127.0.0.0/8, ::1/128")


def content_of(size: int) -> bytes:
    return random.Random(size).randbytes(size)


def staged(upload: dict[str, Any]) -> Path:
    return get_staging().upload_path(upload["id"])


def error_of(client: TestClient, upload: dict[str, Any]) -> dict[str, Any]:
    """Why an import failed; nothing of it may be left."""
    found = look(client, upload)
    assert (found["status"], found["fetch"]["status"]) == ("failed", "ended"), found
    assert not staged(upload).exists()
    assert client.get("/v1/quota").json()["stored_bytes"]["used"] == 0
    return dict(found["fetch"]["error"])


def test_a_file_is_fetched_and_its_query_shown_to_nobody(
    any_database: Database, client: TestClient, server: FileServer, capfd: pytest.CaptureFixture[str]
) -> None:
    server.behaviour = Behaviour(WORDS)
    sha256 = hashlib.sha256(WORDS).hexdigest()
    upload = start(client, server.url("/a/some%20words.txt?signature=hush"), sha256=sha256)
    assert (upload["status"], upload["size"], upload["name"]) == ("importing", None, "some words.txt")
    assert upload["fetch"]["status"] == "waiting"
    assert upload["urls"]["part"] is None
    assert attempt(any_database)
    done = look(client, upload)
    assert (done["status"], done["size"], done["sha256"]) == ("completed", len(WORDS), sha256)
    assert (done["fetch"]["status"], done["fetch"]["bytes"], done["fetch"]["error"]) == (
        "ended",
        len(WORDS),
        None,
    )
    assert staged(upload).read_bytes() == WORDS
    assert server.requests[0]["path"] == "/a/some%20words.txt?signature=hush"
    assert server.requests[0]["accept-encoding"] == "identity"
    seen = [json.dumps(upload), json.dumps(done), client.get("/v1/audit").text, *capfd.readouterr()]
    assert "POST /v1/imports" in seen[2]
    with any_database.read() as session:
        seen.extend(session.scalars(select(Import.url)).all())
    assert not [text for text in seen if "hush" in text]
    assert not attempt(any_database)


def test_an_import_becomes_a_model_and_a_dataset_in_every_store(
    any_store: ArtifactStore, client: TestClient, server: FileServer
) -> None:
    for kind, name, content in (
        ("models", "tiny.zip", zipped(llama_files())),
        ("datasets", "words.txt", WORDS),
    ):
        server.behaviour = Behaviour(content)
        upload = start(client, server.url(f"/{name}"))
        early = client.post(f"/v1/{kind}", json={"upload": upload["id"]})
        assert (early.status_code, early.json()["code"]) == (409, "upload_incomplete")
        assert attempt(get_database())
        made = client.post(f"/v1/{kind}", json={"upload": upload["id"]})
        assert made.status_code == 201, made.text
        assert client.get(upload["urls"]["self"]).status_code == 404
        assert not staged(upload).exists()
    assert list(any_store.iter_blobs())


@pytest.mark.parametrize(
    ("url", "word"),
    [
        ("http://localhost/x", "https://"),
        ("ftp://localhost/x", "https://"),
        ("https://user:hush@localhost/x", "password"),
        ("https://10.0.0.1/x", "not on the open internet"),
        ("https://169.254.169.254/latest", "not on the open internet"),
        ("https://no-such-host.invalid/x", "has no address"),
        ("/etc/passwd", "absolute"),
    ],
)
def test_what_can_never_be_fetched_is_refused_at_once(client: TestClient, url: str, word: str) -> None:
    answer = client.post("/v1/imports", json={"url": url})
    assert answer.status_code == 422
    (fault,) = answer.json()["errors"]
    assert fault["pointer"] == "/url"
    assert word in fault["detail"]
    assert "hush" not in answer.text


def test_a_name_that_moved_to_a_private_address_since_is_not_called(
    database: Database, client: TestClient, server: FileServer, override_settings: Override
) -> None:
    upload = start(client, server.url())
    override_settings(outbound_networks="")
    assert attempt(get_database())
    error = error_of(client, upload)
    assert (error["code"], server.requests) == ("import_refused", [])
    assert "not on the open internet" in error["detail"]


def test_a_redirect_is_named_without_its_query_and_not_followed(
    database: Database, client: TestClient, server: FileServer
) -> None:
    target = "https://user:hush@elsewhere.example/real.zip?signature=hush"
    server.behaviour = Behaviour(status=302, headers={"Location": target})
    upload = start(client, server.url())
    assert attempt(database)
    error = error_of(client, upload)
    assert error["code"] == "import_redirected"
    assert "https://elsewhere.example/real.zip;" in error["detail"]
    assert "hush" not in str(error)
    assert len(server.requests) == 1


def test_a_server_whose_certificate_nobody_vouches_for_is_not_believed(
    database: Database, client: TestClient, server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSL_CERT_FILE")
    upload = start(client, server.url())
    assert attempt(database)
    assert "certificate is not trusted" in error_of(client, upload)["detail"]
    assert server.requests == []


@pytest.mark.parametrize(
    ("behaviour", "code"),
    [
        (Behaviour(b"x", status=404), "import_answer"),
        (Behaviour(b"x", status=403), "import_answer"),
        (Behaviour(b"x", headers={"Content-Encoding": "gzip"}), "import_answer"),
        (Behaviour(b"x", status=206), "import_answer"),
        (Behaviour(b"other bytes"), "hash_mismatch"),
        (Behaviour(b""), "import_empty"),
    ],
)
def test_what_is_not_the_file_is_a_final_error(
    database: Database, client: TestClient, server: FileServer, behaviour: Behaviour, code: str
) -> None:
    server.behaviour = behaviour
    upload = start(client, server.url(), sha256=hashlib.sha256(b"x").hexdigest())
    assert attempt(database)
    error = error_of(client, upload)
    assert error["code"] == code
    assert error["hint"]
    assert not attempt(database)


def test_a_cut_download_goes_on_where_it_broke(
    any_database: Database, client: TestClient, server: FileServer
) -> None:
    content = content_of(5 * MIB + 1)
    server.behaviour = Behaviour(content, cut_after=2 * MIB)
    upload = start(client, server.url())
    assert attempt(any_database)
    found = look(client, upload)
    fetch = found["fetch"]
    assert (found["status"], found["size"], fetch["bytes"]) == ("importing", len(content), 2 * MIB)
    assert (fetch["status"], fetch["attempt"], fetch["error"]["code"]) == ("waiting", 1, "import_unanswered")
    assert fetch["next_attempt_at"]
    assert not attempt(any_database), "it is not due yet"
    for _ in range(2):
        make_due(any_database)
        assert attempt(any_database)
    assert [r.get("range") for r in server.requests] == [None, f"bytes={2 * MIB}-", f"bytes={4 * MIB}-"]
    assert server.requests[2]["if-range"] == '"one"'
    assert look(client, upload)["sha256"] == hashlib.sha256(content).hexdigest()
    assert staged(upload).read_bytes() == content


@pytest.mark.parametrize("etag", [None, 'W/"one"'])
def test_without_a_strong_etag_it_begins_anew(
    database: Database, client: TestClient, server: FileServer, etag: str | None
) -> None:
    content = content_of(3 * MIB)
    server.behaviour = Behaviour(content, etag=etag, cut_after=MIB)
    upload = start(client, server.url())
    assert attempt(database)
    server.behaviour.cut_after = None
    make_due(database)
    assert attempt(database)
    assert [r.get("range") for r in server.requests] == [None, None]
    assert look(client, upload)["sha256"] == hashlib.sha256(content).hexdigest()


def test_a_file_that_changed_in_between_comes_whole(
    database: Database, client: TestClient, server: FileServer
) -> None:
    server.behaviour = Behaviour(content_of(3 * MIB), cut_after=2 * MIB)
    upload = start(client, server.url())
    assert attempt(database)
    other = content_of(MIB)
    server.behaviour = Behaviour(other, etag='"two"', cut_after=MIB // 2)
    make_due(database)
    assert attempt(database)
    assert (look(client, upload)["size"], staged(upload).stat().st_size) == (MIB, MIB // 2)
    server.behaviour.cut_after = None
    make_due(database)
    assert attempt(database)
    assert server.requests[2]["range"] == f"bytes={MIB // 2}-"
    assert look(client, upload)["sha256"] == hashlib.sha256(other).hexdigest()
    assert staged(upload).read_bytes() == other


def test_a_server_that_has_less_than_it_had_is_asked_from_the_start(
    database: Database, client: TestClient, server: FileServer
) -> None:
    content = content_of(2 * MIB)
    server.behaviour = Behaviour(content, cut_after=MIB)
    upload = start(client, server.url())
    for status in (200, 416, 200):
        server.behaviour.status = status
        assert attempt(database)
        server.behaviour.cut_after = None
        make_due(database)
    assert [r.get("range") for r in server.requests] == [None, f"bytes={MIB}-", None]
    assert look(client, upload)["sha256"] == hashlib.sha256(content).hexdigest()


def test_a_file_that_was_all_there_is_not_asked_for_again(
    client: TestClient, server: FileServer, override_settings: Override, monkeypatch: pytest.MonkeyPatch
) -> None:
    override_settings(heartbeat_seconds=0)
    server.behaviour = Behaviour(WORDS, etag=None)
    upload = start(client, server.url())

    def away(*_: object, **__: object) -> bool:
        raise Unavailable("The database does not answer.")

    with monkeypatch.context() as patch:
        patch.setattr(import_queries, "end", away)
        assert attempt(get_database())
    assert look(client, upload)["fetch"]["bytes"] == len(WORDS)
    make_due(get_database())
    assert attempt(get_database())
    assert look(client, upload)["sha256"] == hashlib.sha256(WORDS).hexdigest()
    assert len(server.requests) == 1


def test_a_file_of_no_announced_length_comes_too(
    database: Database, client: TestClient, server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(import_attempt, "_STEP_BYTES", MIB)
    content = content_of(3 * MIB + 5)
    server.behaviour = Behaviour(content, announces_length=False)
    upload = start(client, server.url())
    assert attempt(database)
    found = look(client, upload)
    assert (found["size"], found["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    assert client.get("/v1/quota").json()["stored_bytes"]["used"] == len(content)


@pytest.mark.parametrize("announced", [True, False])
def test_a_file_larger_than_may_be_uploaded_is_not_kept(
    client: TestClient, server: FileServer, override_settings: Override, announced: bool
) -> None:
    override_settings(max_upload_bytes=MIB)
    server.behaviour = Behaviour(content_of(2 * MIB), announces_length=announced)
    upload = start(client, server.url())
    assert attempt(get_database())
    assert error_of(client, upload)["code"] == "payload_too_large"


@pytest.mark.parametrize("announced", [True, False])
def test_the_quota_holds_before_and_while_a_file_comes(
    make_key: MakeKey,
    any_database: Database,
    client: TestClient,
    server: FileServer,
    monkeypatch: pytest.MonkeyPatch,
    announced: bool,
) -> None:
    monkeypatch.setattr(import_attempt, "_STEP_BYTES", MIB // 4)
    client.headers.update(bearer(make_key(Role.ADMINISTRATOR, tenant="acme")))
    with any_database.write() as session:
        session.execute(update(Tenant).where(Tenant.id == "acme").values(max_stored_bytes=MIB))
    server.behaviour = Behaviour(content_of(2 * MIB), announces_length=announced)
    upload = start(client, server.url())
    assert attempt(any_database)
    assert error_of(client, upload)["code"] == "quota_stored_bytes"
    server.behaviour = Behaviour(content_of(MIB), announces_length=True)
    fits = start(client, server.url())
    assert attempt(any_database)
    assert look(client, fits)["status"] == "completed"
    full = client.post("/v1/imports", json={"url": server.url()})
    assert (full.status_code, full.json()["code"]) == (403, "quota_stored_bytes")


def test_of_attempts_that_fail_there_are_six(
    database: Database, client: TestClient, server: FileServer
) -> None:
    server.behaviour = Behaviour(b"x", status=503, headers={"Retry-After": "90"})
    upload = start(client, server.url())
    waits = []
    for number in range(1, len(WAITS) + 1):
        assert attempt(database)
        with database.read() as session:
            row = session.get_one(Import, upload["id"])
            waits.append(row.due_at - time.time())  # type: ignore[operator]
        assert look(client, upload)["fetch"]["attempt"] == number
        make_due(database)
    assert waits[0] == pytest.approx(90, abs=10), "as the server asks"
    assert waits[4] == pytest.approx(600, abs=70), "as we do"
    assert attempt(database)
    error = error_of(client, upload)
    assert (error["code"], len(server.requests)) == ("import_unanswered", 6)
    assert "503 Service Unavailable" in error["detail"]


def test_getting_on_makes_attempts_count_anew(
    database: Database, client: TestClient, server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(import_attempt, "_STEP_BYTES", MIB)
    content = content_of(8 * MIB)
    server.behaviour = Behaviour(content, cut_after=MIB)
    upload = start(client, server.url())
    for _ in range(8):
        assert attempt(database)
        make_due(database)
    assert look(client, upload)["sha256"] == hashlib.sha256(content).hexdigest()


def test_who_drips_is_hung_up_on(client: TestClient, server: FileServer, override_settings: Override) -> None:
    override_settings(import_idle_seconds=1.5)
    server.behaviour = Behaviour(content_of(2 * MIB), hang_after=MIB // 2)
    upload = start(client, server.url())
    began = time.monotonic()
    assert attempt(get_database())
    assert time.monotonic() - began < 10
    fetch = look(client, upload)["fetch"]
    assert (fetch["status"], fetch["bytes"]) == ("waiting", MIB // 2)
    assert "less than 1048576 bytes came within 1.5 seconds" in fetch["error"]["detail"]


def test_the_time_for_all_attempts_ends(
    client: TestClient, server: FileServer, override_settings: Override
) -> None:
    override_settings(import_timeout_seconds=0.5)
    server.behaviour = Behaviour(content_of(2 * MIB), hang_after=MIB)
    upload = start(client, server.url())
    assert attempt(get_database())
    assert error_of(client, upload)["code"] == "import_timeout"


def test_what_is_deleted_stops(client: TestClient, server: FileServer, override_settings: Override) -> None:
    override_settings(heartbeat_seconds=0.1)
    database = get_database()
    server.behaviour = Behaviour(content_of(2 * MIB), hang_after=MIB)
    upload = start(client, server.url())
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(attempt, database)
        wait_until(lambda: look(client, upload)["fetch"]["bytes"] == MIB)
        assert look(client, upload)["fetch"]["status"] == "running"
        assert client.delete(upload["urls"]["self"]).status_code == 204
        assert running.result(timeout=5)
    assert not staged(upload).exists()
    assert not attempt(database)


def test_whoever_is_told_to_leave_gives_it_back_unspent(
    client: TestClient, server: FileServer, override_settings: Override
) -> None:
    override_settings(heartbeat_seconds=0.1)
    server.behaviour = Behaviour(content_of(2 * MIB), hang_after=MIB)
    upload, stop = start(client, server.url()), threading.Event()
    thread = threading.Thread(target=import_forever, args=(get_database(), get_settings(), stop))
    thread.start()
    wait_until(lambda: look(client, upload)["fetch"]["bytes"] == MIB)
    stop.set()
    thread.join(timeout=5)
    assert not thread.is_alive()
    fetch = look(client, upload)["fetch"]
    assert (fetch["status"], fetch["attempt"], fetch["error"]) == ("waiting", 0, None)
    server.behaviour.hang_after = None
    assert attempt(get_database())
    assert server.requests[1]["range"] == f"bytes={MIB}-"
    assert look(client, upload)["status"] == "completed"


def serve(*, log: Path) -> subprocess.Popen[bytes]:
    """The API as a process of its own, on this test's database and data directory."""
    command = [sys.executable, "-m", "app.cli", "serve", "--api-only", "--port", "0"]
    with log.open("ab") as out:
        return subprocess.Popen(command, stdout=out, stderr=out, env=dict(os.environ))


def test_an_api_that_is_killed_is_followed_by_another_and_so_is_one_that_leaves(
    client: TestClient, server: FileServer, override_settings: Override, tmp_path: Path
) -> None:
    override_settings(heartbeat_seconds=0.1, lease_seconds=1)
    content = content_of(6 * MIB)
    server.behaviour = Behaviour(content, hang_after=2 * MIB)
    upload = start(client, server.url(), sha256=hashlib.sha256(content).hexdigest())
    for at, ending in ((2 * MIB, signal.SIGKILL), (4 * MIB, signal.SIGTERM)):
        api = serve(log=tmp_path / "log")
        try:
            wait_until(lambda: look(client, upload)["fetch"]["bytes"] == at, seconds=30)  # noqa: B023 - called at once
        finally:
            api.send_signal(ending)
            api.wait(timeout=10)
    assert look(client, upload)["fetch"]["status"] == "waiting"
    server.behaviour.hang_after = None
    assert attempt(get_database())
    assert [r.get("range") for r in server.requests] == [None, f"bytes={2 * MIB}-", f"bytes={4 * MIB}-"]
    assert look(client, upload)["status"] == "completed"
    assert staged(upload).read_bytes() == content


def test_the_command_line_takes_a_url_for_a_path(
    server_url: str, server: FileServer, client: TestClient, tmp_path: Path
) -> None:
    def submit(path: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "app.cli", "submit", server.url(path), "--recipe", "int8", "--url"]
        return subprocess.run([*command, server_url], capture_output=True, text=True, timeout=60, check=False)

    stop = threading.Event()
    thread = threading.Thread(target=import_forever, args=(get_database(), get_settings(), stop))
    thread.start()
    try:
        server.behaviour = Behaviour(zipped(llama_files()))
        done = submit("/tiny.zip?signature=hush")
        server.behaviour = Behaviour(status=404)
        refused = submit("/tiny.zip")
    finally:
        stop.set()
        thread.join()
    assert done.returncode == 0, done.stderr
    (job,) = client.get("/v1/jobs").json()["items"]
    assert (job["name"], job["id"] in done.stdout) == ("tiny", True)
    assert refused.returncode == 1
    assert "localhost answered 404 Not Found." in refused.stderr


def test_ctrl_c_tells_the_service_to_stop(
    server_url: str, server: FileServer, database: Database, client: TestClient
) -> None:
    def interrupt(upload: Json) -> None:
        raise KeyboardInterrupt

    with Client(server_url) as caller, pytest.raises(KeyboardInterrupt):
        caller.import_url(server.url(), on_change=interrupt)
    with database.read() as session:
        assert session.scalars(select(Import.upload_id)).all() == []


@pytest.mark.parametrize(
    ("body", "pointer"), [({}, "/url"), ({"url": 5}, "/url"), ({"url": "https://a/", "size": 1}, "/size")]
)
def test_a_body_that_is_none_is_refused_where_it_is_wrong(
    client: TestClient, body: dict[str, Any], pointer: str
) -> None:
    answer = client.post("/v1/imports", json=body)
    assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, pointer)


def test_of_takers_at_once_one_gets_it_and_nobody_while_its_file_is_open(
    any_database: Database, client: TestClient, server: FileServer
) -> None:
    server.behaviour = Behaviour(WORDS)
    upload = start(client, server.url())
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: take_due(any_database, get_settings(), threading.Event()), range(4)))
    (first,) = (taken for taken in found if taken is not None)
    make_due(any_database)
    assert not attempt(any_database), "its lease is over, but it may only be asleep"
    with any_database.write() as session:
        assert import_queries.claim(session, upload["id"], lease_seconds=60) is not None
    first.run()
    assert look(client, upload)["status"] == "importing", "who has lost it ends nothing"
    make_due(any_database)
    assert attempt(any_database)
    assert look(client, upload)["status"] == "completed"


def test_tenants_take_turns_and_none_takes_all(any_database: Database) -> None:
    with any_database.write() as session:
        session.add_all([Tenant(id="acme"), Tenant(id="umbrella")])
    for number, tenant in enumerate(["acme"] * 3 + ["umbrella"]):
        upload = Upload(
            id=f"upl_{number}", tenant_id=tenant, name="x", size=0, part_bytes=0, status="importing"
        )
        with any_database.for_tenant(tenant).write() as session:
            import_queries.add_import(session, upload, "https://example.org/x", expires_in_seconds=60)

    def due() -> list[str]:
        with any_database.read() as session:
            return list(import_queries.list_due(session, most_of_a_tenant=2, limit=10))

    assert due() == ["upl_0", "upl_1", "upl_2", "upl_3"]
    for upload_id, left in (
        ("upl_0", ["upl_3", "upl_1", "upl_2"]),
        ("upl_1", ["upl_3"]),
        ("upl_3", []),
    ):
        with any_database.write() as session:
            assert import_queries.claim(session, upload_id, lease_seconds=60) is not None
        assert due() == left


def test_an_import_takes_no_parts_and_completes_by_itself(
    database: Database, client: TestClient, server: FileServer
) -> None:
    server.behaviour = Behaviour(WORDS)
    upload = start(client, server.url())
    for url, call in (("parts/1", client.put), ("complete", client.post)):
        answer = call(f"/v1/uploads/{upload['id']}/{url}", content=b"x" if url == "parts/1" else None)
        assert (answer.status_code, answer.json()["code"]) == (409, "upload_is_import")
    assert attempt(database)
    assert client.put(f"/v1/uploads/{upload['id']}/parts/1", content=b"x").status_code == 409
    assert client.post(f"/v1/uploads/{upload['id']}/complete").json()["status"] == "completed"
    assert staged(upload).read_bytes() == WORDS


def test_a_repeated_call_is_one_import(database: Database, client: TestClient, server: FileServer) -> None:
    call = {"json": {"url": server.url()}, "headers": {"Idempotency-Key": "k"}}
    first, second = (client.post("/v1/imports", **call) for _ in range(2))  # type: ignore[arg-type]
    assert first.status_code == second.status_code == 202
    assert first.headers["location"] == second.headers["location"] == first.json()["urls"]["self"]
    with database.read() as session:
        assert import_queries.count_unfinished(session) == 1
    assert 'modelpress_imports{state="waiting"} 1.0' in client.get("/metrics").text


def test_a_hundred_may_be_under_way(
    database: Database, client: TestClient, server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.services.url_imports._MAX_UNFINISHED", 1)
    upload = start(client, server.url())
    second = client.post("/v1/imports", json={"url": server.url()})
    assert (second.status_code, second.json()["code"]) == (429, "too_many_imports")
    client.delete(upload["urls"]["self"])
    start(client, server.url())


def test_what_was_not_used_goes_with_its_time(
    database: Database, client: TestClient, server: FileServer
) -> None:
    server.behaviour = Behaviour(WORDS)
    upload = start(client, server.url())
    assert attempt(database)
    with database.write() as session:
        session.execute(update(Upload).values(expires_at=0.0))
    with database.write() as session:
        assert remove_expired_uploads(session) == 1
    assert not staged(upload).exists()
    with database.read() as session:
        assert session.scalars(select(Import.upload_id)).all() == []
