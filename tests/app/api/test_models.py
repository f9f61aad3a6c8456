"""Models over HTTP: every way in, what is shown, and how they go."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from fastapi.testclient import TestClient
from model_files import gguf, llama_files, sharded_llama_files, tarred, zipped

from app.db.engine import Database
from app.errors import Unavailable
from app.settings import Settings
from app.storage import get_store


def put(client: TestClient, content: bytes, name: str = "tiny.zip", **headers: str) -> dict:
    answer = client.put("/v1/models/content", params={"name": name}, content=content, headers=headers)
    assert answer.status_code == 201, answer.text
    return answer.json()


def upload(client: TestClient, name: str, content: bytes) -> str:
    made = client.post("/v1/uploads", json={"name": name, "size": len(content)}).json()
    for number in range(1, made["part_count"] + 1):
        at = (number - 1) * made["part_bytes"]
        part = client.put(
            f"{made['urls']['self']}/parts/{number}", content=content[at : at + made["part_bytes"]]
        )
        assert part.status_code == 200, part.text
    assert client.post(made["urls"]["complete"]).json()["status"] == "completed"
    return made["id"]


def test_a_zip_becomes_a_model_with_facts_from_its_headers(client: TestClient) -> None:
    files = llama_files()
    model = put(client, zipped(files))
    assert (model["architecture"], model["family"], model["dtype"]) == (
        "LlamaForCausalLM",
        "causal_lm",
        "F32",
    )
    assert (model["num_blocks"], model["hidden_size"], model["vocab_size"]) == (2, 16, 32)
    assert model["name"] == "tiny"
    assert {f["path"]: f["sha256"] for f in model["files"]} == {
        name: hashlib.sha256(content).hexdigest() for name, content in files.items()
    }
    assert model["bytes"] == sum(map(len, files.values()))
    assert client.get(model["url"]).json() == model


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("m.zip", lambda f: zipped(f, compress=True)),
        ("m.tar", tarred),
        ("m.tgz", lambda f: tarred(f, mode="w:gz")),
        ("m.tar", lambda f: tarred({f"folder/{n}": c for n, c in f.items()})),
        ("m.tar", lambda f: tarred({f"./{n}": c for n, c in f.items()}, format=1)),
        ("m.tar", lambda f: tarred({f"{'long' * 30}/{n}": c for n, c in f.items()}, format=2)),
    ],
)
def test_the_same_files_are_the_same_model_however_packed(
    client: TestClient, name: str, pack: Callable[[dict[str, bytes]], bytes]
) -> None:
    files = llama_files()
    assert put(client, pack(files), name)["sha256"] == put(client, zipped(files))["sha256"]


def test_shards_with_an_index_are_one_model(client: TestClient) -> None:
    model = put(client, zipped(sharded_llama_files()))
    single = put(client, zipped(llama_files()))
    assert model["parameters"] == single["parameters"]
    assert len(model["files"]) == 4


def test_a_gguf_is_a_model_by_itself(client: TestClient) -> None:
    model = put(client, gguf(), "tiny.gguf")
    assert (model["format"], model["dtype"], model["name"]) == ("gguf", "Q8_0", "tiny")
    assert [f["path"] for f in model["files"]] == ["tiny.gguf"]


def test_a_model_is_made_of_an_upload_in_parts(client: TestClient, settings: Settings) -> None:
    upload_id = upload(client, "tiny.zip", zipped(llama_files()))
    answer = client.post("/v1/models", json={"upload": upload_id, "name": "mine"})
    assert answer.status_code == 201
    assert answer.json()["name"] == "mine"
    assert answer.headers["Location"] == answer.json()["url"]
    assert client.get(f"/v1/uploads/{upload_id}").status_code == 404
    assert not list((settings.data_dir / "staging" / "uploads").iterdir())


def test_a_model_is_made_of_separate_uploads(client: TestClient) -> None:
    files = sharded_llama_files()
    body = {"files": [{"path": n, "upload": upload(client, n, c)} for n, c in files.items()]}
    answer = client.post("/v1/models", json=body)
    assert answer.status_code == 201, answer.text
    assert {f["path"] for f in answer.json()["files"]} == set(files)


def test_code_and_pickles_beside_the_weights_are_left_out_and_said_so(client: TestClient) -> None:
    extra = {"modeling_llama.py": b"print()", "pytorch_model.bin": b"\x80\x02", ".gitattributes": b""}
    model = put(client, zipped(llama_files() | extra))
    assert {entry["path"] for entry in model["scan"]} == set(extra)
    assert not set(extra) & {f["path"] for f in model["files"]}


def test_a_single_safetensors_file_gets_the_name_loaders_look_for(client: TestClient) -> None:
    files = llama_files()
    files["weights.safetensors"] = files.pop("model.safetensors")
    model = put(client, zipped(files))
    assert "model.safetensors" in {f["path"] for f in model["files"]}


def test_files_of_a_model_can_be_downloaded_and_resumed(client: TestClient) -> None:
    files = llama_files()
    model = put(client, zipped(files))
    url = next(f["url"] for f in model["files"] if f["path"] == "model.safetensors")
    whole = client.get(url)
    assert whole.content == files["model.safetensors"]
    assert client.get(url, headers={"Range": "bytes=10-19"}).content == files["model.safetensors"][10:20]
    assert client.get(url, headers={"If-None-Match": whole.headers["etag"]}).status_code == 304
    assert client.head(url).headers["content-length"] == str(len(whole.content))
    assert client.get(model["url"] + "/files/none.json").status_code == 404


def test_models_are_listed_newest_first_page_by_page(client: TestClient) -> None:
    made = [put(client, zipped(llama_files(rope_theta=float(i))))["id"] for i in range(3)]
    first = client.get("/v1/models", params={"limit": 2}).json()
    assert ([m["id"] for m in first["items"]], first["has_more"]) == (made[:0:-1], True)
    rest = client.get("/v1/models", params={"limit": 2, "after": first["items"][-1]["id"]}).json()
    assert ([m["id"] for m in rest["items"]], rest["has_more"]) == (made[:1], False)


def test_deleting_a_model_keeps_the_blobs_another_one_shares(client: TestClient) -> None:
    first, second = put(client, zipped(llama_files())), put(client, zipped(llama_files(rope_theta=5.0)))
    assert client.delete(first["url"]).status_code == 204
    assert client.get(first["url"]).status_code == 404
    store = get_store()
    shared = {f["sha256"] for f in first["files"]} & {f["sha256"] for f in second["files"]}
    assert len(shared) == 2
    assert {blob.sha256 for blob in store.iter_blobs()} == {f["sha256"] for f in second["files"]}
    assert client.delete(second["url"]).status_code == 204
    assert not list(store.iter_blobs())


def test_a_model_in_use_is_not_deleted_until_the_job_has_ended(client: TestClient) -> None:
    model = put(client, zipped(llama_files()))
    job = client.post(
        "/v1/jobs", json={"model": model["id"], "spec": {"steps": [{"technique": "prune.magnitude"}]}}
    )
    assert job.status_code == 202, job.text
    refused = client.delete(model["url"])
    assert (refused.status_code, refused.json()["code"]) == (409, "model_in_use")
    client.post(job.json()["urls"]["cancel"])
    assert client.delete(model["url"]).status_code == 204
    assert client.get(job.json()["urls"]["self"]).status_code == 200


def test_a_body_with_another_digest_is_refused(client: TestClient) -> None:
    digest = base64.b64encode(hashlib.sha256(b"other").digest()).decode()
    answer = client.put(
        "/v1/models/content",
        params={"name": "m.zip"},
        content=zipped(llama_files()),
        headers={"Content-Digest": f"sha-256=:{digest}:"},
    )
    assert (answer.status_code, answer.json()["code"]) == (422, "hash_mismatch")
    assert not list(get_store().iter_blobs())


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_over_the_limit_is_refused(
    override_settings: Callable[..., Settings], request: pytest.FixtureRequest, declared: bool
) -> None:
    override_settings(max_raw_body_bytes=1000)
    client = request.getfixturevalue("client")
    content = bytes(2000) if declared else iter([bytes(600)] * 3)
    answer = client.put("/v1/models/content", params={"name": "m.zip"}, content=content)
    assert (answer.status_code, answer.json()["code"]) == (413, "payload_too_large")


def test_exactly_one_source_must_be_given(client: TestClient) -> None:
    for body in ({}, {"upload": "upl_1", "uri": "hf://a/b"}):
        assert client.post("/v1/models", json=body).status_code == 422


def test_a_repeated_call_with_the_same_key_makes_one_model(client: TestClient) -> None:
    body = {"upload": upload(client, "tiny.zip", zipped(llama_files()))}
    answers = [client.post("/v1/models", json=body, headers={"Idempotency-Key": "k1"}) for _ in range(2)]
    assert [a.status_code for a in answers] == [201, 201]
    assert answers[0].json() == answers[1].json()


def test_the_two_ways_to_read_a_header_agree(client: TestClient, tmp_path: Path) -> None:
    model = put(client, zipped(llama_files()))
    url = next(f["url"] for f in model["files"] if f["path"] == "model.safetensors")
    raw = io.BytesIO(client.get(url).content)
    length = int.from_bytes(raw.read(8), "little")
    header = json.loads(raw.read(length))
    elements = 0
    for entry in header.values():
        count = 1
        for size in entry["shape"]:
            count *= size
        elements += count
    assert elements == model["parameters"]


def test_models_come_and_go_alike_on_every_database(
    any_database: Database, request: pytest.FixtureRequest
) -> None:
    client = request.getfixturevalue("client")
    upload_id = upload(client, "tiny.zip", zipped(llama_files()))
    model = client.post("/v1/models", json={"upload": upload_id}).json()
    assert client.get("/v1/models").json()["items"] == [model]
    assert client.delete(model["url"]).status_code == 204
    assert not list(get_store().iter_blobs())


def test_two_files_may_not_have_one_path(client: TestClient) -> None:
    uploads = [upload(client, "config.json", b"{}") for _ in range(2)]
    body = {
        "files": [
            {"path": "config.json", "upload": uploads[0]},
            {"path": "./config.json", "upload": uploads[1]},
        ]
    }
    answer = client.post("/v1/models", json=body)
    assert (answer.status_code, answer.json()["code"]) == (422, "path_named_twice")


def test_slow_uploads_keep_no_thread_from_others(
    server_url: str, any_database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()

    def slow(*_: object) -> None:
        go_on.wait(60)
        raise Unavailable("gone")

    monkeypatch.setattr("app.services.models.create_from_upload", slow)
    limits = httpx.Limits(max_connections=60)
    with httpx.Client(base_url=server_url, timeout=60, limits=limits) as http, ThreadPoolExecutor(45) as pool:
        slow_calls = [pool.submit(http.post, "/v1/models", json={"upload": "upl_1"}) for _ in range(45)]
        try:
            time.sleep(1)
            assert http.get("/v1/models", timeout=10).status_code == 200
        finally:
            go_on.set()
        assert {call.result().status_code for call in slow_calls} == {503}
