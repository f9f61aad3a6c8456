"""How many weights of a layer are worked on at once."""

from __future__ import annotations

import torch
from torch import Tensor

from app.spec import calibration_memory

# A GPU works on columns one after the other: the more rows at once, the more of it works. Each takes some 44 bytes.
_ON_GPU = 2**26
_ON_SMALL_GPU = 2**24
_SMALL_GPU_BYTES = 16 * 2**30


def weights_at_once(weight: Tensor, *, narrow: bool) -> int:
    """The most weights like these (rows, columns) that are solved together; `narrow`: where memory is short."""
    if weight.device.type == "cpu":
        return calibration_memory.weights_at_once(weight.shape[1], narrow=narrow)
    small = torch.cuda.get_device_properties(weight.device).total_memory < _SMALL_GPU_BYTES
    return _ON_SMALL_GPU if small or narrow else _ON_GPU
