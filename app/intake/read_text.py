"""Turn a dataset into the one form everything else reads: UTF-8 text, documents separated by blank lines.

A .txt is taken as it is, so that a blank line in it separates documents; line ends become `\\n` and a byte order mark
goes. In a .jsonl every line is one document, `{"text": …}`; blank lines inside it become line ends, so that it stays one.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

from app.errors import IntakeError
from app.intake.jsonl import MAX_LINE_BYTES, TEXTS_ACCEPTED, Document, clean, read_documents
from app.intake.refusals import refused
from app.intake.sniff import sniff

TextFormat = Literal["txt", "jsonl"]

_READ_BYTES = 2**20
_BINARY = {
    "parquet": "a Parquet file",
    "numpy": "a NumPy file",
    "hdf5": "an HDF5 file",
    "gguf": "a GGUF model",
    "pickle": "a pickle",
    "other_archive": "a compressed archive",
}


def text_format(path: Path, name: str) -> TextFormat:
    """What kind of text a file is: by its bytes whether it is text at all, by name or first line which. Raises IntakeError."""
    kind = sniff(path)
    if kind in _BINARY:
        raise refused("unsupported_format", f"{name} is {_BINARY[kind]}, not text.", hint=TEXTS_ACCEPTED)
    lower = name.lower()
    if lower.endswith((".jsonl", ".ndjson")):
        return "jsonl"
    if lower.endswith((".txt", ".md", ".text")):
        return "txt"
    with path.open("rb") as file:
        return "jsonl" if file.readline(MAX_LINE_BYTES).lstrip().startswith(b'{"') else "txt"


def text_chunks(path: Path, name: str, form: TextFormat) -> Iterator[bytes]:
    """The normalised text, piece by piece. Raises IntakeError, at the end when there was no text at all."""
    found = False
    for piece in _plain(path, name) if form == "txt" else joined(_unlabelled(read_documents(path, name))):
        found = found or bool(piece.strip())
        yield piece.encode()
    if not found:
        raise refused("text_invalid", f"{name} has no text in it.", hint=TEXTS_ACCEPTED)


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
            yield clean(text.removesuffix("\r"), name)
    try:
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        raise _not_utf8(name, at) from None
    if carried:
        yield "\n"


def _unlabelled(documents: Iterable[Document]) -> Iterator[Document]:
    for document in documents:
        if document.label is not None:
            raise refused("labels_invalid", f"{document.where} has a label, and the first text has none.")
        yield document


def joined(documents: Iterable[Document]) -> Iterator[str]:
    """Documents as one text, piece by piece."""
    separator = ""
    for document in documents:
        yield separator + document.text
        separator = "\n\n"
    if separator:
        yield "\n"


def _not_utf8(name: str, at: int) -> IntakeError:
    return refused("text_invalid", f"{name} is not UTF-8, from about byte {at} on.")
