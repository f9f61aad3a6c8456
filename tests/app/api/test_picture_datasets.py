"""Picture files in archives over HTTP: what is kept of them, what is refused, and which models they suit."""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from model_files import zipped

from app.settings import Settings
from app.spec.base import Family
from app.spec.image_set import MAX_PICTURE_PIXELS
from app.storage import get_store

AddModel = Callable[..., str]
AddDataset = Callable[..., str]


def png(width: int = 4, height: int = 3, rest: bytes = b"pixels") -> bytes:
    """As far as intake looks: nothing is decoded there."""
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sII", 13, b"IHDR", width, height) + rest


def bmp(width: int, height: int) -> bytes:
    return b"BM" + bytes(12) + struct.pack("<Iii", 40, width, height) + bytes(24)


def tarred(files: dict[str, bytes], mode: str) -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode=mode) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return target.getvalue()


FILES = {
    "set/dog/1.PNG": png(rest=b"one"),
    "set/cat/no ending": png(9, 2, rest=b"two" * 50),
    "set/cat/ü.bmp": bmp(5, -7),
    "set/README.md": b"about",
    "set/cat/.DS_Store": b"junk",
    "__MACOSX/set/cat/._a.png": b"junk",
}
PACKED = {"zip": zipped(FILES), "tar": tarred(FILES, "w"), "tar.gz": tarred(FILES, "w:gz")}


def put(client: TestClient, content: bytes) -> dict[str, Any]:
    answer = client.put("/v1/datasets/content", params={"name": "pictures"}, content=content)
    assert answer.status_code == 201, answer.text
    return answer.json()


def kept(dataset: dict[str, Any]) -> dict[str, Any]:
    """What safetensors' own reader makes of the file: pictures and labels by name, and the order."""
    load_file = pytest.importorskip("safetensors.numpy").load_file
    arrays = load_file(get_store().path_of(dataset["sha256"]))
    names = arrays["names"].tobytes().decode().split("\n")
    pictures = [part.tobytes() for part in np.split(arrays["pictures"], arrays["ends"][:-1])]
    labels = arrays["labels"].tolist() if "labels" in arrays else [None] * len(names)
    assert sorted(arrays["order"]) == list(range(len(names)))
    return dict(zip(names, zip(pictures, labels, strict=True), strict=True))


@pytest.mark.parametrize("form", PACKED)
def test_pictures_are_kept_as_they_are_with_their_folders_as_labels(client: TestClient, form: str) -> None:
    dataset = put(client, PACKED[form])
    assert dataset["format"] == form
    assert dataset["images"] == {
        "images": 3, "height": 2, "width": 4, "channels": None, "layout": "files", "largest_label": 1,
        "label_names": ["cat", "dog"],
    }  # fmt: skip
    assert kept(dataset) == {
        "set/dog/1.PNG": (FILES["set/dog/1.PNG"], 1),
        "set/cat/no ending": (FILES["set/cat/no ending"], 0),
        "set/cat/ü.bmp": (FILES["set/cat/ü.bmp"], 0),
    }
    assert client.get(dataset["url"]).json() == dataset


def test_folders_named_by_numbers_are_those_numbers(client: TestClient) -> None:
    dataset = put(client, zipped({"10/a.png": png(), "2/a.png": png(), "007/a.png": png()}))
    assert (dataset["images"]["largest_label"], dataset["images"]["label_names"]) == (10, None)
    assert [label for _, label in kept(dataset).values()] == [10, 2, 7]


@pytest.mark.parametrize("files", [{"a.png": png(), "b.png": png()}, {"all/a.png": png()}])
def test_one_folder_is_a_set_without_labels(client: TestClient, files: dict[str, bytes]) -> None:
    dataset = put(client, zipped(files))
    assert (dataset["images"]["largest_label"], dataset["images"]["label_names"]) == (None, None)
    assert [label for _, label in kept(dataset).values()] == [None] * len(files)


EDGE = int(MAX_PICTURE_PIXELS**0.5) + 1


@pytest.mark.parametrize(
    ("files", "code", "words"),
    [
        ({"a.png": png(), "cat/b.png": png()}, "images_invalid", "different depths, in (none), cat"),
        ({"train/a/1.png": png(), "test/a/1.png": png()}, "images_invalid", "different depths, in test/a, train/a"),
        ({"README.md": b"no pictures"}, "images_invalid", "no pictures in the archive"),
        ({"a.gif": b"GIF89a" + bytes(50)}, "picture_invalid", "a.gif is no JPEG, PNG, WebP or BMP"),
        ({"a.png": b""}, "picture_invalid", "a.png is no JPEG"),
        ({"a.svg": b"<svg/>"}, "picture_invalid", "a.svg is no JPEG"),
        ({"a.png": png()[:20]}, "picture_invalid", "broken header"),
        ({"a.png": png(EDGE, EDGE)}, "picture_invalid", f"{EDGE} by {EDGE} pixels"),
        ({"a.png": png(0, 5)}, "picture_invalid", "0 by 5 pixels"),
        ({"a.bmp": bmp(-4, 4)}, "picture_invalid", "broken header"),
        ({"a.jpg": b"\xff\xd8\xff\xe0\x00\x01" + bytes(90)}, "picture_invalid", "broken header"),
        ({"a.jpg": b"\xff\xd8\xff\xda" + bytes(90)}, "picture_invalid", "broken header"),
        ({"a.jpg": b"\xff\xd8" + b"\xff" * 2**21 + b"\xc0\x00\x11\x08\x00\x04\x00\x04\x03" + np.random.default_rng(0).bytes(2**16)}, "picture_invalid", "broken header"),
        ({"a.jpg": b"\xff\xd8\xff\xe0\xff\xff" + bytes(90)}, "picture_invalid", "broken header"),
        ({"a.webp": b"RIFF" + bytes(4) + b"WEBPVP8 " + bytes(40)}, "picture_invalid", "broken header"),
        ({"A.png": png(), "a.PNG": png()}, "archive_duplicate", "twice"),
        ({"../a.png": png()}, "archive_unsafe_path", "leads out"),
    ],
)  # fmt: skip
def test_what_is_no_set_of_pictures_gets_its_code_and_leaves_nothing_behind(
    client: TestClient, settings: Settings, files: dict[str, bytes], code: str, words: str
) -> None:
    content = zipped(files)
    answer = client.put("/v1/datasets/content", params={"name": "a.zip"}, content=content)
    assert (answer.status_code, answer.json()["code"]) == (422, code), answer.text
    assert words in answer.json()["detail"]
    assert answer.json()["hint"]
    assert not list(get_store().iter_blobs())
    assert not [p for p in (settings.data_dir / "staging").rglob("*") if p.is_file()]


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (PACKED["tar.gz"][:60], "truncated"),
        (tarred({"a.png": png(rest=bytes(2**25))}, "w:gz"), "archive_bomb"),
        (gzip.compress(b'{"text": "not in an archive"}' * 50), "archive_corrupt"),
    ],
    ids=["truncated", "bomb", "no archive"],
)
def test_a_gzip_that_is_no_archive_of_pictures_is_refused(
    client: TestClient, content: bytes, code: str
) -> None:
    answer = client.put("/v1/datasets/content", params={"name": "a.tar.gz"}, content=content)
    assert (answer.status_code, answer.json()["code"]) == (422, code)


@pytest.mark.parametrize(
    ("images", "names", "fault"),
    [
        ({"label_names": ["a", "b"], "largest_label": 1}, ["B", "A", "c", "d", "e"], None),
        ({"label_names": list("vwxyz"), "largest_label": 4}, ["B", "A", "c", "d", "e"], None),
        ({"label_names": list("vwxyz"), "largest_label": 4}, None, None),
        ({"label_names": ["a", "x"], "largest_label": 1}, ["B", "A", "c", "d", "e"], "no class called 'x'"),
        ({"label_names": ["v", "w"], "largest_label": 1}, ["B", "A", "c", "d", "e"], "no class called 'v', 'w'"),
        ({"label_names": None, "largest_label": 5}, None, "go up to 5"),
    ],
)  # fmt: skip
def test_folders_are_classes_of_the_model_by_name_or_all_in_order(
    client: TestClient,
    add_model: AddModel,
    add_dataset: AddDataset,
    images: dict[str, Any],
    names: list[str] | None,
    fault: str | None,
) -> None:
    facts = {"images": 50, "height": 9, "width": 9, "channels": None, "layout": "files"} | images
    source = {"dataset": add_dataset(**facts)}
    spec = {
        "steps": [{"technique": "quantize.onnx", "method": "qdq"}],
        "calibration": source,
        "evaluation": {"text": source},
        "acceptance": {"max_accuracy_drop": 0.01},
    }
    model = add_model(
        Family.IMAGE_CLASSIFIER, architecture="ResNetForImageClassification", num_labels=5, label_names=names
    )
    answer = client.post("/v1/jobs", json={"model": model, "spec": spec})
    if fault is None:
        assert answer.status_code == 202, answer.text
    else:
        (found,) = answer.json()["errors"]
        assert found["pointer"] == "/spec/evaluation/text/dataset"
        assert fault in found["detail"]
