"""Feeds bytes to every reader of uploaded files: whatever they are, it accepts them or refuses them, quickly and in little memory.

`make check` runs few and always the same examples. `make fuzz` runs many new ones; bytes that break a reader are left in
`corpus/<reader>/found`. Kept under a name that says what they are, they are fed in by every later run.
"""

from __future__ import annotations

import json
import os
import resource
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from model_files import llama_files

from app.errors import IntakeError
from app.intake.archive import unpack
from app.intake.gguf_facts import gguf_facts
from app.intake.npy_header import read_npy_header
from app.intake.read_dataset import read_dataset
from app.intake.read_model import read_model, read_single_file
from app.intake.safetensors_header import read_header
from app.intake.sniff import sniff

CORPUS = Path(__file__).parent / "corpus"
EXAMPLES = int(os.environ.get("MODELPRESS_FUZZ_EXAMPLES", "0"))
BOUNDED = settings(
    max_examples=EXAMPLES or 60,
    derandomize=not EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
MAX_PROCESSOR_SECONDS = 5
MAX_GROWTH_BYTES = 2**29

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """The bytes with a few replaced, a piece cut out or put in twice, or the end cut off."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, len(content) - 1))
        length = draw(st.integers(0, 8))
        new = draw(st.binary(max_size=12) | st.just(bytes(content[at : at + 40])) | st.just(b"\xff" * 8))
        content[at : at + length] = new
        if not content:
            return b""
    return bytes(content[: draw(st.integers(0, len(content)))] if draw(st.booleans()) else content)


def feed(reader: str, scratch: Path, content: bytes) -> None:
    """Give a reader bytes in a file. Fails for anything but an answer or a refusal, and leaves the bytes in the corpus."""
    file = scratch / "file"
    file.write_bytes(content)
    began, before = time.process_time(), peak_bytes()
    try:
        with suppress(IntakeError):
            READERS[reader](file)
        assert time.process_time() - began < MAX_PROCESSOR_SECONDS, "it takes for ever"
        assert peak_bytes() - before < MAX_GROWTH_BYTES, "it fills the memory"
    except BaseException:
        found = CORPUS / reader / "found"
        found.parent.mkdir(parents=True, exist_ok=True)
        # The last to be written is the smallest: that is how hypothesis ends.
        found.write_bytes(content)
        raise


def peak_bytes() -> int:
    """The most memory this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _archive(path: Path, kind: Any) -> None:
    sniff(path)
    unpack(path, kind, write=lambda _, chunks: [len(chunk) for chunk in chunks], max_bytes=10**7)


def _upload(path: Path) -> None:
    read_single_file(path, "file", write=lambda _, chunks: [len(c) for c in chunks], max_bytes=10**7)


def _dataset(path: Path, name: str) -> None:
    for _ in read_dataset(path, name, max_bytes=10**8).chunks:
        pass


def _npy(path: Path) -> None:
    with path.open("rb") as file:
        read_npy_header(file.read, "file")


def _beside(path: Path, name: str, files: Callable[[], dict[str, bytes]]) -> None:
    """As one file of a model whose other files are sound."""
    directory = path.parent / "model"
    directory.mkdir(exist_ok=True)
    for other, content in files().items():
        (directory / other).write_bytes(content)
    (directory / name).write_bytes(path.read_bytes())
    read_model({file.name: file for file in directory.iterdir()})


@cache
def onnx_files() -> dict[str, bytes]:
    """A small network, and what becomes of its images."""
    from test_onnx_models import PROCESSOR, graph

    return {
        "model.onnx": graph().SerializeToString(),
        "preprocessor_config.json": json.dumps(PROCESSOR).encode(),
    }


READERS: dict[str, Callable[[Path], object]] = {
    "safetensors": lambda path: read_header(path, "file"),
    "gguf": lambda path: gguf_facts(path, "file"),
    "onnx": lambda path: _beside(path, "model.onnx", onnx_files),
    "zip": partial(_archive, kind="zip"),
    "tar": partial(_archive, kind="tar"),
    "tar.gz": partial(_archive, kind="tar.gz"),
    "upload": _upload,
    "npy": _npy,
    "npz": partial(_dataset, name="images.npz"),
    "jsonl": partial(_dataset, name="text.jsonl"),
    "txt": partial(_dataset, name="text.txt"),
    "config": lambda path: _beside(path, "config.json", llama_files),
    "tokenizer_config": lambda path: _beside(path, "tokenizer_config.json", llama_files),
    "preprocessor": lambda path: _beside(path, "preprocessor_config.json", onnx_files),
}
