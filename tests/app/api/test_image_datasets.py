"""Datasets of images over HTTP: what is accepted, what it becomes, what is refused."""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from model_files import safetensors, safetensors_header, zipped

from app.settings import Settings
from app.storage import get_store

IMAGES = np.arange(4 * 6 * 5 * 3, dtype=np.uint8).reshape(4, 6, 5, 3)
LABELS = np.asarray([0, 2, 1, 2])


def npz(*, compress: bool = False, **arrays: Any) -> bytes:
    target = io.BytesIO()
    (np.savez_compressed if compress else np.savez)(target, **arrays)
    return target.getvalue()


def npy(array: np.ndarray[Any, Any]) -> bytes:
    target = io.BytesIO()
    np.save(target, array)
    return target.getvalue()


def npy_with(header: str, data: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + data


def put(client: TestClient, content: bytes, name: str = "a.npz") -> dict[str, Any]:
    answer = client.put("/v1/datasets/content", params={"name": name}, content=content)
    assert answer.status_code == 201, answer.text
    return answer.json()


def kept(dataset: dict[str, Any], directory: Path) -> dict[str, np.ndarray[Any, Any]]:
    """What safetensors' own reader makes of the file."""
    load_file = pytest.importorskip("safetensors.numpy").load_file
    return load_file(get_store().path_of(dataset["sha256"]))


@pytest.mark.parametrize("names", [("images", "labels"), ("x", "y")])
@pytest.mark.parametrize("compress", [False, True])
def test_an_npz_becomes_safetensors(
    client: TestClient, tmp_path: Path, names: tuple[str, str], compress: bool
) -> None:
    dataset = put(client, npz(compress=compress, **dict(zip(names, (IMAGES, LABELS), strict=True))))
    assert dataset["format"] == "npz"
    assert dataset["images"] == {
        "images": 4, "height": 6, "width": 5, "channels": 3, "layout": "NHWC", "largest_label": 2, "label_names": None,
    }  # fmt: skip
    arrays = kept(dataset, tmp_path)
    assert np.array_equal(arrays["images"], IMAGES)
    assert np.array_equal(arrays["labels"], LABELS)
    assert client.get(dataset["url"]).json() == dataset


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int32, np.uint64])
def test_labels_of_any_integers_become_int64(client: TestClient, tmp_path: Path, dtype: Any) -> None:
    dataset = put(client, npz(x=IMAGES, y=LABELS.astype(dtype)[:, None]))
    labels = kept(dataset, tmp_path)["labels"]
    assert labels.dtype == np.int64
    assert np.array_equal(labels, LABELS)


def test_channels_may_come_first_and_labels_may_be_missing(client: TestClient, tmp_path: Path) -> None:
    dataset = put(client, npz(images=IMAGES.transpose(0, 3, 1, 2).copy()))
    assert (dataset["images"]["layout"], dataset["images"]["largest_label"]) == ("NCHW", None)
    assert kept(dataset, tmp_path)["images"].shape == (4, 3, 6, 5)


def test_safetensors_are_kept_without_what_else_is_in_them(client: TestClient, tmp_path: Path) -> None:
    save = pytest.importorskip("safetensors.numpy").save
    content = save({"images": IMAGES, "other": np.zeros(7, np.float32), "labels": LABELS})
    dataset = put(client, content, "set.safetensors")
    assert dataset["format"] == "safetensors"
    arrays = kept(dataset, tmp_path)
    assert arrays.keys() == {"images", "labels"}
    assert np.array_equal(arrays["images"], IMAGES)
    assert np.array_equal(arrays["labels"], LABELS)


_HEADER = "{'descr': '|u1', 'fortran_order': False, 'shape': (1, 2, 2, 3)}"


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (npz(pictures=IMAGES), "images_invalid"),
        (npz(images=IMAGES, x=IMAGES), "images_invalid"),
        (npz(x=IMAGES.astype(np.float32)), "images_invalid"),
        (npz(x=IMAGES[:, :, :, 0]), "images_invalid"),
        (npz(x=IMAGES[:0]), "images_invalid"),
        (npz(x=np.zeros((2, 4, 4, 2), np.uint8)), "images_invalid"),
        (npz(x=np.zeros((2, 3, 4, 3), np.uint8)), "images_invalid"),
        (npz(x=np.zeros((1, 1, 3000, 3), np.uint8)), "images_invalid"),
        (npz(x=np.asfortranarray(IMAGES)), "images_invalid"),
        (npz(x=IMAGES, y=LABELS[:3]), "images_invalid"),
        (npz(x=IMAGES, y=LABELS - 1), "images_invalid"),
        (npz(x=IMAGES, y=LABELS + 2**40), "images_invalid"),
        (npz(x=IMAGES, y=LABELS.astype(float)), "images_invalid"),
        (npz(x=IMAGES, y=LABELS.astype(">i4")), "images_invalid"),
        (npz(x=IMAGES, y=np.asarray([print, 1, 2, 3], dtype=object)), "images_invalid"),
        (npz(x=np.zeros((100, 256, 256, 3), np.uint8), compress=True), "archive_bomb"),
        (zipped({"x.npy": npy(IMAGES)[:-1]}), "truncated"),
        (zipped({"x.npy": npy(IMAGES) + b"0"}), "images_invalid"),
        (zipped({"x.npy": b"\x93NUMPY\x07\x00" + bytes(100)}), "images_invalid"),
        (zipped({"x.npy": npy_with("__import__('os').abort()", bytes(12))}), "images_invalid"),
        (zipped({"x.npy": npy_with("(" * 9000, bytes(12))}), "images_invalid"),
        (zipped({"x.npy": npy_with(_HEADER.replace("1,", "-1,"), bytes(12))}), "images_invalid"),
        (zipped({"x.npy": npy_with(_HEADER.replace("1,", "10**12,"), bytes(12))}), "images_invalid"),
        (zipped({"x.npy": npy_with(_HEADER.replace("1,", "1000000000,"), bytes(12))}), "images_invalid"),
        (zipped({"x.npy": npy_with(_HEADER.replace("'|u1'", "[('a', '|O')]"), bytes(12))}), "images_invalid"),
        (npz(x=IMAGES)[:-100], "truncated"),
        (safetensors(safetensors_header({"images": (2, 4, 4, 3)})), "images_invalid"),
        (safetensors(safetensors_header({"images": (2, 4, 4, 3)}, "U8", 1))[:-1], "truncated"),
    ],
)
def test_what_is_no_set_of_images_gets_its_code_and_leaves_nothing_behind(
    client: TestClient, settings: Settings, content: bytes, code: str
) -> None:
    answer = client.put("/v1/datasets/content", params={"name": "a.npz"}, content=content)
    assert (answer.status_code, answer.json()["code"]) == (422, code), answer.text
    assert answer.json()["hint"]
    assert not list(get_store().iter_blobs())
    assert not [p for p in (settings.data_dir / "staging").rglob("*") if p.is_file()]
    assert client.get("/v1/datasets").json()["items"] == []


def test_the_header_that_is_written_starts_on_a_boundary_of_eight_bytes(client: TestClient) -> None:
    raw = get_store().path_of(put(client, npz(x=IMAGES, y=LABELS))["sha256"]).read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    assert length % 8 == 0
    assert json.loads(raw[8 : 8 + length])["__metadata__"] == {"layout": "NHWC"}
