"""The halves of a decoder block that add to its states one after the other, and running a block as far as one of them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from app.spec.prune_hidden import ATTENTION_NORM, FEED_FORWARD_NORM
from workers.engine.architectures.skeleton import BlockCall
from workers.engine.calibration.block_stream import EnoughSeen, LiveBlock


@dataclass(frozen=True)
class BlockPart:
    """Half of a block: a norm, layers that read what it gives, and one that adds to the states."""

    norm: str
    writer: str

    def has(self, name: str) -> bool:
        """Whether a parameter of the block is of one of its layers."""
        return name.partition(".")[0] == self.writer.partition(".")[0]


PARTS = (BlockPart(ATTENTION_NORM, "self_attn.o_proj"), BlockPart(FEED_FORWARD_NORM, "mlp.down_proj"))


def given_to(module: nn.Module, call: BlockCall, hidden: Tensor, layers: Sequence[str]) -> list[Tensor]:
    """What each of a block's layers is given, in the order they are called; nothing is run after the last."""
    seen: list[Tensor] = []

    def look(_layer: nn.Module, arguments: tuple[Any, ...]) -> None:
        seen.append(arguments[0])
        if len(seen) == len(layers):
            raise EnoughSeen

    handles = [module.get_submodule(name).register_forward_pre_hook(look) for name in layers]
    try:
        with suppress(EnoughSeen):
            call.run(module, hidden)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def behind(block: LiveBlock, part: BlockPart, hidden: Tensor) -> Tensor:
    """The states once a part of the original block has added to them."""
    if part.norm == ATTENTION_NORM:
        return given_to(block.module, block.call, hidden, [FEED_FORWARD_NORM])[0]
    return block.call.run(block.module, hidden)
