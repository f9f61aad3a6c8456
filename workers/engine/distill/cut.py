"""Which of a teacher's blocks its student can best do without.

Idea: leave a block out and see what the training's own loss says on a little text, beside the whole teacher. Of the blocks
that are missed least, twice as many as are to go, one after the other goes for good: whichever costs least beside those
that have gone.
Paper: Song et al. 2024, "SLEB: Streamlining LLMs through Redundancy Verification and Elimination of Transformer Blocks",
section 4; there all blocks are tried in every round. Block influence, which `prune.depth` goes by, needs one forward pass
instead, and does not see what the outputs miss.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn


def least_missed(
    loss_without: Callable[[Collection[int]], float], blocks: Sequence[int], count: int
) -> list[int]:
    """Indices of the `count` of these blocks that can best go together, ascending."""
    alone = {block: loss_without([block]) for block in blocks}
    candidates = sorted(alone, key=alone.__getitem__)[: 2 * count]
    gone = candidates[:1]
    while len(gone) < count:
        left = {block: loss_without([*gone, block]) for block in candidates if block not in gone}
        gone.append(min(left, key=left.__getitem__))
    return sorted(gone)


@contextmanager
def without(blocks: nn.ModuleList, gone: Collection[int]) -> Iterator[None]:
    """What enters a block in `gone` also leaves it."""
    handles = [blocks[index].register_forward_hook(_pass_through) for index in gone]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _pass_through(_block: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
    return (arguments[0], *output[1:]) if isinstance(output, tuple) else arguments[0]
