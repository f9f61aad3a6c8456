"""1 GiB up in parts and down again over HTTP, against `cp` and `openssl dgst -sha256` on the same disk.

Usage: .venv/bin/python benchmarks/upload.py [--rounds 5] [--mebibytes 1024] [--directory DIRECTORY]

Starts the real server on a data directory of its own. Each round times, in turns and after a sync, `cp` then `openssl`
of the file, the upload (create, parts one after the other, complete: the server has then checked the sha256 of the
whole and synced it), and the same with a Content-Digest for each part. The file is then made a model and downloaded,
in turns with `cp`. The client runs on the same machine and cores as the server, and sends by sendfile.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import http.client
import json
import math
import os
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from figures import Figures

ROOT = Path(__file__).parents[1]
MIB = 2**20
BLOCK_BYTES = MIB
MIN_SPEED = 0.6
MAX_GROWTH_MIB = 64
HIDDEN = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mebibytes", type=int, default=1024)
    parser.add_argument("--directory", type=Path, help="where to work; on the disk that is to be measured")
    args = parser.parse_args()
    figures = Figures()
    with tempfile.TemporaryDirectory(dir=args.directory) as name:
        directory = Path(name)
        weights = write_model(directory, args.mebibytes * MIB)
        with running_server(directory / "data") as (port, pid):
            measure(figures, Client(port, pid), weights, args.rounds)
    figures.exit()


def measure(figures: Figures, client: Client, weights: Path, rounds: int) -> None:
    client.upload(weights.parent / "config.json")
    before = memory(client.pid, "VmRSS")
    speeds, digested, rates = [], [], []
    for _ in range(rounds):
        reference = seconds(lambda: copy_and_digest(weights))
        taken = seconds(lambda: client.discard(client.upload(weights)))
        with_digests = seconds(lambda: client.discard(client.upload(weights, digests=True)))
        speeds.append(reference / taken)
        digested.append(reference / with_digests)
        rates.append(weights.stat().st_size / MIB / taken)
    growth = (memory(client.pid, "VmHWM") - before) / MIB
    speed = statistics.median(speeds)
    peer = f"cp, then openssl dgst -sha256, {rounds} rounds in turns"
    figures.add(
        "upload_speed", speed, "ratio", floor=f">= {MIN_SPEED}", ok=speed >= MIN_SPEED, compared_with=peer
    )
    figures.add(
        "upload_rate", statistics.median(rates), "MiB/s", compared_with="nothing: it depends on the machine"
    )
    figures.add("upload_speed_with_part_digests", statistics.median(digested), "ratio", compared_with=peer)
    figures.add(
        "upload_server_growth", growth, "MiB", floor=f"<= {MAX_GROWTH_MIB}", ok=growth <= MAX_GROWTH_MIB,
        compared_with="the server's RSS before the first large upload; peak during all of them",
    )  # fmt: skip
    measure_download(figures, client, weights, rounds)


def measure_download(figures: Figures, client: Client, weights: Path, rounds: int) -> None:
    files = {name: client.upload(weights.parent / name) for name in ("config.json", weights.name)}
    body = {"files": [{"path": path, "upload": upload} for path, upload in files.items()]}
    model = client.call("POST", "/v1/models", body)
    url = next(file["url"] for file in model["files"] if file["path"] == weights.name)
    target = weights.parent / "copy"
    before = memory(client.pid, "VmRSS")
    speeds = [
        seconds(lambda: copy(weights)) / seconds(lambda: client.download(url, target)) for _ in range(rounds)
    ]
    figures.add("download_speed", statistics.median(speeds), "ratio", compared_with="cp of the same file")
    growth = max(0, memory(client.pid, "VmRSS") - before) / MIB
    figures.add(
        "download_server_growth", growth, "MiB", compared_with="the server's RSS before the first download"
    )


class Client:
    """One keep-alive connection to the server."""

    def __init__(self, port: int, pid: int) -> None:
        self.pid = pid
        self._connection = http.client.HTTPConnection("127.0.0.1", port, blocksize=BLOCK_BYTES)

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        headers = {"Content-Type": "application/json"}
        self._connection.request(method, path, json.dumps(body) if body else None, headers)
        return self._answer()

    def upload(self, path: Path, *, digests: bool = False) -> str:
        """Upload a file in parts and complete it, over a fresh connection. Returns the upload's id."""
        # The server closes one that was idle for a few seconds, as this one may have been.
        self._connection.close()
        upload = self.call("POST", "/v1/uploads", {"name": path.name, "size": path.stat().st_size})
        with path.open("rb", buffering=0) as file:
            for number in range(1, upload["part_count"] + 1):
                length = min(upload["part_bytes"], upload["size"] - file.tell())
                self._send_part(upload, number, file, length, digests=digests)
        done = self.call("POST", upload["urls"]["complete"])
        return str(done["id"])

    def discard(self, upload: str) -> None:
        self.call("DELETE", f"/v1/uploads/{upload}")

    def download(self, url: str, target: Path) -> None:
        self._connection.close()
        self._connection.request("GET", url)
        response = self._connection.getresponse()
        buffer = memoryview(bytearray(BLOCK_BYTES))
        with target.open("wb", buffering=0) as file:
            while count := response.readinto(buffer):
                file.write(buffer[:count])
        if target.stat().st_size != int(response.headers["Content-Length"]):
            raise RuntimeError("the download was cut short")

    def _send_part(
        self, upload: dict[str, Any], number: int, file: Any, length: int, *, digests: bool
    ) -> None:
        self._connection.putrequest("PUT", f"{upload['urls']['self']}/parts/{number}")
        self._connection.putheader("Content-Length", str(length))
        if digests:
            digest = base64.b64encode(digest_ahead(file, length)).decode()
            self._connection.putheader("Content-Digest", f"sha-256=:{digest}:")
        self._connection.endheaders()
        # Zero-copy, so that the client takes as little as it can of the cores it shares with the server.
        at = file.tell()
        self._connection.sock.sendfile(file, at, length)
        file.seek(at + length)
        self._answer()

    def _answer(self) -> Any:
        response = self._connection.getresponse()
        content = response.read()
        if response.status >= 300:
            raise RuntimeError(f"{response.status}: {content.decode()}")
        return json.loads(content) if content else None


def digest_ahead(file: Any, length: int) -> bytes:
    """sha256 of the next `length` bytes; the file is left where it was."""
    start = file.tell()
    digest = hashlib.sha256()
    while length:
        block = file.read(min(BLOCK_BYTES, length))
        digest.update(block)
        length -= len(block)
    file.seek(start)
    return digest.digest()


def copy_and_digest(path: Path) -> None:
    copy(path)
    subprocess.run(["openssl", "dgst", "-sha256", path], check=True, capture_output=True)


def copy(path: Path) -> None:
    subprocess.run(["cp", path, copy_of(path)], check=True)


def copy_of(path: Path) -> Path:
    return path.parent / "copy"


def seconds(work: Callable[[], None]) -> float:
    """Seconds that work takes, once what others wrote is on the disk."""
    os.sync()
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def memory(pid: int, field: str) -> int:
    """Bytes of a field of /proc/<pid>/status."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field}")


def write_model(directory: Path, size: int) -> Path:
    """A llama whose embedding makes up nearly all of `size` bytes, of random bf16."""
    vocabulary = size // (2 * HIDDEN) - 16
    shapes = {
        "model.embed_tokens.weight": (vocabulary, HIDDEN),
        "model.layers.0.self_attn.q_proj.weight": (HIDDEN, 8),
    }
    header, at = {}, 0
    for name, shape in shapes.items():
        end = at + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}
        at = end
    raw = json.dumps(header).encode()
    config = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN, "num_hidden_layers": 1,
        "vocab_size": vocabulary, "max_position_embeddings": 128,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    weights = directory / "model.safetensors"
    with weights.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for start in range(0, at, BLOCK_BYTES):
            file.write(os.urandom(min(BLOCK_BYTES, at - start)))
    return weights


@contextmanager
def running_server(data_dir: Path) -> Iterator[tuple[int, int]]:
    """The API on a free port, with a migrated database: port and process id."""
    data_dir.mkdir()
    environment = os.environ | {"MODELPRESS_DATA_DIR": str(data_dir), "MODELPRESS_MIN_FREE_DISK_BYTES": "0"}
    subprocess.run(
        [sys.executable, "-m", "alembic", "upgrade", "head"],
        cwd=ROOT,
        env=environment,
        check=True,
        capture_output=True,
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--port", str(port), "--loop", "uvloop", "--http", "httptools", "--no-access-log"]
    server = subprocess.Popen(
        [sys.executable, "-m", "uvicorn", "app.main:app", *options],
        cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        wait_until_up(port)
        yield port, server.pid
    finally:
        server.terminate()
        server.wait()


def wait_until_up(port: int) -> None:
    for _ in range(300):
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except ConnectionRefusedError:
            time.sleep(0.1)
        else:
            return
    raise RuntimeError("the server does not come up")


if __name__ == "__main__":
    main()
