"""Whatever bytes the readers of headers and archives are fed, they accept them or raise IntakeError: nothing else."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_files import gguf, llama_files, llama_shapes, safetensors, safetensors_header, tarred, zipped

from app.errors import IntakeError
from app.intake.archive import unpack
from app.intake.gguf_facts import gguf_facts
from app.intake.read_model import read_model
from app.intake.safetensors_header import read_header
from app.intake.sniff import sniff

BOUNDED = settings(
    max_examples=60, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
SHAPES = dict(list(llama_shapes().items())[:3])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as directory:
        yield Path(directory) / "file"


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """The bytes with a few replaced, a piece cut out, or the end cut off."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, len(content) - 1))
        content[at : at + draw(st.integers(0, 8))] = draw(st.binary(max_size=12))
        if not content:
            return b""
    return bytes(content[: draw(st.integers(0, len(content)))] if draw(st.booleans()) else content)


def accepts_or_refuses(scratch: Path, content: bytes, read: Any) -> None:
    scratch.write_bytes(content)
    with suppress(IntakeError):
        read(scratch)


@BOUNDED
@given(content=damaged(safetensors(safetensors_header(SHAPES))))
def test_damaged_safetensors(scratch: Path, content: bytes) -> None:
    accepts_or_refuses(scratch, content, lambda path: read_header(path, "file"))


@BOUNDED
@given(header=JSON, entry=JSON, offsets=JSON)
def test_safetensors_headers_of_any_json(scratch: Path, header: Any, entry: Any, offsets: Any) -> None:
    header = dict(
        safetensors_header(SHAPES), x=entry, y={"dtype": "F32", "shape": header, "data_offsets": offsets}
    )
    content = safetensors(json.dumps(header), b"0" * 100)
    accepts_or_refuses(scratch, content, lambda path: read_header(path, "file"))


@BOUNDED
@given(content=damaged(gguf()))
def test_damaged_gguf(scratch: Path, content: bytes) -> None:
    accepts_or_refuses(scratch, b"GGUF" + content[4:], lambda path: gguf_facts(path, "file"))


@BOUNDED
@given(
    values=st.dictionaries(st.text(max_size=30), st.integers(0, 2**32 - 1) | st.text(max_size=9), max_size=5)
)
def test_gguf_with_any_metadata(scratch: Path, values: dict[str, Any]) -> None:
    known = {f"llama.{key}": value for key, value in values.items()}
    accepts_or_refuses(scratch, gguf(metadata=values | known), lambda path: gguf_facts(path, "file"))


@BOUNDED
@given(config=st.dictionaries(st.sampled_from(sorted(json.loads(llama_files()["config.json"]))), JSON))
def test_configs_with_any_values(tmp_path_factory: pytest.TempPathFactory, config: dict[str, Any]) -> None:
    directory = tmp_path_factory.mktemp("model")
    for name, content in llama_files(**config).items():
        (directory / name).write_bytes(content)
    with suppress(IntakeError):
        read_model({path.name: path for path in directory.iterdir()})


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
def test_damaged_archives(scratch: Path, kind: Any) -> None:
    pack = {
        "zip": lambda f: zipped(f, compress=True),
        "tar": tarred,
        "tar.gz": lambda f: tarred(f, mode="w:gz"),
    }
    whole = pack[kind](llama_files())

    def read(path: Path) -> None:
        sniff(path)
        unpack(path, kind, write=lambda _, chunks: [len(chunk) for chunk in chunks], max_bytes=10**7)

    @BOUNDED
    @given(content=damaged(whole))
    def check(content: bytes) -> None:
        accepts_or_refuses(scratch, content, read)

    check()
