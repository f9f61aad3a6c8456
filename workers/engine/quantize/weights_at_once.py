"""How many weights of a layer are worked on at once."""

from __future__ import annotations

import torch

from app.spec.calibration_memory import NARROW_WEIGHTS_AT_ONCE, WEIGHTS_AT_ONCE

# A GPU works on columns one after the other: the more rows at once, the more of it works. Each takes some 44 bytes.
_ON_GPU = 2**26
_ON_SMALL_GPU = 2**24
_SMALL_GPU_BYTES = 16 * 2**30


def weights_at_once(device: torch.device, *, narrow: bool) -> int:
    """The most weights whose scales and codes are solved together; `narrow`: where memory is short."""
    if device.type == "cpu":
        return NARROW_WEIGHTS_AT_ONCE if narrow else WEIGHTS_AT_ONCE
    small = torch.cuda.get_device_properties(device).total_memory < _SMALL_GPU_BYTES
    return _ON_SMALL_GPU if small or narrow else _ON_GPU
