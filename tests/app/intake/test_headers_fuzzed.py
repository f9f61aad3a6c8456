"""Whatever bytes the readers of uploaded files are fed, they accept them or raise IntakeError: nothing else."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fuzzing import BOUNDED, CORPUS, JSON, READERS, damaged, feed, onnx_files
from hypothesis import given
from hypothesis import strategies as st
from model_files import gguf, llama_files, llama_shapes, safetensors, safetensors_header, tarred, zipped

from app.intake.read_model import read_model

SHAPES = dict(list(llama_shapes().items())[:3])
IMAGES = {"images": np.zeros((2, 3, 4, 4), np.uint8), "labels": np.zeros(2, np.int64)}
WORDS = sorted({*json.loads(llama_files()["config.json"]), "tie_word_embeddings", "id2label", "num_channels"})
PROCESSOR_WORDS = [
    "do_resize", "size", "resample", "do_center_crop", "crop_size", "crop_pct", "do_rescale", "rescale_factor",
    "do_normalize", "image_mean", "image_std", "image_processor_type",
]  # fmt: skip


def npz(arrays: dict[str, Any], *, compressed: bool = False) -> bytes:
    target = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(target, **arrays)
    return target.getvalue()


def npy(array: Any) -> bytes:
    target = io.BytesIO()
    np.save(target, array)
    return target.getvalue()


WHOLE: dict[str, bytes] = {
    "safetensors": safetensors(safetensors_header(SHAPES)),
    "gguf": gguf(),
    "onnx": onnx_files()["model.onnx"],
    "zip": zipped(llama_files(), compress=True),
    "tar": tarred(llama_files()),
    "tar.gz": tarred(llama_files(), mode="w:gz"),
    "upload": zipped({"archive/data.pkl": b"\x80\x02}q\x00.", "archive/data/0": bytes(64)}),
    "npy": npy(IMAGES["images"]),
    "npz": npz(IMAGES, compressed=True),
    "jsonl": b'{"text": "one\\n\\ntwo"}\n{"text": "\\u00e9"}\n\n',
    "txt": "\ufeffone\r\n\r\ntwo é\n".encode(),
    "config": llama_files()["config.json"],
    "tokenizer_config": b'{"tokenizer_class": "LlamaTokenizer", "added_tokens_decoder": {"0": {"content": "<s>"}}}',
    "preprocessor": onnx_files()["preprocessor_config.json"],
}


def kept_cases() -> list[Any]:
    return [pytest.param(path, id=f"{path.parent.name}-{path.name}") for path in sorted(CORPUS.glob("*/*"))]


@pytest.mark.parametrize("case", kept_cases())
def test_what_once_broke_a_reader(case: Path, tmp_path: Path) -> None:
    feed(case.parent.name, tmp_path, case.read_bytes())


def test_every_reader_is_fed_damaged_files_and_takes_the_whole_ones(tmp_path: Path) -> None:
    assert WHOLE.keys() == READERS.keys()
    for reader in WHOLE.keys() - {"upload"}:
        (tmp_path / "file").write_bytes(WHOLE[reader])
        READERS[reader](tmp_path / "file")


@pytest.mark.parametrize("reader", WHOLE)
def test_damaged_files(reader: str, tmp_path: Path) -> None:
    @BOUNDED
    @given(content=damaged(WHOLE[reader]))
    def check(content: bytes) -> None:
        feed(reader, tmp_path, content)

    check()


@BOUNDED
@given(header=JSON, entry=JSON, offsets=JSON)
def test_safetensors_headers_of_any_json(
    tmp_path_factory: pytest.TempPathFactory, header: Any, entry: Any, offsets: Any
) -> None:
    header = dict(
        safetensors_header(SHAPES), x=entry, y={"dtype": "F32", "shape": header, "data_offsets": offsets}
    )
    feed("safetensors", tmp_path_factory.getbasetemp(), safetensors(json.dumps(header), b"0" * 100))


@BOUNDED
@given(
    values=st.dictionaries(st.text(max_size=30), st.integers(0, 2**32 - 1) | st.text(max_size=9), max_size=5)
)
def test_gguf_with_any_metadata(tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any]) -> None:
    known = {f"llama.{key}": value for key, value in values.items()}
    feed("gguf", tmp_path_factory.getbasetemp(), gguf(metadata=values | known))


@BOUNDED
@given(changes=st.dictionaries(st.sampled_from(WORDS), JSON | st.integers(0, 2**31)))
def test_configs_with_any_values(tmp_path_factory: pytest.TempPathFactory, changes: dict[str, Any]) -> None:
    content = json.dumps(json.loads(WHOLE["config"]) | changes).encode()
    feed("config", tmp_path_factory.getbasetemp(), content)


@BOUNDED
@given(
    changes=st.dictionaries(
        st.sampled_from(PROCESSOR_WORDS), JSON | st.integers(0, 2**31) | st.floats(0, 1) | st.just({"shortest_edge": 8})
    ),
    kind=st.sampled_from(["ViT", "ConvNext", "MobileNetV2"]),
)  # fmt: skip
def test_preprocessors_with_any_values(
    tmp_path_factory: pytest.TempPathFactory, changes: dict[str, Any], kind: str
) -> None:
    said = json.loads(WHOLE["preprocessor"]) | {"image_processor_type": f"{kind}ImageProcessor"} | changes
    feed("preprocessor", tmp_path_factory.getbasetemp(), json.dumps(said).encode())


@BOUNDED
@given(literal=st.recursive(
    st.sampled_from(["1", "-1", "'|u1'", "()", "[]", "{}", "1e999", "b''", "None", "...", "x", "9" * 5000]),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda items: "[" + ",".join(items) + "]"),
        st.lists(inner, max_size=3).map(lambda items: "{" + ",".join(items) + "}"),
        st.tuples(inner, inner).map(lambda pair: "{" + pair[0] + ":" + pair[1] + "}"),
        st.tuples(st.sampled_from("-+~"), st.integers(1, 9000), inner).map(lambda t: t[0] * t[1] + t[2]),
    ),
    max_leaves=6,
), whole=st.booleans())  # fmt: skip
def test_npy_headers_of_any_literal(
    tmp_path_factory: pytest.TempPathFactory, literal: str, whole: bool
) -> None:
    usual = "{'descr': '|u1', 'fortran_order': False, 'shape': "
    text = (literal if whole else usual + literal + "}").encode()[:60_000]
    feed(
        "npy",
        tmp_path_factory.getbasetemp(),
        b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text,
    )


def test_a_sound_model_is_accepted_beside_all_this(tmp_path: Path) -> None:
    for name, content in llama_files().items():
        (tmp_path / name).write_bytes(content)
    assert read_model({path.name: path for path in tmp_path.iterdir()}).facts.parameters
