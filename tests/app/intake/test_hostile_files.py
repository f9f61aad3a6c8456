"""Pickles that run a command and call home, in every container there is: none is opened, and each gets a clear problem."""

from __future__ import annotations

import io
import json
import socket
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from model_files import llama_files, safetensors, tarred, zipped
from test_refused_models import leftovers

from app.settings import Settings


class Bait:
    """What a payload would touch: a file, and a listener on loopback."""

    def __init__(self, directory: Path, listener: socket.socket) -> None:
        self.file = directory / "planted"
        self._listener = listener
        port = listener.getsockname()[1]
        command = f"touch {self.file}; echo > /dev/tcp/127.0.0.1/{port}"
        self.pickle = b"cposix\nsystem\n(S'bash -c \"" + command.encode() + b"\"'\ntR."

    def untouched(self) -> bool:
        """No file was made, and nobody called."""
        self._listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            self._listener.accept()
        return not self.file.exists()


@pytest.fixture
def bait(tmp_path: Path) -> Iterator[Bait]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield Bait(tmp_path, listener)


def torch_file(pickle: bytes) -> bytes:
    return zipped({"archive/data.pkl": pickle, "archive/version": b"3", "archive/data/0": bytes(64)})


def npy(pickle: bytes) -> bytes:
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + pickle


def folder(**files: bytes) -> bytes:
    """A model whose weights are in these files alone."""
    return zipped({"config.json": llama_files()["config.json"]} | files)


MODELS: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "model.pkl": ("unsafe_pickle", lambda pickle: b"\x80\x04" + pickle),
    "legacy.pt": ("unsafe_pickle", lambda pickle: b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02" + pickle),
    "of-protocol-0.bin": ("unsupported_format", lambda pickle: pickle),
    "model.pt": ("unsafe_pickle", torch_file),
    "script.pt": (
        "unsafe_pickle",
        lambda pickle: zipped({"m/data.pkl": pickle, "m/constants.pkl": pickle, "m/code/__torch__.py": b"open('/etc/passwd')"}),
    ),
    "program.pt2": (
        "unsafe_pickle",
        lambda pickle: zipped({"p/models/model.json": b"{}", "p/data/sample_inputs/model.pt": torch_file(pickle)}),
    ),
    "pytorch_model.bin in a zip": ("unsafe_pickle", lambda pickle: folder(**{"pytorch_model.bin": torch_file(pickle)})),
    "weights.npz in a zip": ("weights_missing", lambda pickle: folder(**{"weights.npz": zipped({"w.npy": npy(pickle)})})),
    "a zip in a zip": ("weights_missing", lambda pickle: folder(**{"model.zip": torch_file(pickle)})),
    "weights.npy": ("unsupported_format", npy),
    "lambda.h5": ("unsupported_format", lambda pickle: b"\x89HDF\r\n\x1a\n" + pickle),
    "pickle named model.safetensors": ("header_invalid", lambda pickle: folder(**{"model.safetensors": pickle})),
    "pickle in a header": (
        "header_invalid",
        lambda pickle: folder(**{"model.safetensors": safetensors({"__metadata__": {}, "x": pickle.decode()}, b"")}),
    ),
    "pickle.tar.gz": ("unsafe_pickle", lambda pickle: tarred({"pytorch_model.bin": pickle, "config.json": b"{}"}, mode="w:gz")),
}  # fmt: skip

DATASETS: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "images.npz": ("images_invalid", lambda pickle: zipped({"images.npy": npy(pickle)})),
    "labels.npz": ("images_invalid", lambda pickle: zipped({"images.npy": sound_images(), "labels.npy": npy(pickle)})),
    "images.npy": ("unsupported_format", npy),
    "text.txt": ("unsupported_format", lambda pickle: b"\x80\x04" + pickle),
    "text.jsonl": ("text_invalid", lambda pickle: pickle),
    "text.parquet": ("unsupported_format", lambda pickle: b"PAR1" + pickle),
}  # fmt: skip


def sound_images() -> bytes:
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (1, 3, 4, 4), }".ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(48)


def refusal(client: TestClient, resource: str, name: str, content: bytes) -> str:
    answer = client.put(f"/v1/{resource}/content", params={"name": name}, content=content)
    problem = answer.json()
    is_clear = answer.status_code == 422 and problem.get("detail") and problem.get("hint")
    return problem["code"] if is_clear else f"answer {answer.status_code}: {problem}"


@pytest.mark.parametrize("resource", ["models", "datasets"])
def test_pickles_in_every_container_are_refused_unopened(
    resource: str, client: TestClient, settings: Settings, bait: Bait
) -> None:
    cases = MODELS if resource == "models" else DATASETS
    found = {name: refusal(client, resource, name, make(bait.pickle)) for name, (_, make) in cases.items()}
    assert found == {name: code for name, (code, _) in cases.items()}
    assert bait.untouched()
    assert leftovers(settings) == []
    assert client.get("/v1/health/live").status_code == 200


def test_a_pickle_beside_sound_weights_is_left_out(client: TestClient, bait: Bait) -> None:
    evil = {
        "pytorch_model.bin": torch_file(bait.pickle),
        "evil.py": b"import os",
        "optimizer.pt": bait.pickle,
    }
    answer = client.put(
        "/v1/models/content", params={"name": "m"}, content=zipped(llama_files() | evil)
    ).json()
    assert {entry["path"] for entry in answer["scan"]} == set(evil)
    assert not {file["path"] for file in answer["files"]} & set(evil)
    assert bait.untouched()


def quine_of_entries(count: int) -> bytes:
    """A zip whose entries all have the same bytes: a thousand times as much comes out as lies in it."""
    whole = zipped({"config.json": bytes(2**20)}, compress=True)
    start = whole.index(b"PK\x01\x02")
    central = whole[start : whole.index(b"PK\x05\x06")]
    renamed = [central.replace(b"config.json", b"c%06d.json" % n) for n in range(count)]
    local = whole[:start].replace(b"config.json", b"c000000.json")
    renamed = [entry.replace(b"\x0b\x00", b"\x0c\x00", 1) for entry in renamed]
    local = local.replace(b"\x0b\x00", b"\x0c\x00", 1)
    directory = b"".join(renamed)
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, count, count, len(directory), len(local), 0)
    return local + directory + end


def test_a_zip_whose_entries_share_their_bytes_is_a_bomb_or_broken(
    client: TestClient, settings: Settings
) -> None:
    code = refusal(client, "models", "bomb.zip", quine_of_entries(900))
    assert code in ("archive_bomb", "archive_corrupt")
    assert leftovers(settings) == []


def test_archives_in_archives_are_not_unpacked(client: TestClient, settings: Settings) -> None:
    content = bytes(10 * 2**20)
    for depth in range(6):
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
            for copy in range(8):
                archive.writestr(f"{depth}-{copy}.zip", content)
        content = packed.getvalue()
    assert refusal(client, "models", "nested.zip", content) == "unsupported_format"
    assert leftovers(settings) == []


def test_a_template_is_kept_as_text_and_never_rendered(client: TestClient, bait: Bait) -> None:
    """The API shows no template, and the engine copies it; a client that renders it must do so in Jinja's sandbox."""
    attack = "''.__class__.__mro__[1].__subclasses__()[0].__init__.__globals__['os'].system('touch "
    template = "{{ " + attack + f"{bait.file}" + "') }}"
    files = llama_files() | {
        "tokenizer_config.json": json.dumps({"chat_template": template}).encode(),
        "chat_template.jinja": template.encode(),
    }
    answer = client.put("/v1/models/content", params={"name": "m"}, content=zipped(files))
    assert answer.status_code == 201
    model: Any = client.get(f"/v1/models/{answer.json()['id']}").json()
    assert "chat_template.jinja" in {file["path"] for file in model["files"]}
    assert bait.untouched()
