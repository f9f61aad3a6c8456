"""What the teacher says of every text, written down once, so that it needs no memory while the student is trained.

Of each next token's distribution at the temperature of the training, the k likeliest tokens and their log-probabilities:
k · (4 or 6) bytes a token, by the size of the vocabulary. What is left of the probability is one class more: the student
is taught how much there is of it, and keeps its own opinion of how it is shared out. With a k of the whole vocabulary it
is the loss without a cache; with fewer, a lower bound of it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from workers.engine.distill.losses import TeacherStates

# Logits of so many tokens are held at once.
_TOKENS_AT_ONCE = 128
# Rounded to half precision, probabilities can add up to more than one.
_LEAST_LEFT = 1e-6


@dataclass(frozen=True)
class Likeliest:
    """The k likeliest next tokens of each position and their log-probabilities, both (tokens, k)."""

    ids: Tensor
    log_probabilities: Tensor

    def logits(self, span: slice, student: Tensor, temperature: float) -> Tensor:
        """As the teacher gave them, the rest shared out as the student does: (tokens, vocabulary) twice."""
        ids, known = self.ids[span], self.log_probabilities[span].float()
        left = torch.log1p(-known.exp().sum(-1, keepdim=True).clamp(max=1 - _LEAST_LEFT))
        others = (student / temperature).scatter(1, ids, -torch.inf)
        filled = others + (left - others.logsumexp(-1, keepdim=True))
        return temperature * filled.scatter(1, ids, known)


def likeliest(teacher: TeacherStates, *, k: int, temperature: float) -> Likeliest:
    """What the cache keeps of these tokens."""
    ids, logs = [], []
    for start in range(0, len(teacher.hidden), _TOKENS_AT_ONCE):
        span = slice(start, start + _TOKENS_AT_ONCE)
        logits = teacher.logits(span, teacher.hidden, temperature)
        top = (logits / temperature).log_softmax(-1).topk(min(k, logits.shape[-1]), dim=-1)
        ids.append(top.indices)
        logs.append(top.values)
    return Likeliest(torch.cat(ids), torch.cat(logs))


class TeacherCache:
    """A file of records, one for each sequence, all of as many tokens; those of a process that was killed are kept."""

    def __init__(self, path: Path, *, tokens: int, k: int, vocabulary: int) -> None:
        self._path, self._shape = path, (tokens, min(k, vocabulary))
        self.vocabulary = vocabulary
        self._id_type = torch.uint16 if vocabulary <= 2**16 else torch.int32
        self.bytes_per_token = self._shape[1] * (self._id_type.itemsize + torch.float16.itemsize)
        self._record_bytes = tokens * self.bytes_per_token

    @property
    def records(self) -> int:
        """How many sequences are in it, whole."""
        return self._path.stat().st_size // self._record_bytes if self._path.exists() else 0

    def write(self, batches: Iterable[Likeliest], done: Callable[[int], None]) -> None:
        """Append the records of batch after batch; `done` is told how many there are."""
        with self._path.open("ab") as file:
            file.truncate(self.records * self._record_bytes)
            for batch in batches:
                tables = (batch.ids.to(self._id_type), batch.log_probabilities.to(torch.float16))
                for record in zip(*(torch.split(table, self._shape[0]) for table in tables), strict=True):
                    file.writelines(_bytes(part) for part in record)
                file.flush()
                done(self.records)

    def read(self, numbers: Sequence[int], device: str) -> Likeliest:
        """What the teacher said of these sequences, one after the other."""
        ids, logs = [], []
        descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            for number in numbers:
                record = bytearray(os.pread(descriptor, self._record_bytes, number * self._record_bytes))
                count = self._shape[0] * self._shape[1]
                ids.append(torch.frombuffer(record, dtype=self._id_type, count=count))
                start = count * self._id_type.itemsize
                logs.append(torch.frombuffer(record, dtype=torch.float16, count=count, offset=start))
        finally:
            os.close(descriptor)
        found, values = (torch.cat(parts).view(-1, self._shape[1]).to(device) for parts in (ids, logs))
        return Likeliest(found.long(), values)


def _bytes(tensor: Tensor) -> bytes:
    contents: bytes = tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return contents
