from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

import pytest
import torch
from tiny_models import BLOCKS

from workers.engine.architectures.block_removal import remove_blocks
from workers.engine.architectures.loading import load_model
from workers.engine.distill.blocks import blocks_of
from workers.engine.distill.cut import least_missed, without


def test_blocks_that_cost_least_together_go() -> None:
    costs = {0: 9.0, 1: 1.0, 2: 1.5, 3: 2.0, 4: 8.0}

    def loss(gone: Collection[int]) -> float:
        # Neighbours of the same kind miss each other.
        return sum(costs[block] for block in gone) + (5.0 if {1, 2} <= set(gone) else 0.0)

    assert least_missed(loss, range(5), 1) == [1]
    assert least_missed(loss, range(5), 2) == [1, 3]
    assert least_missed(loss, range(1, 5), 4) == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "architecture", ["LlamaForCausalLM", "GPT2LMHeadModel", "DistilBertModel", "Gemma3ForCausalLM"]
)
@torch.inference_mode()
def test_without_a_block_the_model_is_as_if_it_were_removed(
    architecture: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    model, ids = load_model(tiny(architecture)), torch.arange(5, 25)[None]
    whole = model(input_ids=ids)[0]
    with without(blocks_of(model), [1, 2]):
        skipped = model(input_ids=ids, **({} if architecture == "DistilBertModel" else {"use_cache": False}))[
            0
        ]
    remove_blocks(tiny(architecture), tmp_path, [1, 2], max_shard_bytes=2**30, progress=lambda *_: None)
    torch.testing.assert_close(skipped, load_model(tmp_path)(input_ids=ids)[0])
    assert len(blocks_of(model)) == BLOCKS
    assert torch.equal(model(input_ids=ids)[0], whole)
