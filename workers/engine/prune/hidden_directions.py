"""Which directions of a language model's states stay: the same for every place that reads them.

States that the blocks add to may be turned as long as all that reads or writes them turns with them. The strongest
directions are those of the normed states, with all places where a norm takes them counting alike: what is lost is then
least in what the layers are given (principal components; Ashkboos et al. 2024, "SliceGPT", section 3, where each block
has directions of its own, and a matrix on every skip connection turns the ones into the next: no plain configuration
has that).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from app.errors import JobFailed
from app.spec.prune_hidden import ATTENTION_NORM, FEED_FORWARD_NORM
from workers.engine.calibration.block_stream import Calibration, LiveBlock, stream_blocks
from workers.engine.calibration.input_moments import InputSite
from workers.engine.freed_memory import release_freed_memory


@dataclass(frozen=True)
class Directions:
    """An orthonormal basis of what stays of the states, and how those are told in it."""

    basis: Tensor
    """Q: (hidden, width), float32."""

    @property
    def scale(self) -> float:
        """√(width / hidden): narrow states times this have the mean square that RMSNorm, and its epsilon, knew."""
        return math.sqrt(self.basis.shape[1] / self.basis.shape[0])

    @property
    def narrowing(self) -> Tensor:
        """From states to narrow ones, on the right: (hidden, width)."""
        return self.scale * self.basis

    @property
    def reading(self) -> Tensor:
        """Narrow states times its transpose are what is left of the states: (hidden, width)."""
        return self.basis / self.scale

    def on(self, device: str) -> Directions:
        """The same on a device."""
        return Directions(self.basis.to(device))


def normed(states: Tensor, epsilon: float) -> Tensor:
    """What RMSNorm gives before its gains, a token a row: (windows, tokens, hidden) -> (tokens, hidden), float32."""
    rows = states.flatten(0, -2).float()
    return rows * torch.rsqrt(rows.square().mean(1, keepdim=True) + epsilon)


@torch.no_grad()
def moment_of_states(calibration: Calibration, *, last_block: int, epsilon: float) -> Tensor:
    """E[x xᵀ] of the normed states, over all tokens and all norms that take them: (hidden, hidden), float32.

    On one device: what hooks add up, the copies of a block on others would share.
    """
    site = InputSite([ATTENTION_NORM, FEED_FORWARD_NORM])

    def look(_norm: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        site.add(normed(arguments[0], epsilon))

    def prepare(block: LiveBlock) -> None:
        release_freed_memory()
        for norm in (ATTENTION_NORM, FEED_FORWARD_NORM):
            block.module.get_submodule(norm).register_forward_pre_hook(look)

    def visit(index: int, _before: Tensor, after: Tensor) -> None:
        if index == last_block:
            site.add(normed(after, epsilon))

    stream_blocks(calibration, visit, prepare=prepare)
    return site.second_moment()


def strongest_directions(moment: Tensor, width: int) -> Tensor:
    """The eigenvectors of the largest eigenvalues: (hidden, hidden) -> (hidden, width), float32.

    Raises JobFailed when the moment is not finite.
    """
    if not torch.isfinite(moment).all():
        raise JobFailed(
            "The states between blocks are NaN or infinite on the calibration text.",
            code="non_finite_activations",
            hint="Check that the original gives sensible outputs in float32.",
        )
    # On the processor, whose eigenvectors are the same each time.
    vectors: Tensor = torch.linalg.eigh(moment.cpu().double()).eigenvectors
    return vectors[:, -width:].flip(1).float().contiguous()


def turned_to_gains(basis: Tensor, gains: Tensor) -> Tensor:
    """A basis of the same span in which gains (hidden,) are those of single directions: Qᵀ diag(γ) Q = diag(λ).

    Where embedding and head share one matrix, gains before the head cannot be moved into it.
    """
    basis = basis.double()
    vectors: Tensor = torch.linalg.eigh(basis.T @ (gains.double()[:, None] * basis)).eigenvectors
    return (basis @ vectors).float().contiguous()
