"""Datasets over HTTP: what is accepted, what it becomes, what is refused."""

from __future__ import annotations

import json

import pytest
from fastapi.testclient import TestClient
from model_files import zipped

from app.settings import Settings
from app.storage import get_store


def put(client: TestClient, content: bytes, name: str) -> dict:
    answer = client.put("/v1/datasets/content", params={"name": name}, content=content)
    assert answer.status_code == 201, answer.text
    return answer.json()


def kept(dataset: dict) -> str:
    return get_store().path_of(dataset["sha256"]).read_bytes().decode()


def lines(*texts: str) -> bytes:
    return "\n".join(json.dumps({"text": text, "id": 7}) for text in texts).encode()


def test_plain_text_is_kept_as_it_is(client: TestClient) -> None:
    text = "Erstes Dokument – über Müller.\nZweite Zeile.\n\nZweites Dokument.\n"
    dataset = put(client, text.encode(), "text.txt")
    assert kept(dataset) == text
    assert (dataset["format"], dataset["bytes"]) == ("txt", len(text.encode()))
    assert client.get(dataset["url"]).json() == dataset


def test_line_ends_and_byte_order_marks_are_made_alike(client: TestClient) -> None:
    assert kept(put(client, b"\xef\xbb\xbfone\r\ntwo\rthree\n", "a.txt")) == "one\ntwo\nthree\n"


def test_a_line_end_cut_in_two_by_the_reader_stays_one(client: TestClient) -> None:
    content = b"a" * (2**20 - 1) + b"\r\n" + "ü".encode() * 2**19 + b"\r"
    assert kept(put(client, content, "a.txt")) == "a" * (2**20 - 1) + "\n" + "ü" * 2**19 + "\n"


def test_each_line_of_jsonl_is_one_document(client: TestClient) -> None:
    dataset = put(client, lines("one\n\n \ntwo", "", "three") + b"\n\n", "chats.jsonl")
    assert kept(dataset) == "one\ntwo\n\nthree\n"
    assert dataset["format"] == "jsonl"


def test_what_has_no_ending_is_told_by_its_first_line(client: TestClient) -> None:
    assert put(client, lines("a", "b"), "chats")["format"] == "jsonl"
    assert put(client, b"a plain text", "notes")["format"] == "txt"


@pytest.mark.parametrize(
    ("content", "name", "code"),
    [
        (b"caf\xe9", "a.txt", "text_invalid"),
        (b"cut in the middle: \xc3", "a.txt", "text_invalid"),
        (b" \n \n", "a.txt", "text_invalid"),
        (b"a\0b", "a.txt", "text_invalid"),
        (b'{"text": "a"}\nnonsense', "a.jsonl", "text_invalid"),
        (b'{"prompt": "a"}', "a.jsonl", "text_invalid"),
        (b'{"text": 7}', "a.jsonl", "text_invalid"),
        (b'{"text": "\\ud800"}', "a.jsonl", "text_invalid"),
        (b'{"text": ""}', "a.jsonl", "text_invalid"),
        (b"[" * 100_000, "a.jsonl", "text_invalid"),
        (b"PAR1" + bytes(100), "a.parquet", "unsupported_format"),
        (zipped({"arr_0.npy": b"x"}), "a.npz", "images_invalid"),
        (b"\x93NUMPY" + bytes(100), "a.txt", "unsupported_format"),
    ],
)
def test_what_is_no_text_gets_its_code_and_leaves_nothing_behind(
    client: TestClient, settings: Settings, content: bytes, name: str, code: str
) -> None:
    answer = client.put("/v1/datasets/content", params={"name": name}, content=content)
    assert (answer.status_code, answer.json()["code"]) == (422, code)
    assert answer.json()["hint"]
    assert not list(get_store().iter_blobs())
    assert not [p for p in (settings.data_dir / "staging").rglob("*") if p.is_file()]
    assert client.get("/v1/datasets").json()["items"] == []


def test_a_refusal_of_parquet_says_what_is_accepted(client: TestClient) -> None:
    answer = client.put("/v1/datasets/content", params={"name": "a.parquet"}, content=b"PAR1" + bytes(9))
    assert ".jsonl" in answer.json()["hint"]


def test_an_empty_body_is_refused(client: TestClient) -> None:
    answer = client.put("/v1/datasets/content", params={"name": "a.txt"}, content=b"")
    assert (answer.status_code, answer.json()["code"]) == (422, "body_empty")


def test_an_upload_becomes_a_dataset(client: TestClient) -> None:
    upload = client.post("/v1/uploads", json={"name": "a.txt", "size": 5}).json()
    refused = client.post("/v1/datasets", json={"upload": upload["id"]})
    assert (refused.status_code, refused.json()["code"]) == (409, "upload_incomplete")
    client.put(f"{upload['urls']['self']}/parts/1", content=b"hello")
    client.post(upload["urls"]["complete"])
    dataset = client.post("/v1/datasets", json={"upload": upload["id"], "name": "greeting"}).json()
    assert (dataset["name"], kept(dataset)) == ("greeting", "hello")
    assert client.get(upload["urls"]["self"]).status_code == 404


def test_datasets_are_listed_and_deleted(client: TestClient) -> None:
    first, second = put(client, b"one", "1.txt"), put(client, b"two", "2.txt")
    assert [d["id"] for d in client.get("/v1/datasets").json()["items"]] == [second["id"], first["id"]]
    assert client.delete(first["url"]).status_code == 204
    assert client.get(first["url"]).status_code == 404
    assert {blob.sha256 for blob in get_store().iter_blobs()} == {second["sha256"]}
