"""Does what a config says agree with the tensors? A mismatch would fail at hour six, or worse, not at all."""

from __future__ import annotations

from app.intake.refusals import refused
from app.spec.architectures import block_index
from app.spec.facts import ModelFacts, TensorFact

_EMBEDDINGS = (
    "embed_tokens.weight", "embeddings.word_embeddings.weight", "embeddings.tok_embeddings.weight", "embed_in.weight",
    "wte.weight",
)  # fmt: skip
_INPUT_NORMS = (
    "input_layernorm.weight", "LayerNorm.weight", "sa_layer_norm.weight", "self_attn_layer_norm.weight", "ln_1.weight",
)  # fmt: skip


def check_shapes(facts: ModelFacts, name: str, *, embedding_size: int | None = None) -> None:
    """Raise IntakeError unless blocks, hidden size and vocabulary are those of the tensors.

    `embedding_size` is the width of the word embeddings where it may differ from the hidden size.
    """
    check_blocks(facts, name)
    embedding = next((t for t in facts.tensors if t.name.endswith(_EMBEDDINGS)), None)
    if embedding is None:
        raise refused("tensor_missing", f"{name} has no word embeddings.")
    expected = (facts.vocab_size, embedding_size or facts.hidden_size)
    if embedding.shape != expected:
        raise refused(
            "config_mismatch",
            f"{name}: {embedding.name} has shape {list(embedding.shape)}, but the config says {list(expected)}.",
        )
    for tensor in facts.tensors:
        _check_norm(tensor, facts.hidden_size, name)


def check_blocks(facts: ModelFacts, name: str) -> None:
    """Raise IntakeError unless the blocks of the tensors are as many as the config says, without a gap."""
    indices = {index for t in facts.tensors if (index := block_index(t.name)) is not None}
    # Not a set of as many as the config says: it may say two thousand million.
    if len(indices) != facts.num_blocks or max(indices, default=-1) != facts.num_blocks - 1:
        missing = sorted(set(range(min(facts.num_blocks, 10_000))) - indices)
        what = f"{missing[0]} is missing" if missing else f"there is a block {max(indices)}"
        raise refused(
            "config_mismatch",
            f"{name}: the config says {facts.num_blocks} blocks, but of the tensors {what}.",
        )


def _check_norm(tensor: TensorFact, hidden_size: int, name: str) -> None:
    is_norm = block_index(tensor.name) is not None and tensor.name.endswith(_INPUT_NORMS)
    if is_norm and tensor.shape != (hidden_size,):
        raise refused(
            "config_mismatch",
            f"{name}: {tensor.name} has shape {list(tensor.shape)}, but the hidden size is {hidden_size}.",
        )
