"""Does a model bring the tokenizer that a spec needs? Answered from the names of its files."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from app.errors import Fault
from app.spec.base import TEXT_FAMILIES
from app.spec.compression import CompressionSpec
from app.spec.facts import ModelFacts

_VOCABULARIES = frozenset({
    "tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json", "spiece.model", "spm.model",
    "sentencepiece.bpe.model", "tekken.json",
})  # fmt: skip
_WITHOUT = "the model was uploaded without a tokenizer. Upload it again with tokenizer.json (or tokenizer.model, vocab.txt)"


def check_tokenizer(spec: CompressionSpec, facts: ModelFacts, files: Collection[str]) -> Iterator[Fault]:
    """What a spec wants of a model of text that has none; `files` by name. A GGUF has its own inside."""
    if facts.family not in TEXT_FAMILIES or facts.format == "gguf" or not _VOCABULARIES.isdisjoint(files):
        return
    for number, step in enumerate(spec.steps):
        if step.needs_calibration or step.needs_training:
            yield Fault(
                f"/steps/{number}/technique",
                f"{step.technique} runs the model over text, and {_WITHOUT}, or choose a technique that needs no text.",
            )
    if spec.evaluation.enabled:
        yield Fault(
            "/evaluation/enabled",
            f"Original and result are compared on text, and {_WITHOUT}, or set enabled to false.",
        )
