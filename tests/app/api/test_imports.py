"""Imports over HTTP: from a hub that speaks the routes huggingface_hub uses, and from below the import root."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from fastapi.testclient import TestClient
from model_files import gguf, llama_files, sharded_llama_files, zipped

from app.settings import Settings
from app.storage import get_store

SHA = "c0ffee" * 6 + "c0de"


class Hub:
    """A hub on loopback: the model-info route, and the resolve route with redirect to a second host for large files."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.lies: dict[str, bytes] = {}
        """What is sent in place of a file."""
        self.cut_after: int | None = None
        """Breaks the first download of weights after so many bytes."""
        self.seen: list[tuple[str, str | None]] = []
        """Paths asked for, and the Authorization that came with them."""
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.seen.append((self.path, self.headers.get("Authorization")))
                hub.answer(self)

            def log_message(self, *args: object) -> None:
                """Stay silent."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(request.path).path)
        for repo, files in self.repos.items():
            if path == f"/api/models/{repo}/revision/main":
                self.send(request, json.dumps(self.info(repo, files)).encode())
                return
            for prefix in (f"/{repo}/resolve/{SHA}/", "/cdn/"):
                name = path.removeprefix(prefix)
                if path.startswith(prefix) and name in files:
                    self.file(request, name, self.lies.get(name, files[name]), redirect=prefix != "/cdn/")
                    return
        self.send(request, b"{}", 404, {"X-Error-Code": "RepoNotFound"})

    @staticmethod
    def info(repo: str, files: dict[str, bytes]) -> dict:
        siblings = []
        for name, content in files.items():
            entry: dict = {"rfilename": name, "size": len(content), "blobId": "0" * 40}
            if name.endswith((".safetensors", ".gguf")):
                digest = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 130}
            siblings.append(entry)
        return {"id": repo, "modelId": repo, "sha": SHA, "siblings": siblings, "private": False, "tags": []}

    def file(self, request: BaseHTTPRequestHandler, name: str, content: bytes, *, redirect: bool) -> None:
        if redirect and name.endswith(".safetensors"):
            # The hub sends large files from another host, which must not see the token.
            location = f"http://localhost:{self.port}/cdn/{name}"
            self.send(request, b"", 302, {"Location": location, "X-Linked-Size": str(len(content))})
            return
        start = int((request.headers.get("Range") or "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        if self.cut_after is not None and name.endswith(".safetensors"):
            cut, self.cut_after = self.cut_after, None
            self.send(request, content[:cut], length=len(content))
            request.close_connection = True
            return
        self.send(request, content[start:], 206 if start else 200)

    @staticmethod
    def send(
        request: BaseHTTPRequestHandler,
        content: bytes,
        status: int = 200,
        headers: dict[str, str] | None = None,
        length: int | None = None,
    ) -> None:
        request.send_response(status)
        for name, value in (headers or {}).items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(content) if length is None else length))
        request.end_headers()
        request.wfile.write(content)


@pytest.fixture
def hub(override_settings: Callable[..., Settings]) -> Iterator[Hub]:
    hub = Hub()
    override_settings(hub_endpoint=hub.url, hub_token="hf_secret")
    yield hub
    # huggingface_hub keeps its connections for the life of the process.
    from huggingface_hub import close_session

    close_session()
    hub.close()


@pytest.fixture
def root(override_settings: Callable[..., Settings], tmp_path: Path) -> Path:
    root = tmp_path / "imports"
    root.mkdir()
    override_settings(import_root=root)
    return root


def ask(client: TestClient, uri: str) -> tuple[int, dict]:
    answer = client.post("/v1/models", json={"uri": uri})
    return answer.status_code, answer.json()


def nothing_left(client: TestClient, settings: Settings) -> bool:
    staged = [p for p in (settings.data_dir / "staging").rglob("*") if p.is_file()]
    return not staged and not list(get_store().iter_blobs()) and not client.get("/v1/models").json()["items"]


def test_a_model_is_imported_from_the_hub(hub: Hub, client: TestClient) -> None:
    files = sharded_llama_files() | {
        "onnx/model.onnx": b"x",
        "pytorch_model.bin": b"\x80\x02",
        "README.md": b"# Hi",
    }
    hub.repos["org/tiny"] = files
    status, model = ask(client, "hf://org/tiny")
    assert status == 201, model
    assert (model["name"], model["source"]) == ("tiny", f"hf://org/tiny@{SHA}")
    assert {f["path"] for f in model["files"]} == set(sharded_llama_files()) | {"README.md"}
    assert {entry["path"] for entry in model["scan"]} == {"onnx/model.onnx", "pytorch_model.bin"}
    assert not any("pytorch_model.bin" in path or "onnx" in path for path, _ in hub.seen)


def test_the_token_goes_to_the_hub_and_nowhere_else(hub: Hub, client: TestClient) -> None:
    hub.repos["org/tiny"] = llama_files()
    assert ask(client, "hf://org/tiny@main")[0] == 201
    tokens = {path.startswith("/cdn/"): token for path, token in hub.seen}
    assert tokens == {False: "Bearer hf_secret", True: None}


def test_one_of_several_ggufs_can_be_named(hub: Hub, client: TestClient) -> None:
    hub.repos["org/quants"] = {"a-Q8_0.gguf": gguf(), "b-Q4_0.gguf": gguf("gemma"), "README.md": b"#"}
    status, problem = ask(client, "hf://org/quants")
    assert (status, problem["code"]) == (422, "weights_ambiguous")
    status, model = ask(client, "hf://org/quants?file=a-Q8_0.gguf")
    assert (status, model["format"]) == (201, "gguf")


def test_a_download_that_breaks_is_taken_up_where_it_broke(hub: Hub, client: TestClient) -> None:
    hub.repos["org/tiny"] = llama_files()
    hub.cut_after = 1000
    status, model = ask(client, "hf://org/tiny")
    assert status == 201, model


def test_other_bytes_than_the_hub_announced_are_refused(
    hub: Hub, client: TestClient, settings: Settings
) -> None:
    files = llama_files()
    hub.repos["org/tiny"] = files
    weights = files["model.safetensors"]
    for lie, code in (
        (weights[:-1] + b"!", "hash_mismatch"),
        (weights + b"!", "hash_mismatch"),
        (weights[:-1], "truncated"),
    ):
        hub.lies = {"model.safetensors": lie}
        status, problem = ask(client, "hf://org/tiny")
        assert (status, problem["code"]) == (422, code)
    assert nothing_left(client, settings)


def test_a_repository_with_pickles_alone_is_refused_before_they_are_fetched(
    hub: Hub, client: TestClient
) -> None:
    hub.repos["org/old"] = {"config.json": b"{}", "pytorch_model.bin": b"\x80\x02"}
    status, problem = ask(client, "hf://org/old")
    assert (status, problem["code"]) == (422, "unsafe_pickle")
    assert len(hub.seen) == 1


def test_a_name_the_hub_does_not_know_is_not_found(hub: Hub, client: TestClient) -> None:
    status, problem = ask(client, "hf://org/none")
    assert (status, problem["code"]) == (404, "not_found")


def test_a_model_over_the_limit_is_refused_before_it_is_fetched(
    hub: Hub, override_settings: Callable[..., Settings], request: pytest.FixtureRequest
) -> None:
    override_settings(max_upload_bytes=1000)
    hub.repos["org/tiny"] = llama_files()
    status, problem = ask(request.getfixturevalue("client"), "hf://org/tiny")
    assert (status, problem["code"]) == (413, "payload_too_large")
    assert len(hub.seen) == 1


def test_a_hub_that_is_away_is_no_fault_of_the_model(
    override_settings: Callable[..., Settings], request: pytest.FixtureRequest
) -> None:
    override_settings(hub_endpoint="http://127.0.0.1:9")
    status, problem = ask(request.getfixturevalue("client"), "hf://org/tiny")
    assert (status, problem["code"]) == (503, "hub_unavailable")


def test_a_folder_below_the_import_root_is_imported(root: Path, client: TestClient) -> None:
    (root / "tiny model").mkdir()
    for name, content in (llama_files() | {"train.py": b""}).items():
        (root / "tiny model" / name).write_bytes(content)
    status, model = ask(client, (root / "tiny model").as_uri())
    assert status == 201, model
    assert {f["path"] for f in model["files"]} == set(llama_files())
    assert (root / "tiny model" / "model.safetensors").stat().st_mode & 0o200


def test_an_archive_below_the_import_root_is_imported(root: Path, client: TestClient) -> None:
    (root / "tiny.zip").write_bytes(zipped(llama_files()))
    assert ask(client, (root / "tiny.zip").as_uri())[0] == 201


def test_links_are_followed_inside_the_root_and_not_out_of_it(
    root: Path, client: TestClient, settings: Settings
) -> None:
    blobs, snapshot = root / "blobs", root / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    for name, content in llama_files().items():
        (blobs / name).write_bytes(content)
        (snapshot / name).symlink_to(f"../blobs/{name}")
    assert ask(client, snapshot.as_uri())[0] == 201
    outside = root.parent / "secret.json"
    outside.write_text("{}")
    (snapshot / "evil.json").symlink_to(outside)
    status, problem = ask(client, snapshot.as_uri())
    assert (status, problem["code"]) == (422, "import_refused")


@pytest.mark.parametrize(
    "path", ["", "/..", "/../secret.zip", "/%2e%2e/secret.zip", "/none", "/fifo", "/link"]
)
def test_what_lies_outside_the_root_is_refused_like_what_is_missing(
    root: Path, client: TestClient, settings: Settings, path: str
) -> None:
    (root.parent / "secret.zip").write_bytes(zipped(llama_files()))
    (root / "link").symlink_to(root.parent / "secret.zip")
    os.mkfifo(root / "fifo")
    status, problem = ask(client, root.as_uri() + path)
    assert status == 422
    assert problem["code"] == "import_refused"
    assert nothing_left(client, settings)


@pytest.mark.parametrize(
    "uri",
    [
        "http://example.org/m",
        "file://host/m",
        "hf://@main",
        "hf://a/b/c/d",
        "hf://a/b@../x",
        "file:///etc/passwd",
        "hf://a b/c",
    ],
)
def test_what_names_nothing_importable_is_refused(client: TestClient, uri: str) -> None:
    status, problem = ask(client, uri)
    assert (status, problem["code"]) == (422, "import_refused")
