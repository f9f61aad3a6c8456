"""Write a model again without some of its blocks, so that any loader reads the rest by its config alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from app.errors import InvalidRequest, UnsupportedForModel
from app.spec.architectures import architecture_in, block_index, with_block_index
from app.spec.facts import TensorFact
from workers.engine.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    copy_side_files,
    row_slabs,
    write_config,
)
from workers.engine.technique import Progress


def remove_blocks(
    source: Path,
    target: Path,
    dropped: Sequence[int],
    *,
    replaced: Mapping[str, Tensor] = MappingProxyType({}),
    max_shard_bytes: int,
    progress: Progress,
) -> None:
    """Copy a model to `target` without the blocks in `dropped`; the others keep their behaviour, and their weights.

    `replaced` holds tensors that are written in the place of the source's, by their names there, as they are to be stored.
    Streamed slab by slab. Raises InvalidRequest when no block would be left, or a first one that is built differently
    would go.
    """
    checkpoint = Checkpoint.open(source)
    blocks = number_of_blocks(checkpoint.config)
    kept = [index for index in range(blocks) if index not in set(dropped)]
    if not kept:
        raise InvalidRequest(
            f"All {blocks} blocks of the model would be removed.",
            code="too_many_blocks",
            hint=f"Remove at most {blocks - 1} blocks.",
        )
    if architecture_in(checkpoint.config).keeps_first_block and kept[0] != 0:
        raise InvalidRequest(
            "The first block of this model is built differently, and no other can take its place.",
            code="first_block_differs",
            hint="Keep the first block.",
        )
    new_names = {
        entry.name: name
        for entry in checkpoint.tensors.values()
        if (name := _renumbered(entry.name, kept)) is not None
    }
    copy_side_files(source, target)
    write_config(target, config_without_blocks(source, checkpoint.config, kept))
    facts = [
        TensorFact(name=new_names[fact.name], dtype=fact.dtype, shape=fact.shape)
        for fact in checkpoint.facts()
        if fact.name in new_names
    ]
    with CheckpointWriter(target, facts, max_shard_bytes) as writer:
        for number, (old, new) in enumerate(new_names.items()):
            if old in replaced:
                writer.write(new, replaced[old])
                continue
            for slab in row_slabs(checkpoint.tensors[old]):
                writer.write_rows(new, slab.start, checkpoint.read_rows(old, slab.start, slab.stop))
                progress(number / len(new_names), f"writing {new}")
    progress(1.0, f"wrote {len(kept)} of {blocks} blocks")


def number_of_blocks(config: dict[str, Any]) -> int:
    """How many blocks the model of a config.json has."""
    return int(config[architecture_in(config).blocks_key])


def config_without_blocks(source: Path, config: dict[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """The config of the blocks in `kept` alone.

    What depends on a block's place (attention windows, rotary embeddings) is spelled out per block, as transformers
    resolves it for the whole model: rules such as "every sixth" or "the first so many" would hit other blocks now.
    Raises UnsupportedForModel for a GPT-2 that divides attention scores by the number of the block.
    """
    import transformers

    if config.get("scale_attn_by_inverse_layer_idx"):
        raise UnsupportedForModel(
            "This model divides attention scores by the number of the block, and without a block the others would be"
            " numbered anew.",
            code="scaled_by_block_number",
            hint="Keep all blocks: use a technique other than removing some.",
        )

    resolved = transformers.AutoConfig.from_pretrained(
        str(source), local_files_only=True, trust_remote_code=False
    ).to_dict()
    blocks = number_of_blocks(config)
    per_block = {
        key: [value[index] for index in kept]
        for key, value in (resolved | config).items()
        if "layer" in key and isinstance(value, list) and len(value) == blocks
    }
    return (
        config
        | per_block
        | _mixture_rules(resolved | config, kept)
        | {architecture_in(config).blocks_key: len(kept)}
    )


def _mixture_rules(config: dict[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """Which of the blocks in `kept` have one dense layer instead of experts, for models that say so by number."""
    if "mlp_only_layers" not in config:
        return {}
    dense = set(config["mlp_only_layers"] or ())
    every = config.get("decoder_sparse_step", 1)
    is_dense = [index in dense or (index + 1) % every != 0 for index in kept]
    return {"mlp_only_layers": [new for new, yes in enumerate(is_dense) if yes], "decoder_sparse_step": 1}


def _renumbered(name: str, kept: Sequence[int]) -> str | None:
    """The name of a tensor after the removal; None if it goes."""
    index = block_index(name)
    if index is None:
        return name
    return with_block_index(name, list(kept).index(index)) if index in kept else None
