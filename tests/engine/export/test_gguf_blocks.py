"""Our bit layouts against the `gguf` package's dequantizers, which share no code with them."""

from __future__ import annotations

import gguf
import pytest
import torch

from workers.engine.export.gguf.blocks import pack_blocks
from workers.engine.quantize.gguf_scales import GRIDS, BlockScales

ROWS, COLUMNS = 3, 512


def random_scales(name: str, generator: torch.Generator) -> BlockScales:
    grid = GRIDS[name]
    blocks, groups = COLUMNS // grid.block, COLUMNS // grid.group

    def floats() -> torch.Tensor:
        return torch.randn(ROWS, blocks, generator=generator).half().float()

    def integers(low: int, high: int) -> torch.Tensor:
        return torch.randint(low, high + 1, (ROWS, groups), generator=generator).float()

    if grid.groups == 1:
        return BlockScales(grid, floats(), floats() if grid.lows == "any" else None)
    if grid.lows == "centre":
        return BlockScales(grid, floats(), None, integers(-128, 127))
    return BlockScales(grid, floats(), floats(), integers(0, 63), integers(0, 63))


@pytest.mark.parametrize("name", GRIDS)
def test_packed_blocks_are_read_as_the_weights_they_stand_for(name: str) -> None:
    generator = torch.Generator().manual_seed(len(name))
    codes = torch.randint(0, GRIDS[name].levels, (ROWS, COLUMNS), generator=generator).float()
    scales = random_scales(name, generator)
    packed = pack_blocks(codes, scales, name)
    kind = gguf.GGMLQuantizationType[name]
    assert packed.shape[1] == gguf.quant_shape_to_byte_shape((COLUMNS,), kind)[0]
    read = torch.from_numpy(gguf.dequantize(packed.numpy(), kind))
    torch.testing.assert_close(read, scales.weights(codes), rtol=1e-6, atol=1e-6)
