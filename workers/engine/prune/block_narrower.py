"""Take channels out of one block, and leave the block with what its narrower self computes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from app.errors import JobFailed
from app.spec.architectures import Architecture
from app.spec.prune import PruneHeads, PruneWidth
from workers.engine.calibration.block_stream import LiveBlock
from workers.engine.calibration.input_moments import InputSite, gather_moments, reached_sites
from workers.engine.checkpoint import Checkpoint
from workers.engine.checkpoint.selection import non_finite
from workers.engine.freed_memory import release_freed_memory
from workers.engine.prune.channel_selection import refitted
from workers.engine.quantize.compensation import output_error
from workers.engine.quantize.silent_channels import SilentChannels

_ATTEMPTS = 4


class Cut(Protocol):
    """Which channels there are, and which of them go."""

    def reads(self, name: str) -> bool:
        """Whether a tensor is the weight that is given the channels."""

    def hardest_to_replace(self, weight: Tensor, inverse: Tensor) -> Tensor:
        """The channels that stay when others can make up for those that go: ascending indices of the reader's inputs.

        weight (out, in) and inverse = H⁻¹ (in, in), float32, are both used up.
        """

    def strongest(self, weight: Tensor, second_moment: Tensor) -> Tensor:
        """The same when nothing makes up for them: weight (out, in), H (in, in)."""

    def rows(self, name: str, kept: Tensor) -> tuple[int, Tensor] | None:
        """What stays of a tensor that writes the channels, a dimension and indices along it; None for any other."""


@dataclass
class NarrowedBlock:
    """What became of a block."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    """Those that hold channels, narrower, and the bias that makes up for what went; as they are stored, by name."""
    lost: float = 0.0
    """tr(D H Dᵀ) of the layer that reads the channels, D what it is changed by."""
    had: float = 0.0
    """The same of tr(W H Wᵀ)."""
    warnings: list[str] = field(default_factory=list)
    silent: SilentChannels = field(default_factory=SilentChannels)

    def record(self) -> dict[str, Any]:
        """What is to be reported, fit for JSON."""
        return {
            "outputs_lost": self.lost,
            "outputs_had": self.had,
            "warnings": self.warnings,
            "zero_outputs": self.silent.zero_outputs,
            "dead_inputs": self.silent.dead_inputs,
        }


@dataclass(frozen=True)
class BlockNarrower:
    """Narrows block after block."""

    step: PruneWidth | PruneHeads
    checkpoint: Checkpoint
    architecture: Architecture
    cut: Cut

    @torch.no_grad()
    def narrow(self, block: LiveBlock) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Choose the channels of a block that stay: what is to be written and reported.

        Raises JobFailed when calibration never reaches them.
        """
        wanted = {name for name in block.stored_names.values() if self.cut.reads(name)}
        chosen, (site,) = reached_sites(block, wanted)
        ((inside, stored),) = chosen.items()
        gather_moments(block, [site])
        block.alive()
        done = NarrowedBlock()
        kept = self._narrow_reader(block, site, inside, stored, done)
        self._narrow_writers(block, kept, done)
        release_freed_memory()
        return done.tensors, done.record()

    def _narrow_reader(
        self, block: LiveBlock, site: InputSite, inside: str, stored: str, done: NarrowedBlock
    ) -> Tensor:
        """Cut the layer that is given the channels, in the block too. Returns the channels that stay, ascending."""
        live = self._inputs_last(block.module.get_parameter(f"{inside}.weight"))
        bias = block.stored_names.get(f"{inside}.bias")
        mean, moment, weight = site.mean(), site.second_moment(), live.float()
        _check_finite(stored, weight, moment)
        done.silent.look_at_weight(stored, live)
        done.silent.look_at_inputs([stored], moment.diagonal())
        if self.step.repair and bias is not None:
            # A bias can take the mean of what goes: only what varies is lost (as in An et al. 2024, FLAP, section 3.3).
            moment.addr_(mean, mean, alpha=-1)
        damping = self.step.damping_for(channels=len(mean), tokens=site.tokens)
        kept, narrow = self._solved(weight, moment, damping, stored, done)
        block.alive()
        narrow = narrow.to(self.checkpoint.tensors[stored].dtype)
        change = weight.neg()
        change[:, kept] += narrow.float()
        # Rounding can bring a sum of nothing below zero.
        done.lost, done.had = (max(0.0, output_error(d, moment)) for d in (change, weight))
        done.tensors[stored] = self._inputs_last(narrow).cpu().contiguous()
        # The same function in the old width: what follows is calibrated on it.
        live.zero_()
        live[:, kept] = narrow.to(live.dtype)
        if self.step.repair and bias is not None:
            parameter = block.module.get_parameter(f"{inside}.bias")
            moved = (parameter.float() - change @ mean).to(self.checkpoint.tensors[bias].dtype)
            done.tensors[bias] = moved.cpu()
            parameter.copy_(moved)
        return kept

    def _solved(
        self, weight: Tensor, moment: Tensor, damping: float, name: str, done: NarrowedBlock
    ) -> tuple[Tensor, Tensor]:
        """The channels that stay, and their weights in the reading layer: (kept,), (out, kept)."""
        if self.step.repair:
            diagonal = moment.diagonal().clone()
            inverse = _damped_inverse_(moment, damping, name, done.warnings)
            if inverse is not None:
                # What is never carried is not missed, however strongly it would be read.
                kept = self.cut.hardest_to_replace(weight * (diagonal > 0), inverse)
                del inverse
                narrow = refitted(weight, moment, kept)
                moment.diagonal().copy_(diagonal)
                return kept, narrow
            moment.diagonal().copy_(diagonal)
        kept = self.cut.strongest(weight, moment)
        return kept, weight[:, kept]

    def _narrow_writers(self, block: LiveBlock, kept: Tensor, done: NarrowedBlock) -> None:
        """Cut the layers that give the channels, bit by bit as they are stored."""
        kept = kept.cpu()
        for name in block.stored_names.values():
            rows = None if name in done.tensors else self.cut.rows(name, kept)
            if rows is not None:
                done.tensors[name] = self.checkpoint.read(name).index_select(*rows)

    def _inputs_last(self, weight: Tensor) -> Tensor:
        """(out, in) of what is stored, or the other way round: a view."""
        return weight.t() if self.architecture.inputs_first else weight


def _damped_inverse_(moment: Tensor, damping: float, name: str, warnings: list[str]) -> Tensor | None:
    """(H + damping)⁻¹, H left as damped as it had to be; None where there is none.

    Each diagonal element grows by a share of itself, which shrinks the correlations and leaves the choice the same
    whatever a channel's scale (Schäfer and Strimmer 2005, "A shrinkage approach to large-scale covariance matrix estimation").
    """
    before = moment.diagonal().clone()
    # A channel that is always zero depends on no other: any number will do.
    scale = torch.where(before > 0, before, torch.ones_like(before))
    for attempt in range(_ATTEMPTS):
        strength = damping * 10**attempt
        moment.diagonal().copy_((1 + strength) * scale)
        factor, failed = torch.linalg.cholesky_ex(moment)
        if not int(failed):
            if attempt:
                warnings.append(f"damped by {strength:g} to have a factor: {name}")
            return torch.cholesky_inverse(factor)
    warnings.append(f"not repaired, since the inputs' statistics have no factor: {name}")
    return None


def _check_finite(name: str, weight: Tensor, moment: Tensor) -> None:
    """Raise JobFailed for inputs that are not finite, InvalidRequest for such a weight."""
    if not torch.isfinite(moment.diagonal()).all():
        raise JobFailed(
            f"The inputs of {name} are NaN or infinite on the calibration text.",
            code="non_finite_activations",
            hint="Check that the original gives sensible outputs in float32; prune.magnitude needs no activations.",
        )
    if not torch.isfinite(weight).all():
        raise non_finite(name)
