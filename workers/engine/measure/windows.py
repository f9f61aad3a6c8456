"""Cut evaluation text into windows of tokens, once, for both models.

Language models, and classifiers on text without labels, get non-overlapping windows of one long stream. Encoders get
documents: their embeddings are compared with each other, so there must be many, of natural length. Classifiers on texts
with labels get the start of each text, for that is what the label is held against.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.errors import InvalidRequest, JobFailed
from app.spec.base import Family
from app.spec.compression import Evaluation
from app.spec.facts import ModelFacts
from app.spec.report import EvaluationText
from workers.engine.architectures.loading import load_tokenizer
from workers.engine.calibration.text import (
    read_documents,
    special_tokens,
    text_digest,
    token_chunks,
    token_windows,
)
from workers.engine.calibration.text_set import read_labels, read_text
from workers.engine.calibration.windows import longest_window
from workers.engine.measure.results import Kind, Prepared

Windows = list[NDArray[np.int64]]

OVERLAP_TOKENS = 13
"""Length of the sequences that count as the same text (as GPT-3's and Llama's contamination checks take it)."""
# Rank correlation over fewer texts than this says nothing; documents are cut shorter to reach it.
_ENOUGH_TEXTS = 24
_SHORTEST_TEXT = 16
_LARGEST_OUTPUT_BYTES = 2**30
_PIECE_TOKENS = 2**14


def kind_of(facts: ModelFacts) -> Kind:
    """What the outputs of a model are."""
    if facts.family is Family.CAUSAL_LM:
        return "causal_lm"
    if facts.family is Family.IMAGE_CLASSIFIER:
        return "image_classifier"
    return "classifier" if facts.architecture.endswith("ForSequenceClassification") else "encoder"


def prepare_evaluation(
    original: Path,
    facts: ModelFacts,
    evaluation: Evaluation,
    *,
    text: Path,
    seen: Sequence[Path] = (),
    windows_file: Path,
) -> Prepared:
    """Tokenize evaluation text with the original's tokenizer and write its windows to `windows_file` (.npz).

    `seen` are the calibration and training texts that steps of the job read; the share of the evaluation text that
    stands in them goes into the report. Raises InvalidRequest when the text is too short, JobFailed when the model
    has no tokenizer.
    """
    tokenizer = tokenizer_of(original)
    before, after = special_tokens(tokenizer)
    length = _window_length(facts, evaluation.sequence_length, specials=len(before) + len(after))
    kind = kind_of(facts)
    labels = read_labels(text, facts)
    if labels is not None:
        chosen = _spread(len(labels), evaluation.texts)
        labels, bare = labels[chosen], _labelled_windows(tokenizer, text, chosen, length=length)
    elif kind == "encoder":
        bare = _document_windows(tokenizer, text, tokens=evaluation.tokens, length=length)
    else:
        stream = token_windows(tokenizer, text, tokens=evaluation.tokens, length=length)
        bare = list(stream.numpy())
    save_windows(windows_file, [np.concatenate((before, window, after)) for window in bare])
    return Prepared(
        kind=kind,
        windows_file=windows_file,
        scored_bytes=_scored_bytes(tokenizer, bare, skip_first=len(before) == 0),
        labels=None if labels is None else tuple(labels.tolist()),
        text=EvaluationText(
            source=evaluation.text.dataset or "built-in English prose",
            sha256=text_digest(text),
            tokens=sum(len(window) for window in bare),
            windows=len(bare),
            sequence_length=max(len(window) for window in bare),
            labelled=labels is not None,
            overlap_share=_overlap_with(
                tokenizer, bare, seen, by_document=kind == "encoder" or labels is not None
            ),
        ),
    )


def tokenizer_of(directory: Path) -> Any:
    """The tokenizer of a model. Raises JobFailed (`no_tokenizer`) when none can be loaded from its directory."""
    try:
        return load_tokenizer(directory)
    except Exception as error:
        raise JobFailed(
            f"The model's tokenizer cannot be loaded: {error}",
            code="no_tokenizer",
            hint="Upload the tokenizer's files with the model, or set evaluation.enabled to false.",
        ) from error


def save_windows(path: Path, windows: Windows) -> None:
    """Write windows of any lengths as one flat array and the places to cut it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ends = np.cumsum([len(window) for window in windows])
    np.savez(path, tokens=np.concatenate(windows).astype(np.int64), ends=ends)


def load_windows(path: Path) -> Windows:
    """The windows that `save_windows` wrote."""
    with np.load(path, allow_pickle=False) as stored:
        return np.split(stored["tokens"], stored["ends"][:-1])


def overlap_share(text: Sequence[int], others: Iterable[Sequence[int]], n: int = OVERLAP_TOKENS) -> float:
    """Share of the n-token sequences of `text` that also stand in one of `others`, 0 to 1; 0 when there are none.

    Holds the sequences of `text` alone, so `others` may be a stream of any length.
    """
    grams = _sequences(text, n)
    wanted, found = set(grams), set[bytes]()
    for other in others:
        found.update(wanted.intersection(_sequences(other, n)))
    return sum(gram in found for gram in grams) / len(grams) if grams else 0.0


def _sequences(tokens: Sequence[int], n: int) -> list[bytes]:
    packed = np.asarray(tokens, dtype=np.int32).tobytes()
    return [packed[4 * start : 4 * (start + n)] for start in range(len(tokens) - n + 1)]


def _overlap_with(tokenizer: Any, bare: Windows, seen: Sequence[Path], *, by_document: bool) -> float | None:
    if not seen:
        return None
    cut = _document_tokens if by_document else _stream_tokens
    others = (part for path in seen for part in _joined(cut(tokenizer, path)))
    return overlap_share(np.concatenate(bare).tolist(), others)


def _stream_tokens(tokenizer: Any, path: Path) -> Iterator[list[int]]:
    return token_chunks(tokenizer, read_text(path))


def _document_tokens(tokenizer: Any, path: Path) -> Iterator[list[int]]:
    for document in read_documents(path):
        yield tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]


def _joined(parts: Iterable[list[int]]) -> Iterator[list[int]]:
    """The same tokens in long pieces, each begun with the end of the one before: sequences span short documents."""
    piece: list[int] = []
    for part in parts:
        piece += part
        if len(piece) >= _PIECE_TOKENS:
            yield piece
            piece = piece[1 - OVERLAP_TOKENS :]
    yield piece


def _window_length(facts: ModelFacts, wanted: int, *, specials: int) -> int:
    room = longest_window(facts)
    if facts.family is Family.CAUSAL_LM:
        # The logits of one window are handed over as one float32 file.
        room = min(room, _LARGEST_OUTPUT_BYTES // (4 * facts.vocab_size))
    return max(1, min(wanted, room - specials))


def _document_windows(tokenizer: Any, path: Path, *, tokens: int, length: int) -> Windows:
    documents = read_documents(path)
    while True:
        windows = list(_cut_documents(tokenizer, documents, tokens=tokens, length=length))
        if len(windows) >= _ENOUGH_TEXTS or length // 2 < _SHORTEST_TEXT:
            break
        length //= 2
    if len(windows) < 3:
        raise InvalidRequest(
            f"The evaluation text gives {len(windows)} texts to embed; similarities need at least 3.",
            code="text_too_short",
            hint="Upload a longer text: documents are separated by blank lines.",
        )
    return windows


def _spread(count: int, wanted: int) -> NDArray[np.int64]:
    """So many of `count` places, evenly over all of them: a file may be sorted by label."""
    wanted = min(count, wanted)
    return np.arange(wanted) * count // wanted


def _labelled_windows(tokenizer: Any, path: Path, chosen: NDArray[np.int64], *, length: int) -> Windows:
    documents = read_documents(path)
    windows = []
    for number in chosen:
        ids = tokenizer(documents[number], add_special_tokens=False, verbose=False)["input_ids"]
        windows.append(np.asarray(ids[:length], dtype=np.int64))
    return windows


def _cut_documents(
    tokenizer: Any, documents: list[str], *, tokens: int, length: int
) -> Iterator[NDArray[np.int64]]:
    budget = tokens
    for document in documents:
        ids = tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        for start in range(0, len(ids), length):
            if budget <= 0:
                return
            window = np.asarray(ids[start : start + min(length, budget)], dtype=np.int64)
            budget -= len(window)
            yield window


def _scored_bytes(tokenizer: Any, bare: Windows, *, skip_first: bool) -> int:
    first = 1 if skip_first else 0
    return sum(
        len(tokenizer.decode(window[first:], clean_up_tokenization_spaces=False).encode()) for window in bare
    )
