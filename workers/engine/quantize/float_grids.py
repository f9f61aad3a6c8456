"""Grids of numbers that are not evenly spaced: E4M3 (8 bits), E2M1 (4 bits) in the groups of MXFP4 and NVFP4, and NF4.

A code is the number itself, w ≈ s·q. Numbers half-way between two go to the one with an even mantissa, as hardware
rounds. MXFP4's scale is a power of two (E8M0); NVFP4's is an E4M3 number over a float32 that the whole weight shares.
Sources: OCP 8-bit Floating Point Specification 1.0, sec. 5; OCP Microscaling Formats 1.0, sec. 5.3 and 6.3; NVIDIA,
"Pretraining Large Language Models with NVFP4" (2025), sec. 2; Dettmers et al. 2023, "QLoRA: Efficient Finetuning of
Quantized LLMs", sec. 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from workers.engine.quantize.grid import Schedule, divisor, evenly

E4M3_MAX = 448.0
_E4M3_SMALLEST = 2.0**-9
E2M1_MAX = 6.0
# From the smallest normal float32, whose reciprocal is finite, to the largest power of two.
_EXPONENTS = (-126, 127)

# The spacing of numbers doubles at powers of two: one octave of scales shows all there is to gain. Within 1 % of the
# error of 300 candidates on Gaussian rows of 576; the largest weight at 448 has 8 % more.
_E4M3_SCHEDULE = Schedule(evenly(1.0, 2.1, 16), (), (-0.036, -0.018, 0.018, 0.036), refits=1)
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""Quantiles of a normal distribution over the largest, eight above zero and seven below, as bitsandbytes has them."""
_POWERS_OF_TWO = Schedule((0.5, 1.0, 2.0), (), (), refits=0)
# Up to 1.5, where the largest weight becomes 4 instead of 6: there is no number between the two.
# Within 0.3 % of the error of 300 candidates on Gaussian groups and on three layers of SmolLM2, and 15 % below absmax's.
_NF4_SCHEDULE = Schedule(evenly(0.7, 1.4, 15), (), (-0.025, 0.025), refits=1)
_E2M1_SCHEDULE = Schedule(evenly(0.7, 1.6, 13), (), (-0.04, -0.02, 0.02, 0.04), refits=1)


class _FloatGrid:
    """What all have in common: no zero points, and a largest number that the largest weight of a group begins at."""

    largest: float = E2M1_MAX
    symmetric: bool = True

    @property
    def code_dtype(self) -> torch.dtype:
        """The smallest that holds all codes."""
        return torch.float16

    def nearest_(self, exact: Tensor) -> Tensor:
        """Round w/s to the nearest E2M1 numbers, in place: 0, ½, 1, 1½, 2, 3, 4 and 6, of either sign."""
        magnitude = exact.abs()
        step = torch.where(magnitude < 4, 1.0, 2.0).masked_fill_(magnitude < 2, 0.5)
        return exact.div_(step).round_().mul_(step).clamp_(-E2M1_MAX, E2M1_MAX)

    def start(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point that cover the weights of each group: (…, size) -> (…, 1), (…, 1)."""
        peak = groups.abs().amax(-1, keepdim=True)
        return peak / self.largest, torch.zeros_like(peak)

    def clamp_zero(self, zero: Tensor) -> Tensor:
        """The nearest zero point that can be stored: there is none but zero."""
        return torch.zeros_like(zero)


@dataclass(frozen=True)
class Fp8Grid(_FloatGrid):
    """E4M3: seven bits of magnitude up to 448."""

    shared_scale: float | None = None
    """The scale of all groups, where the whole weight has one."""

    largest = E4M3_MAX

    @property
    def schedule(self) -> Schedule:
        """The candidates worth trying."""
        return _E4M3_SCHEDULE if self.shared_scale is None else Schedule((), (), (), refits=0)

    def nearest_(self, exact: Tensor) -> Tensor:
        """Round w/s to the nearest E4M3 numbers, in place."""
        return exact.copy_(exact.clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn))

    def stored(self, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """The scale as a loader will read it, in the checkpoint's own dtype; never zero."""
        if self.shared_scale is not None:
            scale = torch.full_like(scale, self.shared_scale)
        return divisor(scale.abs().to(dtype).float())


@dataclass(frozen=True)
class Mxfp4Grid(_FloatGrid):
    """E2M1 under a scale that is a power of two."""

    @property
    def schedule(self) -> Schedule:
        """The candidates worth trying."""
        return _POWERS_OF_TWO

    def stored(self, scale: Tensor, dtype: torch.dtype) -> Tensor:  # noqa: ARG002 - the same in any checkpoint
        """The nearest power of two; one for a group of zeros."""
        exponent = torch.log2(divisor(scale.abs())).round_().clamp_(*_EXPONENTS)
        return torch.exp2(exponent)


@dataclass(frozen=True)
class Nvfp4Grid(_FloatGrid):
    """E2M1 under an E4M3 scale, which is divided by one number for the whole weight."""

    global_scale: float
    """Exactly representable in float32."""

    @property
    def schedule(self) -> Schedule:
        """The candidates worth trying."""
        return _E2M1_SCHEDULE

    def stored(self, scale: Tensor, dtype: torch.dtype) -> Tensor:  # noqa: ARG002 - the same in any checkpoint
        """The nearest E4M3 number over the global scale; never zero."""
        return self.local_scale(scale).float().div_(self.global_scale)

    def local_scale(self, scale: Tensor) -> Tensor:
        """What is stored of a scale: E4M3, of its shape."""
        local = (scale.abs() * self.global_scale).clamp_(_E4M3_SMALLEST, E4M3_MAX)
        return local.to(torch.float8_e4m3fn)


@dataclass(frozen=True)
class Nf4Grid(_FloatGrid):
    """NF4: 16 numbers from −1 to 1, under a float32 scale."""

    largest = 1.0

    @property
    def code_dtype(self) -> torch.dtype:
        """The smallest that holds all codes."""
        return torch.float32

    @property
    def schedule(self) -> Schedule:
        """The candidates worth trying."""
        return _NF4_SCHEDULE

    def nearest_(self, exact: Tensor) -> Tensor:
        """Round w/s to the nearest of the numbers, in place."""
        levels, _ = _nf4_levels(exact.device)
        return exact.copy_(levels[self.places(exact)])

    def places(self, exact: Tensor) -> Tensor:
        """The places of the nearest numbers in ascending order: of any shape, int32."""
        _, bounds = _nf4_levels(exact.device)
        return torch.bucketize(exact, bounds, out_int32=True)

    def stored(self, scale: Tensor, dtype: torch.dtype) -> Tensor:  # noqa: ARG002 - the same in any checkpoint
        """The magnitude as it is; never zero."""
        return divisor(scale.abs())


@cache
def _nf4_levels(device: torch.device) -> tuple[Tensor, Tensor]:
    """The numbers (16,) and what lies half-way between them (15,)."""
    levels = torch.tensor(NF4_LEVELS, device=device)
    return levels, (levels[1:] + levels[:-1]) / 2


def global_scale(peak: float) -> float:
    """What scales of groups are multiplied by, so that the largest takes all of E4M3: for weights or inputs up to `peak`."""
    if peak < torch.finfo(torch.float32).tiny * E4M3_MAX * E2M1_MAX:
        return 1.0
    return float(torch.tensor(E4M3_MAX * E2M1_MAX / peak, dtype=torch.float32))
