"""Depth pruning: remove the blocks that change their input least.

Idea: in a residual network a block adds to what passes through it. Where input and output point almost the same way,
the block adds little, and what follows hardly misses it. Block influence is 1 − cos(input, output) per token, averaged
over calibration text; the blocks of least influence go, all at once.
Paper: Men et al. 2024, "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect", section 3.
The layer before each gap is then refitted (`gap_repair`). Left out: measuring again after each removal.
"""

from __future__ import annotations

from dataclasses import replace

from app.errors import InvalidRequest
from app.spec.architectures import architecture_in, block_index, is_compressible
from app.spec.facts import TensorFact
from app.spec.prune import PruneDepth
from app.spec.report import LayerOutcome
from workers.engine.architectures.block_removal import number_of_blocks, remove_blocks
from workers.engine.calibration.block_influence import block_influence
from workers.engine.calibration.block_stream import Calibration
from workers.engine.calibration.step_calibration import step_calibration
from workers.engine.calibration.text_checks import calibration_flags
from workers.engine.checkpoint import Checkpoint
from workers.engine.prune.gap_repair import GapRepair, repaired
from workers.engine.technique import StepContext, StepOutcome, implements

# Copying what is left takes far less time than running the model.
_MEASURING, _REPAIRING = 0.5, 0.9


@implements(PruneDepth)
def prune_depth(spec: PruneDepth, context: StepContext) -> StepOutcome:
    """Measure the influence of every block and write the model without the weakest, those before them refitted.

    Raises InvalidRequest when the model has no more blocks than are to go, or the calibration text is too short.
    """
    checkpoint = Checkpoint.open(context.source)
    blocks = number_of_blocks(checkpoint.config)
    count = spec.blocks_to_drop(blocks)
    if count >= blocks:
        raise InvalidRequest(
            f"{count} blocks are to be removed, and the model has {blocks}.",
            code="too_many_blocks",
            hint=f"Ask for drop_blocks of at most {blocks - 1}.",
        )
    architecture = architecture_in(checkpoint.config)
    with step_calibration(context, tokens=spec.calibration_tokens, share=_MEASURING) as calibration:
        influence = block_influence(calibration)
        flags = calibration_flags(context, calibration.windows, tokens=spec.calibration_tokens)
        dropped = least_influential(influence, count, first=1 if architecture.keeps_first_block else 0)
        repair = (
            repaired(_second_pass(calibration, context), dropped)
            if spec.repairs(architecture)
            else GapRepair()
        )
    remove_blocks(
        context.source,
        context.target,
        dropped,
        replaced=repair.tensors,
        max_shard_bytes=context.max_shard_bytes,
        progress=lambda share, message: context.progress(_REPAIRING + (1 - _REPAIRING) * share, message),
    )
    return StepOutcome(
        layers=tuple(
            _outcome(fact, dropped, repair)
            for fact in checkpoint.facts()
            if is_compressible(fact.name, fact.shape)
        ),
        metrics={
            "blocks_before": blocks,
            "blocks_after": blocks - count,
            "blocks_removed": " ".join(map(str, dropped)),
            **repair.metrics,
        },
        flags=flags,
        curves={"block_influence": tuple((float(i), value) for i, value in enumerate(influence))},
    )


def least_influential(influence: list[float], count: int, *, first: int = 0) -> list[int]:
    """Indices of the `count` blocks of least influence from block `first` on, ascending; the earlier one wins a tie."""
    return sorted(sorted(range(first, len(influence)), key=lambda index: influence[index])[:count])


def _second_pass(calibration: Calibration, context: StepContext) -> Calibration:
    """The same windows once more, after the share of the progress that the first pass took."""
    return replace(
        calibration,
        progress=lambda share, message: context.progress(
            _MEASURING + (_REPAIRING - _MEASURING) * share, f"repairing, {message}"
        ),
    )


def _outcome(fact: TensorFact, dropped: list[int], repair: GapRepair) -> LayerOutcome:
    if block_index(fact.name) in dropped:
        return LayerOutcome(name=fact.name, action="removed", parameters=fact.elements)
    if fact.name in repair.tensors:
        return LayerOutcome(name=fact.name, action="trained", parameters=fact.elements)
    return LayerOutcome(name=fact.name, action="untouched", reason="kept block", parameters=fact.elements)
