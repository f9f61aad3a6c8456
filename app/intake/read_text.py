"""Turn a dataset into the one form everything else reads: UTF-8 text, documents separated by blank lines.

A .txt is taken as it is, so that a blank line in it separates documents; line ends become `\\n` and a byte order mark
goes. In a .jsonl every line is one document, `{"text": …}`; blank lines inside it become line ends, so that it stays one.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from app.errors import IntakeError
from app.intake.refusals import refused
from app.intake.sniff import sniff

TextFormat = Literal["txt", "jsonl"]

_READ_BYTES = 2**20
_MAX_LINE_BYTES = 16 * 2**20
_BLANK_LINES = re.compile(r"\n\s*\n")
_ACCEPTED = (
    'Accepted: text as .txt (UTF-8, blank lines between documents) and .jsonl (one {"text": …} a line), images as .npz and '
    ".safetensors."
)
_BINARY = {
    "parquet": "a Parquet file",
    "numpy": "a NumPy file",
    "tar": "a tar archive",
    "tar.gz": "a gzip file",
    "hdf5": "an HDF5 file",
    "gguf": "a GGUF model",
    "pickle": "a pickle",
    "other_archive": "a compressed archive",
}


def text_format(path: Path, name: str) -> TextFormat:
    """What kind of text a file is: by its bytes whether it is text at all, by name or first line which. Raises IntakeError."""
    kind = sniff(path)
    if kind in _BINARY:
        raise refused("unsupported_format", f"{name} is {_BINARY[kind]}, not text.", hint=_ACCEPTED)
    lower = name.lower()
    if lower.endswith((".jsonl", ".ndjson")):
        return "jsonl"
    if lower.endswith((".txt", ".md", ".text")):
        return "txt"
    with path.open("rb") as file:
        return "jsonl" if file.readline(_MAX_LINE_BYTES).lstrip().startswith(b'{"') else "txt"


def text_chunks(path: Path, name: str, form: TextFormat) -> Iterator[bytes]:
    """The normalised text, piece by piece. Raises IntakeError, at the end when there was no text at all."""
    found = False
    for piece in _plain(path, name) if form == "txt" else _lines(path, name):
        found = found or bool(piece.strip())
        yield piece.encode()
    if not found:
        raise refused("text_invalid", f"{name} has no text in it.", hint=_ACCEPTED)


def _plain(path: Path, name: str) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    at = 0
    carried = ""
    with path.open("rb") as file:
        while raw := file.read(_READ_BYTES):
            try:
                text = carried + decoder.decode(raw)
            except UnicodeDecodeError as error:
                raise _not_utf8(name, at + error.start) from None
            at += len(raw)
            # A line end may be cut in two between pieces.
            carried = "\r" if text.endswith("\r") else ""
            yield _clean(text.removesuffix("\r"), name)
    try:
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        raise _not_utf8(name, at) from None
    if carried:
        yield "\n"


def _lines(path: Path, name: str) -> Iterator[str]:
    separator = ""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(_MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > _MAX_LINE_BYTES:
                raise refused(
                    "text_invalid", f"Line {number} of {name} has more than {_MAX_LINE_BYTES} bytes."
                )
            document = _document(line, f"Line {number} of {name}") if line.strip() else ""
            if document:
                yield separator + document
                separator = "\n\n"
    if separator:
        yield "\n"


def _document(line: bytes, where: str) -> str:
    try:
        entry = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise refused("text_invalid", f"{where} is not UTF-8.") from None
    except (ValueError, RecursionError):
        raise refused("text_invalid", f"{where} is not JSON.", hint=_ACCEPTED) from None
    text = entry.get("text") if isinstance(entry, dict) else None
    if not isinstance(text, str):
        raise refused("text_invalid", f'{where} has no "text" that is a string.', hint=_ACCEPTED)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise refused("text_invalid", f"{where} has half a surrogate pair in its text.") from None
    return _BLANK_LINES.sub("\n", _clean(text, where)).strip()


def _clean(text: str, where: str) -> str:
    if "\0" in text:
        raise refused("text_invalid", f"{where} has a zero byte: it is no text.")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _not_utf8(name: str, at: int) -> IntakeError:
    return refused("text_invalid", f"{name} is not UTF-8, from about byte {at} on.")
