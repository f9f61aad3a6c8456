"""The client against the real app behind a real server, over connections that break."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from cutting_proxy import cutting_proxy
from job_support import claim, finish
from s3_server import S3Server

from app.begun_uploads import BegunUploads
from app.client import Client, ClientError, DigestMismatch, Json, ServiceProblem, Unreachable
from app.db.engine import get_database
from app.db.model_queries import hold_blobs
from app.settings import Settings

PART = 200_000


@pytest.fixture
def small_parts(override_settings: Callable[..., Settings]) -> None:
    """Parts small enough that a test has several."""
    override_settings(part_bytes=PART)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights.bin"
    path.write_bytes(os.urandom(3 * PART + 17))
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def make_artifact(client: Client, model: str, content: bytes) -> Json:
    job = client.post("/v1/jobs", {"model": model, "recipe": "int8"})
    finish(get_database(), claim(get_database(), job["id"]), {"model.safetensors": ("model", content)})
    artifact = client.get(job["urls"]["self"])["artifacts"][0]
    return dict(artifact)


def test_a_file_arrives_whole_and_every_byte_is_counted(
    small_parts: None, server_url: str, file: Path
) -> None:
    sent: list[int] = []
    with Client(server_url) as client:
        upload = client.upload(file, on_bytes=sent.append)
        state = client.get(f"/v1/uploads/{upload}")
    assert (state["status"], state["sha256"], state["part_count"]) == ("completed", sha256(file), 4)
    assert sum(sent) == file.stat().st_size


def test_an_upload_survives_connections_that_break(small_parts: None, server_url: str, file: Path) -> None:
    with cutting_proxy(server_url, 120_000, PART + 50_000, direction="up") as proxy:
        with Client(proxy.url) as client:
            client.get("/v1/health/live")
            state = client.get(f"/v1/uploads/{client.upload(file)}")
        assert proxy.connections > 2
    assert (state["status"], state["sha256"]) == ("completed", sha256(file))


def test_a_post_whose_answer_was_lost_happens_once(server_url: str, add_model: Callable[..., str]) -> None:
    model = add_model()
    with Client(server_url) as client:
        answer_bytes = len(client._http.get("/v1/health/live").content)
    with (
        cutting_proxy(server_url, answer_bytes + 500, direction="down") as proxy,
        Client(proxy.url) as client,
    ):
        client.get("/v1/health/live")
        job = client.post("/v1/jobs", {"model": model, "recipe": "int8"})
        assert proxy.connections > 1
        assert [j["id"] for j in client.get("/v1/jobs")["items"]] == [job["id"]]


def test_a_call_that_takes_longer_than_an_answer_is_waited_for_is_asked_about_again(
    override_settings: Callable[..., Settings],
    new_postgres_database: Callable[[], str],
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    override_settings(database_url=new_postgres_database())
    service: str = request.getfixturevalue("server_url")
    path = tmp_path / "words.txt"
    path.write_bytes(b"some words " * 50)
    with Client(service) as client:
        upload = client.upload(path)
        client._http.timeout = httpx.Timeout(0.5)
        held = threading.Event()

        def hold() -> None:
            with get_database().write() as session:
                hold_blobs(session)
                held.set()
                time.sleep(2)

        holder = threading.Thread(target=hold)
        holder.start()
        held.wait()
        dataset = client.post("/v1/datasets", {"upload": upload})
        holder.join()
        assert [made["id"] for made in client.get("/v1/datasets")["items"]] == [dataset["id"]]


def test_an_upload_that_broke_off_sends_only_what_is_missing(
    small_parts: None, server_url: str, file: Path, tmp_path: Path
) -> None:
    sent: list[int] = []
    with Client(server_url) as client:
        begun = client.post("/v1/uploads", {"name": "weights.bin", "size": file.stat().st_size})
        part = file.read_bytes()[PART : 2 * PART]
        assert httpx.put(f"{server_url}/v1/uploads/{begun['id']}/parts/2", content=part).status_code == 200
        memory = BegunUploads(server_url, tmp_path / "state" / "uploads.json")
        memory.remember(file, begun["id"])
        upload = client.upload(file, begun=memory, on_bytes=sent.append)
        state = client.get(f"/v1/uploads/{upload}")
    assert (state["id"], state["status"], state["sha256"]) == (begun["id"], "completed", sha256(file))
    assert sent == [PART, PART, PART, 17]


def test_an_upload_the_service_has_forgotten_is_begun_anew(
    server_url: str, file: Path, tmp_path: Path
) -> None:
    memory = BegunUploads(server_url, tmp_path / "uploads.json")
    with Client(server_url) as client:
        memory.remember(file, "upl_01k0b6x2v9m4c8d7e5f3g1h0j2")
        upload = client.upload(file, begun=memory)
        assert client.get(f"/v1/uploads/{upload}")["sha256"] == sha256(file)
    assert memory.find(file) == upload


def test_a_problem_is_told_with_place_and_hint(server_url: str) -> None:
    with Client(server_url) as client, pytest.raises(ServiceProblem) as caught:
        client.post("/v1/uploads", {"name": "x", "size": 0})
    assert (caught.value.status, caught.value.code) == (422, "invalid_request")
    assert "/size: " in str(caught.value)


def test_a_service_that_is_not_there_is_named_at_once() -> None:
    began = time.monotonic()
    with Client("http://127.0.0.1:9") as client, pytest.raises(Unreachable, match="modelpress serve"):
        client.get("/v1/health/live")
    assert time.monotonic() - began < 2


def test_a_download_goes_on_where_the_connection_broke(
    server_url: str, add_model: Callable[..., str], tmp_path: Path
) -> None:
    content = os.urandom(3_000_000)
    got: list[int] = []
    with Client(server_url) as client:
        artifact = make_artifact(client, add_model(), content)
    with (
        cutting_proxy(server_url, 1_500_000, direction="down") as proxy,
        Client(proxy.url) as client,
    ):
        client.download(artifact, tmp_path / "out" / "model.safetensors", on_bytes=got.append)
        assert proxy.connections == 2
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == content
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]


def test_a_download_with_wrong_bytes_is_removed(
    server_url: str, add_model: Callable[..., str], tmp_path: Path
) -> None:
    with Client(server_url) as client:
        artifact = make_artifact(client, add_model(), b"weights")
        (tmp_path / "model.part").write_bytes(b"wei")
        with pytest.raises(DigestMismatch, match="was removed"):
            client.download(artifact | {"sha256": "0" * 64}, tmp_path / "model")
    assert list(tmp_path.glob("model*")) == []


def test_events_come_once_each_over_streams_that_break(
    server_url: str, add_model: Callable[..., str]
) -> None:
    with Client(server_url) as client:
        job = client.post("/v1/jobs", {"model": add_model(), "recipe": "int8"})
        finish(get_database(), claim(get_database(), job["id"]), {"report.json": ("report", b"{}")})
        everything = [event["number"] for event in client.get(job["urls"]["events"])["items"]]
    assert len(everything) == 3
    for cut in (700, 800, 900):
        with cutting_proxy(server_url, cut, direction="down") as proxy, Client(proxy.url) as client:
            assert [event.number for event in client.events(job)] == everything
            assert client.wait(job)["status"] == "succeeded"


@pytest.fixture
def s3_client(
    s3_server: S3Server, use_s3: Callable[..., Settings], request: pytest.FixtureRequest
) -> Iterator[Client]:
    """A client of a service whose store is in S3."""
    use_s3(s3_server, part_bytes=5 * 2**20)
    with Client(request.getfixturevalue("server_url")) as client:
        yield client


def test_parts_go_straight_to_s3_and_a_broken_run_is_taken_up(s3_client: Client, tmp_path: Path) -> None:
    file = tmp_path / "weights.bin"
    # S3 wants 5 MiB of every part but the last; ours are larger.
    file.write_bytes(os.urandom(2**20) * 17)
    begun = BegunUploads(s3_client.url, tmp_path / "begun.json")
    with pytest.raises(KeyboardInterrupt):
        s3_client.upload(file, begun=begun, on_bytes=_interrupted_once())
    sent: list[int] = []
    upload = s3_client.upload(file, begun=begun, on_bytes=sent.append)
    state = s3_client.get(f"/v1/uploads/{upload}")
    assert (state["direct"], state["status"], len(state["parts"])) == (True, "completed", state["part_count"])
    assert sent[0] > 0, "what the first run has sent is not sent again"
    assert sum(sent) == file.stat().st_size
    (digest,) = {part["sha256"] for part in state["parts"][:1]}
    with file.open("rb") as whole:
        assert digest == hashlib.sha256(whole.read(state["part_bytes"])).hexdigest()


def test_a_store_that_takes_no_part_is_said_in_words(
    s3_client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "notes.txt"
    file.write_bytes(b"notes")
    # Every URL is too old by the time it is used.
    monkeypatch.setattr("app.client._ATTEMPTS", 1)
    monkeypatch.setattr("app.storage.s3_uploads._URL_SECONDS", 1)
    post = s3_client.post

    def slowly(path: str, body: object = None) -> Json:
        answer = post(path, body)
        time.sleep(2 if path.endswith("/part-urls") else 0)
        return answer

    monkeypatch.setattr(s3_client, "post", slowly)
    with pytest.raises(ClientError, match=r"Part 1 cannot be sent to 127\.0\.0\.1: it answers 403"):
        s3_client.upload(file)


def _interrupted_once() -> Callable[[int], None]:
    """Ctrl-C after the first part."""
    calls = iter(range(10))

    def on_bytes(_: int) -> None:
        if next(calls) == 1:
            raise KeyboardInterrupt

    return on_bytes
