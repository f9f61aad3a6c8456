"""Everything a model can be refused for: fed in over HTTP, it gets its own code, leaves nothing, and hurts nobody."""

from __future__ import annotations

import gzip
import json
import struct
import tarfile
import zipfile
from collections.abc import Callable
from io import BytesIO
from typing import Any, get_args

import pytest
from fastapi.testclient import TestClient
from model_files import (
    gguf,
    gguf_names,
    llama_files,
    llama_shapes,
    safetensors,
    safetensors_header,
    sharded_llama_files,
    tarred,
    zipped,
)
from sqlalchemy import func, select

from app.db.engine import get_database
from app.db.tables import Model, ModelFile, Upload
from app.intake.refusals import _HINTS, Code
from app.settings import Settings

HEADER = safetensors_header(llama_shapes())


def with_weights(content: bytes) -> bytes:
    return zipped(llama_files() | {"model.safetensors": content})


def with_config(**changes: Any) -> bytes:
    return zipped(llama_files(**changes))


def without(*names: str, **more: bytes) -> bytes:
    return zipped({n: c for n, c in llama_files().items() if n not in names} | more)


def changed(name: str, **entry: Any) -> dict[str, Any]:
    return HEADER | {name: HEADER[name] | entry}


def member(kind: bytes, name: str = "evil", target: str = "/etc/passwd") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def zip_member(name: str, mode: int = 0o100644, content: bytes = b"{}") -> bytes:
    target = BytesIO(zipped(llama_files()))
    with zipfile.ZipFile(target, "a") as archive:
        info = zipfile.ZipInfo(name)
        info.external_attr = mode << 16
        archive.writestr(info, content)
    return target.getvalue()


def encrypted() -> bytes:
    """Sets the flag of encryption in every local and central header."""
    raw = bytearray(zipped(llama_files()))
    for magic, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        start = 0
        while (start := raw.find(magic, start)) >= 0:
            raw[start + at] |= 1
            start += 4
    return bytes(raw)


def twice_in_header() -> bytes:
    raw = json.dumps(HEADER)
    name = '"model.norm.weight": '
    entry = json.dumps(HEADER["model.norm.weight"])
    return safetensors(raw[:-1] + ", " + name + entry + "}", data=bytes(100_000))


def in_two_shards() -> bytes:
    files = sharded_llama_files()
    again = dict(list(llama_shapes().items())[:6])
    return zipped(files | {"model-00001-of-00002.safetensors": safetensors(safetensors_header(again))})


def index_naming(name: str, shard: str) -> bytes:
    files = sharded_llama_files()
    index = json.loads(files["model.safetensors.index.json"])
    index["weight_map"][name] = shard
    return zipped(files | {"model.safetensors.index.json": json.dumps(index).encode()})


def torch_file() -> bytes:
    return zipped({"archive/data.pkl": b"\x80\x02}q\x00.", "archive/data/0": bytes(64)})


BAD: dict[str, tuple[str, Callable[[], bytes]]] = {
    "a pickle alone": ("unsafe_pickle", lambda: b"\x80\x04\x95" + bytes(100)),
    "a PyTorch file": ("unsafe_pickle", torch_file),
    "TorchScript": ("unsafe_pickle", lambda: zipped({"ts/data.pkl": b"", "ts/code/__torch__.py": b"", "ts/constants.pkl": b""})),
    "a torch.export archive": (
        "unsafe_pickle",
        lambda: zipped({"e/models/model.json": b"{}", "e/data/sample_inputs/model.pt": b"", "e/archive_format": b"pt2"}),
    ),
    "a folder with pickles alone": ("unsafe_pickle", lambda: without("model.safetensors", **{"pytorch_model.bin": b"x"})),
    "a safetensors file alone": ("config_missing", lambda: llama_files()["model.safetensors"]),
    "an HDF5 file": ("unsupported_format", lambda: b"\x89HDF\r\n\x1a\n" + bytes(100)),
    "noise": ("unsupported_format", lambda: bytes(range(7, 250)) * 3),
    "an archive of something else": ("unsupported_format", lambda: zipped({"notes.txt": b"hello"})),
    "an empty zip": ("unsupported_format", lambda: zipped({})),
    "a bzip2 archive": ("archive_unsupported", lambda: tarred(llama_files(), mode="w:bz2")),
    "code of its own in the config": ("remote_code", lambda: with_config(auto_map={"AutoModel": "evil.Evil"})),
    "code of its own in the tokenizer": (
        "remote_code",
        lambda: zipped(llama_files() | {"tokenizer_config.json": b'{"auto_map": {"AutoTokenizer": ["e.E", null]}}'}),
    ),
    "an unknown architecture": ("unknown_architecture", lambda: with_config(architectures=["MambaForCausalLM"])),
    "a quantized model": ("quantized_model", lambda: with_config(quantization_config={"quant_method": "gptq"})),
    "integer weights": ("quantized_model", lambda: with_weights(safetensors(safetensors_header(llama_shapes(), "I8", 1)))),
    "no config": ("config_missing", lambda: without("config.json")),
    "no weights": ("weights_missing", lambda: without("model.safetensors")),
    "two sets of weights": (
        "weights_ambiguous",
        lambda: without("model.safetensors", **{"a.safetensors": b"", "b.safetensors": b""}),
    ),
    "a config that is no JSON": ("config_invalid", lambda: zipped(llama_files() | {"config.json": b"{"})),
    "a config that is a list": ("config_invalid", lambda: zipped(llama_files() | {"config.json": b"[]"})),
    "a config nested for ever": ("config_invalid", lambda: zipped(llama_files() | {"config.json": b"[" * 100_000})),
    "a config nested deep": (
        "config_invalid",
        lambda: zipped(llama_files() | {"config.json": b'{"a":' * 50 + b"1" + b"}" * 50}),
    ),
    "a config of 2 MB": ("config_invalid", lambda: with_config(padding=str(list(range(300_000))))),
    "a config with a number of 5000 digits": (
        "config_invalid",
        lambda: zipped(llama_files() | {"config.json": b'{"hidden_size": ' + b"9" * 5000 + b"}"}),
    ),
    "a config with half a surrogate": (
        "config_invalid",
        lambda: zipped(llama_files() | {"config.json": b'{"\\ud800": 1}'}),
    ),
    "a config of a million lists": (
        "config_invalid",
        lambda: zipped(llama_files() | {"tokenizer_config.json": b'{"a":[' + b"[]," * 1_000_001 + b"[]]}"}),
    ),
    "a billion blocks": ("config_mismatch", lambda: with_config(num_hidden_layers=10**9)),
    "a negative number of blocks": ("config_invalid", lambda: with_config(num_hidden_layers=-1)),
    "a hidden size that is no number": (
        "config_invalid",
        lambda: zipped(llama_files() | {"config.json": llama_files()["config.json"].replace(b"64", b"NaN")}),
    ),
    "no hidden size": ("config_invalid", lambda: with_config(hidden_size=None)),
    "an impossible vocabulary": ("config_invalid", lambda: with_config(vocab_size=10**30)),
    "another model's type": ("config_mismatch", lambda: with_config(model_type="bert")),
    "another hidden size": ("config_mismatch", lambda: with_config(hidden_size=32)),
    "more blocks than there are": ("config_mismatch", lambda: with_config(num_hidden_layers=3)),
    "fewer blocks than there are": ("config_mismatch", lambda: with_config(num_hidden_layers=1)),
    "a head that is missing": ("config_mismatch", lambda: with_config(tie_word_embeddings=False)),
    "weights cut short": ("truncated", lambda: with_weights(llama_files()["model.safetensors"][:-10])),
    "a header cut short": ("truncated", lambda: with_weights(llama_files()["model.safetensors"][:100])),
    "weights of five bytes": ("truncated", lambda: with_weights(b"12345")),
    "a header of 2^60 bytes": ("header_invalid", lambda: with_weights(struct.pack("<Q", 2**60) + b"{}")),
    "a header that is no JSON": ("header_invalid", lambda: with_weights(safetensors(b"{nonsense", b""))),
    "a header with no tensor": ("header_invalid", lambda: with_weights(safetensors(b"{}", b""))),
    "bytes behind the last tensor": ("header_invalid", lambda: with_weights(llama_files()["model.safetensors"] + b"x")),
    "a shape that lies": ("header_invalid", lambda: with_weights(safetensors(changed("model.norm.weight", shape=[17])))),
    "a negative size": ("header_invalid", lambda: with_weights(safetensors(changed("model.norm.weight", shape=[-16])))),
    "tensors that overlap": (
        "header_invalid",
        lambda: with_weights(safetensors(changed("model.norm.weight", data_offsets=[0, 64]))),
    ),
    "offsets beyond the file": (
        "header_invalid",
        lambda: with_weights(safetensors(changed("model.norm.weight", data_offsets=[10**9, 10**9 + 64]), bytes(10_000))),
    ),
    "an unknown dtype": ("unsupported_dtype", lambda: with_weights(safetensors(changed("model.norm.weight", dtype="F3")))),
    "a tensor name with a line end": (
        "header_invalid",
        lambda: with_weights(safetensors(safetensors_header(llama_shapes() | {"a\nb": (1,)}))),
    ),
    "a tensor twice in a header": ("duplicate_tensor", lambda: with_weights(twice_in_header())),
    "a tensor in two shards": ("duplicate_tensor", in_two_shards),
    "a shard that is missing": ("shard_missing", lambda: index_naming("x", "model-00009-of-00009.safetensors")),
    "an index with a tensor too many": ("tensor_missing", lambda: index_naming("x", "model-00002-of-00002.safetensors")),
    "an index with the wrong shard": (
        "tensor_missing",
        lambda: index_naming("model.embed_tokens.weight", "model-00002-of-00002.safetensors"),
    ),
    "no embedding": (
        "tensor_missing",
        lambda: with_weights(
            safetensors(safetensors_header({k: v for k, v in llama_shapes().items() if "embed" not in k}))
        ),
    ),
    "a tar cut short": ("truncated", lambda: tarred(llama_files())[:3000]),
    "a tar.gz cut short": ("truncated", lambda: tarred(llama_files(), mode="w:gz")[:-200]),
    "a zip cut short": ("truncated", lambda: zipped(llama_files())[:-100]),
    "a zip with a wrong checksum": (
        "archive_corrupt",
        lambda: zipped(llama_files()).replace(b'"LlamaForCausalLM"', b'"LlamaForCausalLN"', 1),
    ),
    "a tar with a wrong checksum": (
        "archive_corrupt",
        lambda: tarred(llama_files()).replace(b"config.json", b"konfig.json", 1),
    ),
    "a zip bomb": ("archive_bomb", lambda: zipped(llama_files() | {"big.txt": bytes(40 * 2**20)}, compress=True)),
    "a tar bomb": ("archive_bomb", lambda: tarred(llama_files() | {"big.bin": bytes(40 * 2**20)}, mode="w:gz")),
    "a tar with a long name of 32 MB": (
        "archive_corrupt",
        lambda: tarred({}, mode="w:gz", extra=(long_name(32 * 2**20),)),
    ),
    "a tar with 5 MB of extended headers": (
        "archive_corrupt",
        lambda: many_extended_headers(5 * 2**20),
    ),
    "3000 entries": ("too_many_files", lambda: zipped({f"{i}.txt": b"" for i in range(3000)})),
    "a path that leads out": ("archive_unsafe_path", lambda: zip_member("../evil.json")),
    "a path that leads out in a tar": ("archive_unsafe_path", lambda: tarred({"a/../../evil.json": b"{}"})),
    "an absolute path": ("archive_unsafe_path", lambda: tarred({"/etc/evil.json": b"{}"})),
    "a drive letter": ("archive_unsafe_path", lambda: zip_member("C:evil.json")),
    "a backslash": ("archive_unsafe_path", lambda: tarred({"..\\evil.json": b"{}"})),
    "a control character": ("archive_unsafe_path", lambda: tarred({"a\nb.json": b"{}"})),
    "a name that is not UTF-8": ("archive_unsafe_path", lambda: tarred({"a\udcff.json": b"{}"}, format=1)),
    "a symbolic link in a zip": ("archive_link", lambda: zip_member("evil.json", 0o120777, b"/etc/passwd")),
    "a symbolic link in a tar": ("archive_link", lambda: tarred(llama_files(), extra=(member(tarfile.SYMTYPE),))),
    "a hard link": ("archive_link", lambda: tarred(llama_files(), extra=(member(tarfile.LNKTYPE),))),
    "a device": ("archive_special_file", lambda: tarred(llama_files(), extra=(member(tarfile.CHRTYPE),))),
    "a pipe": ("archive_special_file", lambda: tarred(llama_files(), extra=(member(tarfile.FIFOTYPE),))),
    "a device in a zip": ("archive_special_file", lambda: zip_member("evil.json", 0o020666)),
    "one name twice": ("archive_duplicate", lambda: tarred({"a.txt": b"1", "./a.txt": b"2"})),
    "a file that is a folder": ("archive_duplicate", lambda: tarred({"a.txt": b"1", "a.txt/b.txt": b"2"})),
    "a folder that is a file": ("archive_duplicate", lambda: tarred({"a.txt/b.txt": b"1", "a.txt": b"2"})),
    "one name twice but for its case": ("archive_duplicate", lambda: zipped(llama_files() | {"CONFIG.json": b"{}"})),
    "an encrypted zip": ("archive_encrypted", encrypted),
    "a GGUF of an unknown architecture": ("unknown_architecture", lambda: gguf("mamba")),
    "a GGUF cut in its header": ("truncated", lambda: gguf()[:300]),
    "a GGUF cut in its tensors": ("truncated", lambda: gguf(cut=64)),
    "a GGUF of version 1": ("header_invalid", lambda: gguf(version=1)),
    "a big-endian GGUF": ("header_invalid", lambda: gguf(version=0x03000000)),
    "a GGUF with 2^60 tensors": ("header_invalid", lambda: b"GGUF" + struct.pack("<IQQ", 3, 2**60, 1) + bytes(64)),
    "a GGUF whose tensors overlap": ("header_invalid", lambda: gguf(offset=32)),
    "a GGUF tensor beyond the file": ("truncated", lambda: gguf(offset=2**40)),
    "a GGUF tensor twice": (
        "duplicate_tensor",
        lambda: gguf(tensors=[*gguf_names().items(), ("output_norm.weight", (32,))]),
    ),
    "a GGUF of an unknown type": ("unsupported_dtype", lambda: gguf(type=99)),
    "a GGUF with a wrong block count": ("config_mismatch", lambda: gguf(metadata={"llama.block_count": 7})),
    "a GGUF without context length": ("config_invalid", lambda: gguf(metadata={"llama.context_length": "many"})),
    "a GGUF with more tokens than embeddings": (
        "config_mismatch",
        lambda: gguf(metadata={"tokenizer.ggml.tokens": ["t"] * 99}),
    ),
}  # fmt: skip


def long_name(size: int) -> tarfile.TarInfo:
    """A header that announces a name of `size` bytes, with nothing behind it."""
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, size
    return info


def many_extended_headers(size: int) -> bytes:
    """Headers that say nothing of any use, one after the other, until they have so many bytes."""
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, 60_000
    one = info.tobuf(tarfile.USTAR_FORMAT) + b"6 a=b\n" * 10_000 + bytes(-60_000 % 512)
    return gzip.compress(one * (size // 60_000 + 1), mtime=0)


def leftovers(settings: Settings) -> list[str]:
    """Files in staging and in the store, and rows."""
    files = [
        str(p) for top in ("staging", "blobs") for p in (settings.data_dir / top).rglob("*") if p.is_file()
    ]
    work = [str(p) for p in (settings.data_dir / "staging" / "work").glob("*")]
    with get_database().read() as session:
        rows = [
            f"{session.scalar(select(func.count()).select_from(table))} {table.__tablename__}"
            for table in (Model, ModelFile, Upload)
            if session.scalar(select(func.count()).select_from(table))
        ]
    return files + work + rows


def refusal(client: TestClient, settings: Settings, what: str) -> str:
    """The code a bad model is refused with, or what is wrong with the answer."""
    answer = client.put("/v1/models/content", params={"name": "evil.zip"}, content=BAD[what][1]())
    problem = answer.json()
    if answer.status_code != 422 or not problem.get("detail") or not problem.get("hint"):
        return f"answer {answer.status_code}: {problem}"
    left = leftovers(settings)
    return f"left behind: {left}" if left else problem["code"]


def test_each_bad_model_gets_its_code_and_leaves_nothing_behind(
    client: TestClient, settings: Settings
) -> None:
    # One server meets them all, one after the other: it must survive each.
    assert {what: refusal(client, settings, what) for what in BAD} == {
        what: code for what, (code, _) in BAD.items()
    }
    assert (
        client.put("/v1/models/content", params={"name": "m"}, content=zipped(llama_files())).status_code
        == 201
    )


def test_every_code_is_met_by_a_test_and_has_a_hint() -> None:
    elsewhere = {
        "hash_mismatch", "import_refused", "text_invalid", "file_too_large", "preprocessing_unknown",
        "preprocessor_missing", "images_invalid", "onnx_unsupported", "labels_invalid", "picture_invalid",
    }  # fmt: skip
    assert {code for code, _ in BAD.values()} | elsewhere == set(get_args(Code)) == set(_HINTS)


@pytest.mark.parametrize(
    "what", ["a pickle alone", "a zip bomb", "weights cut short", "a GGUF cut in its header"]
)
def test_a_refused_upload_is_gone_with_its_file(client: TestClient, settings: Settings, what: str) -> None:
    code, make = BAD[what]
    content = make()
    made = client.post("/v1/uploads", json={"name": "evil", "size": len(content)}).json()
    client.put(f"{made['urls']['self']}/parts/1", content=content)
    client.post(made["urls"]["complete"])
    answer = client.post("/v1/models", json={"upload": made["id"]})
    assert (answer.status_code, answer.json()["code"]) == (422, code)
    assert leftovers(settings) == []


def test_an_unknown_architecture_is_told_which_are_known(client: TestClient) -> None:
    answer = client.put(
        "/v1/models/content", params={"name": "m.zip"}, content=BAD["an unknown architecture"][1]()
    )
    assert "LlamaForCausalLM" in answer.json()["hint"]
