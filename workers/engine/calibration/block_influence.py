"""How much each block of a model changes what passes through it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from workers.engine.calibration.block_stream import stream_blocks
from workers.engine.technique import Progress


def block_influence(
    directory: Path, windows: Tensor, *, spool_directory: Path, device: str, progress: Progress
) -> list[float]:
    """Block influence, 1 − cos(input, output) averaged over tokens, of each block in order (Men et al. 2024, eq. 1)."""
    sums: dict[int, float] = {}

    def visit(index: int, before: Tensor, after: Tensor) -> None:
        cosine = torch.nn.functional.cosine_similarity(before, after, dim=-1)
        sums[index] = sums.get(index, 0.0) + float((1 - cosine).double().sum())

    stream_blocks(
        directory, windows, visit, spool_directory=spool_directory, device=device, progress=progress
    )
    return [sums[index] / windows.numel() for index in sorted(sums)]
