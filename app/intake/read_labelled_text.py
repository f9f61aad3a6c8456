"""Turn a .jsonl of texts with labels into the form the engine reads: a safetensors file of `labels` and `text`.

`text` are the bytes that would be kept without labels: UTF-8, documents separated by blank lines. `labels` are int64, one a
document. Labels that are names become their places among the sorted names, which are kept beside them: which class of a
model a name means is for the model to say.
"""

from __future__ import annotations

import array
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from app.intake.jsonl import Document, read_documents
from app.intake.read_text import joined
from app.intake.refusals import refused
from app.intake.safetensors_header import header_bytes
from app.spec.text_set import TextSetFacts

_MAX_LABEL = 2**31 - 1
_MAX_NAME_CHARACTERS = 200
# Labels and the names are held in memory.
_MAX_TEXTS = 10_000_000
_MAX_NAMES = 10_000
_WITHOUT = 'To use the texts alone, leave "label" out of all lines.'
_LABELS = f"A label is an integer from 0 or a name, of the same kind in all lines. {_WITHOUT}"
_PAIR = "text_pair"


@dataclass(frozen=True)
class LabelledText:
    """Texts with labels that were read once, to their end."""

    path: Path
    name: str
    """What errors call the file."""
    facts: TextSetFacts
    labels: array.array[int]
    text_bytes: int

    def chunks(self) -> Iterator[bytes]:
        """The normalised file, piece by piece."""
        metadata = (
            {} if self.facts.label_names is None else {"label_names": json.dumps(self.facts.label_names)}
        )
        shapes = {"labels": ("I64", (len(self.labels),)), "text": ("U8", (self.text_bytes,))}
        yield header_bytes(shapes, metadata)
        yield self.labels.tobytes()
        yield from (piece.encode() for piece in joined(read_documents(self.path, self.name)))


def has_labels(path: Path, name: str) -> bool:
    """Whether the first text of a .jsonl has a label: then all must. Raises IntakeError."""
    first = next(read_documents(path, name), None)
    return first is not None and first.label is not None


def read_labelled_text(path: Path, name: str) -> LabelledText:
    """Check a file and collect its labels. Raises IntakeError."""
    found = _Labels()
    size = sum(len(piece.encode()) for piece in joined(found.collecting(read_documents(path, name))))
    labels, names = found.numbered()
    facts = TextSetFacts(texts=len(labels), largest_label=max(labels), label_names=names)
    return LabelledText(path, name, facts, labels, size)


class _Labels:
    """Labels in the order they are met, names by the order in which they were first met."""

    def __init__(self) -> None:
        self._labels = array.array("q")
        self._names: dict[str, int] = {}
        self._kind: type | None = None

    def collecting(self, documents: Iterator[Document]) -> Iterator[Document]:
        """The same documents, their labels collected. Raises IntakeError."""
        for document in documents:
            if len(self._labels) == _MAX_TEXTS:
                raise refused("text_invalid", f"There are more than {_MAX_TEXTS} texts with labels.")
            self._labels.append(self._number(document))
            yield document

    def _number(self, document: Document) -> int:
        label = _checked(document)
        if self._kind not in (None, type(label)):
            raise refused(
                "labels_invalid",
                f"{document.where} has a {_kind(label)} for its label, others have not.",
                hint=_LABELS,
            )
        self._kind = type(label)
        if isinstance(label, int):
            return label
        if len(self._names) == _MAX_NAMES and label not in self._names:
            raise refused(
                "labels_invalid", f"There are more than {_MAX_NAMES} names of labels.", hint=_LABELS
            )
        return self._names.setdefault(label, len(self._names))

    def numbered(self) -> tuple[array.array[int], tuple[str, ...] | None]:
        """All labels, and the sorted names that they count."""
        if not self._names:
            return self._labels, None
        names = tuple(sorted(self._names))
        places = {self._names[name]: place for place, name in enumerate(names)}
        return array.array("q", (places[label] for label in self._labels)), names


def _checked(document: Document) -> int | str:
    label = document.label
    if document.entry.get(_PAIR) is not None:
        raise refused(
            "labels_invalid",
            f"{document.where} has a {_PAIR}: pairs of texts are not read yet.",
            hint=_WITHOUT,
        )
    if type(label) is int and 0 <= label <= _MAX_LABEL:
        return label
    if isinstance(label, str) and 0 < len(label) <= _MAX_NAME_CHARACTERS and label.isprintable():
        return label
    shown = "no label" if label is None else f"the label {str(label)[:50]!r}"
    raise refused("labels_invalid", f"{document.where} has {shown}.", hint=_LABELS)


def _kind(label: int | str) -> str:
    return "number" if isinstance(label, int) else "name"
