"""prune.experts: remove the experts of a mixture that calibration text needs least.

Idea: a router that was trained to use all experts alike does not on the text of one purpose, and the outputs of some
weigh little in the sum even where they are chosen. For each block the text says how much each expert adds: the lengths of
its outputs, times the router's weight, summed over its tokens. The least go with their rows of the router; the others,
and what the router makes of them, stay as they are, since softmax over fewer rows shares out what is left.
Papers: Lu et al. 2024, "Not All Experts are Equal"; Lasby et al. 2025, "REAP the Experts".
Left out: merging experts, another number for each block (config.json has one), and training afterwards, which
distill.logits does.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from app.errors import InvalidRequest, UnsupportedForModel
from app.spec.architectures import architecture_in, block_index, is_compressible
from app.spec.facts import TensorFact
from app.spec.prune_experts import (
    EXPERT_COUNT_KEYS,
    PruneExperts,
    expert_number,
    experts_in,
    has_row_per_expert,
    with_expert_number,
)
from app.spec.report import LayerOutcome
from workers.engine.architectures.experts import SeparateExperts
from workers.engine.calibration.block_stream import Calibration, LiveBlock, stream_blocks
from workers.engine.calibration.step_calibration import step_calibration
from workers.engine.calibration.text_checks import calibration_flags
from workers.engine.checkpoint import Checkpoint, CheckpointWriter, copy_side_files, row_slabs, write_config
from workers.engine.checkpoint.selection import select_layers
from workers.engine.technique import StepContext, StepOutcome, implements

# Copying what is left takes far less time than looking.
_LOOKING = 0.9


@implements(PruneExperts)
def prune_experts(step: PruneExperts, context: StepContext) -> StepOutcome:
    """Write `context.target` with fewer experts in every block, everything else as it was.

    Raises UnsupportedForModel for a model that is no mixture or is quantized, InvalidRequest when each token meets as
    many experts as there are, or the calibration text is too short.
    """
    checkpoint = Checkpoint.open(context.source)
    select_layers(checkpoint, ())
    before = experts_in(checkpoint.facts())
    after = _experts_after(step, checkpoint, before)
    layers = architecture_in(checkpoint.config).expert_layers
    if layers is None:
        raise ValueError("a mixture whose experts' layers have no names")
    with step_calibration(context, tokens=step.calibration_tokens, share=_LOOKING) as calibration:
        added = contributions(calibration, layers[-1], by_length=step.criterion == "contribution")
        flags = calibration_flags(context, calibration.windows, tokens=step.calibration_tokens)
    generator = torch.Generator().manual_seed(context.seed)
    kept = {
        block: most_needed(
            torch.rand(before, generator=generator) if step.criterion == "random" else scores, after
        )
        for block, scores in added.items()
    }
    _write(checkpoint, kept, after, context)
    return StepOutcome(
        layers=tuple(
            _outcome(fact, kept) for fact in checkpoint.facts() if is_compressible(fact.name, fact.shape)
        ),
        metrics={"experts_before": before, "experts_after": after},
        curves={"removed_share_of_contribution": tuple(_lost(added, kept))},
        flags=flags,
    )


def _experts_after(step: PruneExperts, checkpoint: Checkpoint, before: int) -> int:
    if before == 0:
        raise UnsupportedForModel(
            "The model is no mixture of experts.", hint="Use prune.width, prune.heads or prune.depth."
        )
    per_token = int(checkpoint.config["num_experts_per_tok"])
    after = step.experts_after(before, per_token)
    if after is None:
        raise InvalidRequest(
            f"Of {before} experts each token meets {per_token}, and no smaller multiple of {step.round_to} is left.",
            code="too_few_experts",
            hint="Ask for a smaller round_to, or use prune.depth.",
        )
    return after


def contributions(calibration: Calibration, down: str, *, by_length: bool) -> dict[int, Tensor]:
    """What each expert adds, by block: (experts,) float64; blocks without experts are left out.

    The lengths of its outputs times the router's weights, summed over its tokens; or how many tokens it is given.
    `down` names the last layer of an expert.
    """
    added: dict[int, Tensor] = {}

    def prepare(block: LiveBlock) -> None:
        for experts in (m for m in block.module.modules() if isinstance(m, SeparateExperts)):
            added[block.index] = torch.zeros(len(experts.experts()), dtype=torch.float64)
            _watch(experts, added[block.index], down, by_length=by_length)

    # What hooks add up, the copies of a block on other devices would share.
    stream_blocks(replace(calibration, more_devices=()), prepare=prepare)
    return added


def _watch(experts: SeparateExperts, added: Tensor, down: str, *, by_length: bool) -> None:
    """Add to `added` what every forward pass shows."""
    routed: list[tuple[Tensor, Tensor]] = []

    def note_routes(_module: nn.Module, arguments: tuple[Tensor, Tensor, Tensor]) -> None:
        routed[:] = [arguments[1:]]

    def note_output(number: int, _module: nn.Module, _arguments: object, output: Tensor) -> None:
        chosen, weights = routed[0]
        tokens, place = torch.where(chosen == number)
        lengths = output.double().norm(dim=-1) * weights[tokens, place].double()
        added[number] += lengths.sum().cpu() if by_length else len(tokens)

    experts.register_forward_pre_hook(note_routes)
    for number, expert in enumerate(experts.experts()):
        expert.get_submodule(down).register_forward_hook(partial(note_output, number))


def most_needed(scores: Tensor, count: int) -> list[int]:
    """The `count` experts that score highest, ascending; the earlier one wins a tie."""
    return sorted(torch.sort(scores, descending=True, stable=True).indices[:count].tolist())


def _write(checkpoint: Checkpoint, kept: dict[int, list[int]], after: int, context: StepContext) -> None:
    """Copy slab by slab what stays, experts numbered anew."""
    new_names = {name: new for name in checkpoint.tensors if (new := _renumbered(name, kept)) is not None}
    rows = {name: _rows(name, kept) for name in new_names}
    facts = [
        TensorFact(
            name=new_names[f.name], dtype=f.dtype, shape=f.shape if rows[f.name] is None else (after, *f.shape[1:])
        )
        for f in checkpoint.facts()
        if f.name in new_names
    ]  # fmt: skip
    with CheckpointWriter(context.target, facts, context.max_shard_bytes) as writer:
        for number, (old, new) in enumerate(new_names.items()):
            context.progress(_LOOKING + (1 - _LOOKING) * number / len(new_names), f"writing {new}")
            chosen = rows[old]
            if chosen is not None:
                writer.write(new, checkpoint.read(old)[chosen])
                continue
            for slab in row_slabs(checkpoint.tensors[old]):
                writer.write_rows(new, slab.start, checkpoint.read_rows(old, slab.start, slab.stop))
    copy_side_files(checkpoint.directory, context.target)
    counts = {key: after for key in EXPERT_COUNT_KEYS if key in checkpoint.config}
    write_config(context.target, checkpoint.config | counts)
    context.progress(1.0, "done")


def _renumbered(name: str, kept: dict[int, list[int]]) -> str | None:
    """The name of a tensor afterwards; None if its expert goes."""
    number, block = expert_number(name), block_index(name)
    if number is None or block is None:
        return name
    return with_expert_number(name, kept[block].index(number)) if number in kept[block] else None


def _rows(name: str, kept: dict[int, list[int]]) -> list[int] | None:
    """Which rows of a router stay; None for other tensors."""
    block = block_index(name)
    return kept[block] if block in kept and has_row_per_expert(name) else None


def _lost(added: dict[int, Tensor], kept: dict[int, list[int]]) -> list[tuple[float, float]]:
    """By block, the share of all experts' contribution that went."""
    return [
        (float(block), float(1 - scores[kept[block]].sum() / scores.sum())) for block, scores in added.items()
    ]


def _outcome(fact: TensorFact, kept: dict[int, list[int]]) -> LayerOutcome:
    if _renumbered(fact.name, kept) is None:
        return LayerOutcome(name=fact.name, action="removed", parameters=fact.elements)
    if _rows(fact.name, kept) is not None:
        return LayerOutcome(name=fact.name, action="pruned", parameters=fact.elements)
    return LayerOutcome(
        name=fact.name, action="untouched", reason="no part of an expert that goes", parameters=fact.elements
    )
