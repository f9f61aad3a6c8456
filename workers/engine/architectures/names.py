"""How a tensor's name in a checkpoint relates to a model's own."""

from __future__ import annotations

from app.spec.architectures import ARCHITECTURES

# What transformers 5.23 calls the layers of ViT and DeiT, whose files keep the names they always had. In this order.
_RENAMED = (
    ("encoder.layer.", "layers."),
    ("attention.attention.query.", "attention.q_proj."),
    ("attention.attention.key.", "attention.k_proj."),
    ("attention.attention.value.", "attention.v_proj."),
    ("attention.output.dense.", "attention.o_proj."),
    ("intermediate.dense.", "mlp.fc1."),
    ("output.dense.", "mlp.fc2."),
)


def name_in_memory(stored: str, architecture: str) -> str:
    """A stored tensor's name in the model that transformers makes of the file, where the two differ: in ViT and DeiT."""
    known = ARCHITECTURES[architecture]
    if not known.takes_images or known.is_convolutional:
        return stored
    for old, new in _RENAMED:
        stored = stored.replace(old, new)
    return stored


def name_within_base(stored: str, prefix: str) -> str:
    """A stored tensor's name without the prefix that models with a head put before those of the model below it.

    Old checkpoints call a norm's weight gamma and its bias beta: they get today's names. Mixtral's files say
    block_sparse_moe where transformers' module is called mlp.
    """
    name = stored.removeprefix(f"{prefix}.").replace(".block_sparse_moe.", ".mlp.")
    for old, new in (("gamma", "weight"), ("beta", "bias")):
        if name.endswith(f"LayerNorm.{old}"):
            return name.removesuffix(old) + new
    return name
