"""How a tensor's name in a checkpoint relates to a model's own."""

from __future__ import annotations


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
