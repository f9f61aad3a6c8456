"""How much each block of a model changes what passes through it."""

from __future__ import annotations

import torch
from torch import Tensor

from workers.engine.calibration.block_stream import Calibration, stream_blocks


def block_influence(calibration: Calibration) -> list[float]:
    """Block influence, 1 − cos(input, output) averaged over tokens, of each block in order (Men et al. 2024, eq. 1)."""
    sums: dict[int, float] = {}

    def visit(index: int, before: Tensor, after: Tensor) -> None:
        cosine = torch.nn.functional.cosine_similarity(before, after, dim=-1)
        sums[index] = sums.get(index, 0.0) + float((1 - cosine).double().sum())

    stream_blocks(calibration, visit)
    return [sums[index] / calibration.windows.numel() for index in sorted(sums)]
