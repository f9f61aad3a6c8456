"""Training text as batches of tokens, with some of it held out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from app.errors import InvalidRequest
from app.spec.facts import ModelFacts
from app.spec.text_training import TextTraining
from workers.engine.calibration.text import cut_windows, read_documents, special_tokens
from workers.engine.calibration.text_set import read_labels, read_text
from workers.engine.calibration.windows import longest_window

# More would cost time at every look without changing when to stop.
_HELD_OUT_TOKENS = 2048
# Batches whose sequences are sorted by length together.
_POOLED_BATCHES = 16


@dataclass(frozen=True)
class Batch:
    """Sequences of equal length: ids and mask, both (sequences, tokens), int64; the mask is 1 on real tokens."""

    ids: Tensor
    mask: Tensor
    numbers: tuple[int, ...] = ()
    """Which sequences of the text these are: those that are held out are numbered after the others."""
    labels: Tensor | None = None
    """Their classes, (sequences,), int64, where the texts have labels."""

    @property
    def amount(self) -> int:
        """Tokens."""
        return int(self.mask.sum())

    def to(self, device: str) -> Batch:
        """The same on another device."""
        labels = None if self.labels is None else self.labels.to(device)
        return Batch(self.ids.to(device), self.mask.to(device), self.numbers, labels)


@dataclass(frozen=True)
class TrainingText:
    """What is trained on and what is only looked at; no token of one stands in the other."""

    sequences: tuple[Tensor, ...]
    held_out: tuple[Batch, ...]
    batch_size: int
    padding: int
    seed: int
    labels: Tensor | None = None
    """Of all sequences by their numbers, (sequences,), int64."""

    def batches(self) -> Iterator[Batch]:
        """Batches without end: every sequence once an epoch, in an order drawn from the seed.

        Sequences of about the same length share a batch, since padding costs as much as text.
        """
        generator = torch.Generator().manual_seed(self.seed)
        pool = self.batch_size * min(_POOLED_BATCHES, max(1, len(self.sequences) // self.batch_size))
        waiting: list[int] = []
        while True:
            for index in torch.randperm(len(self.sequences), generator=generator).tolist():
                waiting.append(index)
                if len(waiting) == pool:
                    waiting.sort(key=lambda number: len(self.sequences[number]))
                    alike = self._in_batches(self.sequences, waiting)
                    yield from (alike[number] for number in torch.randperm(len(alike), generator=generator))
                    waiting = []

    def sample(self, tokens_wanted: int) -> tuple[Batch, ...]:
        """About so many tokens of what is trained on, from all over it, in batches."""
        tokens = sum(len(sequence) for sequence in self.sequences)
        count = min(len(self.sequences), max(2, tokens_wanted * len(self.sequences) // tokens))
        chosen = [index * len(self.sequences) // count for index in range(count)]
        return self._in_batches(self.sequences, chosen)

    def everything(self, first: int) -> Iterator[Batch]:
        """All sequences by their numbers, those held out last, from number `first` on."""
        held_out = [row[mask.bool()] for batch in self.held_out for row, mask in zip(batch.ids, batch.mask, strict=True)]  # fmt: skip
        sequences = [*self.sequences, *held_out]
        yield from self._in_batches(sequences, range(first, len(sequences)))

    def _in_batches(self, sequences: Sequence[Tensor], numbers: Sequence[int]) -> tuple[Batch, ...]:
        return _in_batches(sequences, numbers, self.batch_size, self.padding, self.labels)


def padded(
    sequences: Sequence[Tensor], padding: int, numbers: Sequence[int] = (), labels: Tensor | None = None
) -> Batch:
    """Sequences of any lengths as one batch, padded at the end; `labels` are those of the whole text, by number."""
    ids = torch.nn.utils.rnn.pad_sequence(list(sequences), batch_first=True, padding_value=padding)
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    of_these = None if labels is None else labels[list(numbers)]
    return Batch(ids, (torch.arange(ids.shape[1]) < lengths[:, None]).long(), tuple(numbers), of_these)


def stream_text(
    spec: TextTraining, path: Path, tokenizer: Any, facts: ModelFacts, *, seed: int
) -> TrainingText:
    """Windows of one long stream, for language models. Raises InvalidRequest when the text is too short."""
    before, after = special_tokens(tokenizer)
    length = min(spec.sequence_length, longest_window(facts)) - len(before) - len(after)
    head, tail = _split(read_text(path), spec.held_out_fraction)
    wanted = spec.sequences * length

    def windows(text: str, tokens: int) -> list[Tensor]:
        bare = cut_windows(tokenizer, text, tokens=tokens, length=length)
        return [torch.tensor([*before, *window.tolist(), *after]) for window in bare]

    return _text(windows(head, wanted), windows(tail, _HELD_OUT_TOKENS), spec, tokenizer, seed)


def document_text(
    spec: TextTraining, path: Path, tokenizer: Any, facts: ModelFacts, *, seed: int
) -> TrainingText:
    """Documents, each a sequence of its own (long ones are cut up, and each piece has the label), for encoders and classifiers.

    They are drawn in an order of the seed first, for files go topic by topic, or label by label. Raises InvalidRequest when
    there are too few to hold some out.
    """
    before, after = special_tokens(tokenizer)
    length = min(spec.sequence_length, longest_window(facts)) - len(before) - len(after)
    documents = read_documents(path)
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed)).tolist()
    first_held_out = min(len(documents) - 1, round(len(documents) * (1 - spec.held_out_fraction)))

    def sequences(part: list[int], budget: int) -> list[tuple[Tensor, int]]:
        """So many sequences, each with the number of its document."""
        made: list[tuple[Tensor, int]] = []
        for number in part:
            ids = tokenizer(documents[number], add_special_tokens=False, verbose=False)["input_ids"]
            pieces = (ids[start : start + length] for start in range(0, len(ids), length))
            made += [(torch.tensor([*before, *piece, *after]), number) for piece in pieces]
            if len(made) >= budget:
                break
        return made[:budget]

    head = sequences(order[:first_held_out], spec.sequences)
    tail = sequences(order[first_held_out:], max(2, _HELD_OUT_TOKENS // length))
    if len(head) < 2 or len(tail) < 2:
        raise InvalidRequest(
            f"The training text gives {len(head)} texts to train on and {len(tail)} to hold out; 2 of each are needed.",
            code="text_too_short",
            hint="Upload a longer text: documents are separated by blank lines.",
        )
    labels = read_labels(path, facts)
    of_all = None if labels is None else torch.from_numpy(labels[[number for _, number in (*head, *tail)]])
    trained, held_out = ([ids for ids, _ in part] for part in (head, tail))
    return _text(trained, held_out, spec, tokenizer, seed, of_all)


def _text(
    head: list[Tensor],
    tail: list[Tensor],
    spec: TextTraining,
    tokenizer: Any,
    seed: int,
    labels: Tensor | None = None,
) -> TrainingText:
    padding = tokenizer.pad_token_id or 0
    size = min(spec.batch_size, len(head))
    numbers = range(len(head), len(head) + len(tail))
    held_out = _in_batches([*head, *tail], numbers, spec.batch_size, padding, labels)
    return TrainingText(tuple(head), held_out, size, padding, seed, labels)


def _in_batches(
    sequences: Sequence[Tensor], numbers: Sequence[int], size: int, padding: int, labels: Tensor | None
) -> tuple[Batch, ...]:
    batches = [list(numbers[start : start + size]) for start in range(0, len(numbers), size)]
    # One text alone is like nothing: it joins the batch before.
    if len(batches) > 1 and len(batches[-1]) == 1 < size:
        alone = batches.pop()
        batches[-1] += alone
    return tuple(padded([sequences[number] for number in batch], padding, batch, labels) for batch in batches)


def _split(text: str, held_out_fraction: float) -> tuple[str, str]:
    """Cut a text in two at a word's boundary."""
    cut = text.rfind(" ", 0, int(len(text) * (1 - held_out_fraction)) + 1)
    return (text[:cut], text[cut:]) if cut > 0 else (text, "")
