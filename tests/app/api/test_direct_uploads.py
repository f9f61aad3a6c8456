"""Uploads straight to a real S3 service, by URLs that are good for one part, its length and its bytes."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from key_support import MakeKey, bearer
from model_files import llama_files, zipped
from s3_server import BUCKET, SECRET_KEY, S3Server
from sqlalchemy import update

from app.db.engine import Database, get_database
from app.db.quota_queries import Limits
from app.db.tables import Upload
from app.services import direct_uploads
from app.services.quotas import set_limits
from app.services.uploads import get_upload, remove_expired_uploads
from app.settings import Settings
from app.storage import get_store, s3_client

PART = 5 * 2**20
UseS3 = Callable[..., Settings]
Json = dict[str, Any]


@pytest.fixture
def bucket(s3_server: S3Server, use_s3: UseS3) -> Settings:
    """A store in S3. Before `any_database`, which goes on from these settings."""
    return use_s3(s3_server, part_bytes=1000)


@pytest.fixture(scope="module")
def model() -> bytes:
    """A model as an archive of three parts."""
    return zipped(llama_files() | {"model.safetensors.index.txt": os.urandom(2 * PART)})


def start(client: TestClient, content: bytes, **more: Any) -> Json:
    body = {"name": "m.zip", "size": len(content), "direct": True, **more}
    answer = client.post("/v1/uploads", json=body)
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


def part_of(content: bytes, number: int) -> bytes:
    return content[(number - 1) * PART : number * PART]


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def sign(client: TestClient, upload: Json, number: int, content: bytes) -> Json:
    body = {"parts": [{"number": number, "sha256": sha256(content)}]}
    answer = client.post(upload["urls"]["part_urls"], json=body)
    assert answer.status_code == 200, answer.text
    assert answer.headers["cache-control"] == "no-store"
    assert SECRET_KEY not in answer.text
    (item,) = answer.json()["items"]
    return dict(item)


def send(client: TestClient, upload: Json, content: bytes, *numbers: int) -> None:
    for number in numbers:
        part = part_of(content, number)
        signed = sign(client, upload, number, part)
        sent = httpx.put(signed["url"], content=part, headers=signed["headers"])
        assert sent.status_code == 200, sent.text


def keys(server: S3Server, settings: Settings) -> list[str]:
    """What lies below the store's prefix but for blobs."""
    prefix = settings.store.removeprefix(f"s3://{BUCKET}/")
    s3 = server.client()
    objects = s3.list_objects_v2(Bucket=BUCKET, Prefix=f"{prefix}/uploads/").get("Contents", ())
    begun = s3.list_multipart_uploads(Bucket=BUCKET, Prefix=f"{prefix}/uploads/").get("Uploads", ())
    return [entry["Key"].removeprefix(f"{prefix}/") for entry in (*objects, *begun)]


def test_a_model_is_made_of_what_was_sent_to_s3(
    s3_server: S3Server, bucket: Settings, any_database: Database, client: TestClient, model: bytes
) -> None:
    upload = start(client, model)
    assert (upload["direct"], upload["part_bytes"], upload["part_count"]) == (True, PART, 3)
    assert (upload["urls"]["part"], upload["missing"]) == (None, [1, 2, 3])
    send(client, upload, model, 3, 1)
    refused = client.post(upload["urls"]["complete"])
    assert (refused.status_code, refused.json()["code"]) == (409, "upload_incomplete")
    state = client.get(upload["urls"]["self"]).json()
    assert ([part["number"] for part in state["parts"]], state["missing"]) == ([1, 3], [2])
    assert state["parts"][0] == {"number": 1, "bytes": PART, "sha256": sha256(part_of(model, 1))}
    assert client.post("/v1/models", json={"upload": upload["id"]}).json()["code"] == "upload_incomplete"
    send(client, upload, model, 2)
    done = client.post(upload["urls"]["complete"]).json()
    assert (done["status"], done["sha256"], len(done["parts"])) == ("completed", None, 3)
    assert client.post(upload["urls"]["complete"]).json() == done
    assert keys(s3_server, bucket) == [f"uploads/{upload['id']}"]
    made = client.post("/v1/models", json={"upload": upload["id"]})
    assert (made.status_code, made.json()["format"]) == (201, "safetensors"), made.text
    assert client.get(upload["urls"]["self"]).status_code == 404
    assert keys(s3_server, bucket) == []
    assert not [path for path in (bucket.data_dir / "staging").rglob("*") if path.is_file()]


def test_datasets_and_models_of_several_files_are_made_too(bucket: Settings, client: TestClient) -> None:
    files = llama_files()
    uploads = {}
    for path, content in {**files, "a.txt": b"some words " * 50}.items():
        uploads[path] = start(client, content, name=path)
        send(client, uploads[path], content, 1)
        done = client.post(uploads[path]["urls"]["complete"])
        assert done.json()["status"] == "completed"
    dataset = client.post("/v1/datasets", json={"upload": uploads.pop("a.txt")["id"]})
    assert (dataset.status_code, dataset.json()["format"]) == (201, "txt")
    named = [{"path": path, "upload": upload["id"]} for path, upload in uploads.items()]
    model = client.post("/v1/models", json={"files": named})
    assert model.status_code == 201, model.text
    kept = {file["path"]: file["sha256"] for file in model.json()["files"]}
    assert kept.items() <= {path: sha256(content) for path, content in files.items()}.items()


def test_a_url_is_good_for_one_part_and_its_bytes_alone(bucket: Settings, client: TestClient) -> None:
    content = os.urandom(PART + 1000)
    upload = start(client, content)
    first, last = part_of(content, 1), part_of(content, 2)
    signed = sign(client, upload, 2, last)
    url, headers = signed["url"], signed["headers"]
    forged = {"x-amz-checksum-sha256": base64.b64encode(hashlib.sha256(first).digest()).decode()}
    refused = [
        httpx.put(url, content=last),
        httpx.put(url, content=last[:-1], headers=headers),
        httpx.put(url, content=last + b"x", headers=headers),
        httpx.put(url, content=bytes(1000), headers=headers),
        httpx.put(url, content=bytes(1000), headers=forged),
        httpx.put(url.replace("partNumber=2", "partNumber=1"), content=last, headers=headers),
        httpx.put(url.replace(upload["id"], upload["id"][:-1] + "0"), content=last, headers=headers),
        httpx.put(url.replace("/uploads/", "/blobs/"), content=last, headers=headers),
        httpx.put(url.replace("X-Amz-Expires=900", "X-Amz-Expires=90000"), content=last, headers=headers),
        httpx.put(url[:-1] + ("0" if url[-1] != "0" else "1"), content=last, headers=headers),
        httpx.put(url.partition("?")[0], content=last, headers=headers),
        httpx.get(url, headers=headers),
        httpx.delete(url, headers=headers),
    ]
    assert [answer.status_code for answer in refused] == [403, 403, 403, 400] + [403] * 9
    assert client.get(upload["urls"]["self"]).json()["missing"] == [1, 2]
    assert httpx.put(url, content=last, headers=headers).status_code == 200
    send(client, upload, content, 1)
    assert client.post(upload["urls"]["complete"]).json()["status"] == "completed"
    assert httpx.put(url, content=last, headers=headers).status_code == 404, "nothing comes in afterwards"
    refused_again = client.post(
        upload["urls"]["part_urls"], json={"parts": [{"number": 1, "sha256": "0" * 64}]}
    )
    assert (refused_again.status_code, refused_again.json()["code"]) == (409, "upload_completed")


def test_an_announced_part_stays_the_same(bucket: Settings, client: TestClient) -> None:
    upload = start(client, b"x" * 1000)
    url = upload["urls"]["part_urls"]
    sign(client, upload, 1, b"x" * 1000)
    send(client, upload, b"x" * 1000, 1)
    cases = [
        ([{"number": 1, "sha256": "0" * 64}], (409, "part_differs")),
        ([{"number": 2, "sha256": "0" * 64}], (422, "no_such_part")),
        ([{"number": 1, "sha256": "0" * 64}] * 2, (422, "invalid_request")),
        ([], (422, "invalid_request")),
    ]
    for parts, expected in cases:
        answer = client.post(url, json={"parts": parts})
        assert (answer.status_code, answer.json()["code"]) == expected
    through_us = client.put(f"{upload['urls']['self']}/parts/1", content=b"x" * 1000)
    assert (through_us.status_code, through_us.json()["code"]) == (409, "upload_is_direct")


def test_what_does_not_ask_for_it_or_is_not_offered_it_goes_through_us(
    s3_server: S3Server, bucket: Settings, use_s3: UseS3, request: pytest.FixtureRequest
) -> None:
    client: TestClient = request.getfixturevalue("client")
    upload = start(client, b"Hello there.", direct=False)
    assert (upload["direct"], upload["urls"]["part_urls"]) == (False, None)
    signed = client.post(
        f"{upload['urls']['self']}/part-urls", json={"parts": [{"number": 1, "sha256": "0" * 64}]}
    )
    assert (signed.status_code, signed.json()["code"]) == (409, "upload_not_direct")
    assert client.put(f"{upload['urls']['self']}/parts/1", content=b"Hello there.").status_code == 200
    done = client.post(upload["urls"]["complete"]).json()
    assert (done["status"], done["sha256"]) == ("completed", sha256(b"Hello there."))


@pytest.mark.parametrize(
    ("settings", "direct"),
    [
        ({"store": ""}, False),
        ({"s3_uploads": "streamed"}, False),
        ({"s3_downloads": "streamed"}, False),
        ({"s3_downloads": "streamed", "s3_uploads": "direct"}, True),
        ({}, True),
    ],
)
def test_it_is_offered_where_clients_reach_s3(settings: Json, direct: bool) -> None:
    made = Settings(**{"store": "s3://bucket/prefix"} | settings)
    assert direct_uploads.offered(made) is direct


def test_parts_are_as_large_as_s3_wants_them() -> None:
    settings = Settings(part_bytes=8 * 2**20)
    assert direct_uploads.part_bytes(1, Settings(part_bytes=1000)) == PART
    assert direct_uploads.part_bytes(2**30, settings) == 8 * 2**20
    size = 200 * 2**30
    assert -(-size // direct_uploads.part_bytes(size, settings)) <= 10_000


def test_another_tenant_gets_no_url(make_key: MakeKey, bucket: Settings, client: TestClient) -> None:
    owner, stranger = bearer(make_key(tenant="acme")), bearer(make_key(tenant="umbrella"))
    made = client.post("/v1/uploads", json={"name": "a", "size": 9, "direct": True}, headers=owner).json()
    body = {"parts": [{"number": 1, "sha256": "0" * 64}]}
    assert client.post(made["urls"]["part_urls"], json=body, headers=stranger).status_code == 404
    assert client.post(made["urls"]["complete"], headers=stranger).status_code == 404
    known = client.get("/v1/audit", headers=owner).json()["items"]
    assert client.post(made["urls"]["part_urls"], json=body, headers=owner).status_code == 200
    entry, *before = client.get("/v1/audit", headers=owner).json()["items"]
    assert (entry["call"], before) == (f"POST {made['urls']['part_urls']}", known)


def test_bytes_that_changed_in_s3_are_not_kept(
    s3_server: S3Server, bucket: Settings, client: TestClient, model: bytes
) -> None:
    upload = start(client, model)
    send(client, upload, model, 1, 2, 3)
    client.post(upload["urls"]["complete"])
    (key,) = keys(s3_server, bucket)
    prefix = bucket.store.removeprefix(f"s3://{BUCKET}/")
    damaged = model[:PART] + bytes([model[PART] ^ 1]) + model[PART + 1 :]
    s3_server.client().put_object(Bucket=BUCKET, Key=f"{prefix}/{key}", Body=damaged)
    answer = client.post("/v1/models", json={"upload": upload["id"]})
    assert (answer.status_code, answer.json()["code"]) == (422, "hash_mismatch")
    assert "part 2 " in answer.json()["detail"]
    assert client.get(upload["urls"]["self"]).status_code == 404
    assert keys(s3_server, bucket) == []


def test_a_wrong_digest_of_the_whole_is_found_when_it_is_fetched(
    s3_server: S3Server, bucket: Settings, client: TestClient
) -> None:
    content = b"some words " * 50
    upload = start(client, content, name="a.txt", sha256="0" * 64)
    send(client, upload, content, 1)
    assert client.post(upload["urls"]["complete"]).json()["sha256"] == "0" * 64
    answer = client.post("/v1/datasets", json={"upload": upload["id"]})
    assert (answer.status_code, answer.json()["code"]) == (422, "hash_mismatch")
    assert keys(s3_server, bucket) == []


def test_a_process_that_dies_between_s3_and_its_row_loses_nothing(
    bucket: Settings, any_database: Database, client: TestClient, model: bytes
) -> None:
    upload = start(client, model)
    send(client, upload, model, 1, 2, 3)
    state = client.get(upload["urls"]["self"]).json()
    assert state["missing"] == []
    # What complete does up to the row.
    direct_uploads.assemble(get_upload(any_database, upload["id"]))
    assert client.get(upload["urls"]["self"]).json() == state
    assert client.post(upload["urls"]["complete"]).json()["status"] == "completed"
    assert client.post("/v1/models", json={"upload": upload["id"]}).status_code == 201


def test_what_is_deleted_or_expires_leaves_s3(
    s3_server: S3Server, bucket: Settings, any_database: Database, client: TestClient
) -> None:
    content = b"x" * 1000
    opened, completed, dropped, kept, unsent = (start(client, content) for _ in range(5))
    for upload in (opened, completed, dropped, kept):
        send(client, upload, content, 1)
    client.post(completed["urls"]["complete"])
    client.post(kept["urls"]["complete"])
    assert client.delete(dropped["urls"]["self"]).status_code == 204
    assert client.delete(unsent["urls"]["self"]).status_code == 204
    late = sign(client, opened, 1, content)
    # Of a process that died before it could keep S3's name of an upload.
    get_store().direct_uploads.begin(kept["id"])
    expired = update(Upload).where(Upload.id.in_([opened["id"], completed["id"]])).values(expires_at=0.0)
    with any_database.write() as session:
        session.execute(expired)
    with any_database.write() as session:
        assert remove_expired_uploads(session) == 2
    assert len(keys(s3_server, bucket)) == 4
    assert direct_uploads.remove_left(any_database) == 0, "nothing is an hour old"
    assert direct_uploads.remove_left(any_database, older_than_seconds=-5) == 3
    assert keys(s3_server, bucket) == [f"uploads/{kept['id']}"]
    assert httpx.put(late["url"], content=content, headers=late["headers"]).status_code == 404
    assert client.post("/v1/datasets", json={"upload": kept["id"]}).status_code == 201


def test_what_somebody_else_aborted_is_gone(
    s3_server: S3Server, bucket: Settings, client: TestClient
) -> None:
    upload = start(client, b"x" * 1000)
    send(client, upload, b"x" * 1000, 1)
    with get_database().read() as session:
        multipart_id = session.get_one(Upload, upload["id"]).multipart_id
    get_store().direct_uploads.abort(upload["id"], multipart_id)
    for answer in (client.get(upload["urls"]["self"]), client.post(upload["urls"]["complete"])):
        assert (answer.status_code, answer.json()["code"]) == (404, "not_found")


def test_the_quota_holds_before_a_url_is_given(bucket: Settings, client: TestClient) -> None:
    with get_database().write() as session:
        set_limits(session, "default", Limits(1500, None))
    start(client, b"x" * 1000)
    answer = client.post("/v1/uploads", json={"name": "b", "size": 1000, "direct": True})
    assert (answer.status_code, answer.json()["code"]) == (403, "quota_stored_bytes")


def test_while_s3_is_away_uploads_wait_and_then_go_on(
    s3_server: S3Server,
    bucket: Settings,
    use_s3: UseS3,
    client: TestClient,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Its five attempts take seven seconds a call.
    monkeypatch.setitem(s3_client._PATIENT, "retries", {"total_max_attempts": 1})
    content = b"some words " * 50
    upload, deleted, fresh = (start(client, content, name="a.txt") for _ in range(3))
    send(client, upload, content, 1)
    send(client, deleted, content, 1)
    use_s3(s3_server, store=bucket.store, s3_endpoint_url="http://127.0.0.1:9")
    body = {"parts": [{"number": 1, "sha256": sha256(content)}]}
    for answer in (
        client.post(fresh["urls"]["part_urls"], json=body),
        client.get(upload["urls"]["self"]),
        client.post(upload["urls"]["complete"]),
    ):
        assert (answer.status_code, answer.json()["code"]) == (503, "storage_unavailable")
        assert "MODELPRESS_S3_ENDPOINT_URL" in answer.json()["hint"]
    assert client.delete(deleted["urls"]["self"]).status_code == 204
    use_s3(s3_server, store=bucket.store)
    assert client.post(upload["urls"]["complete"]).json()["status"] == "completed"
    assert client.post("/v1/datasets", json={"upload": upload["id"]}).status_code == 201
    assert keys(s3_server, bucket) == [f"uploads/{deleted['id']}"]
    assert direct_uploads.remove_left(get_database(), older_than_seconds=-5) == 1
