"""Files that a step keeps beside its result until it is done, predicted from shapes."""

from __future__ import annotations

from functools import singledispatch

from app.spec.base import Step
from app.spec.distill import DistillLogits
from app.spec.gguf import QuantizeGguf
from app.spec.prune import PruneCalibrated, PruneDepth, PruneHeads, PruneWidth
from app.spec.prune_experts import PruneExperts
from app.spec.prune_hidden import PruneHidden
from app.spec.prune_training import PruneTraining
from app.spec.quantize import QuantizeCalibrated
from app.spec.quantize_onnx import QuantizeOnnx
from app.spec.step_costs import Surroundings, tokens_of

_STATE_BYTES = 4
"""Of a hidden state; 2 where the processor computes in bfloat16, which a plan does not know."""
_GRADIENT_BYTES = 2


@singledispatch
def step_disk(_step: Step, _on: Surroundings) -> int:
    """Bytes of such files. By default, none worth counting."""
    return 0


@step_disk.register
def _(step: DistillLogits, on: Surroundings) -> int:
    # Two snapshots while the newer one is written: weights, and Adam's two moments; and the best weights of each.
    snapshots = 2 * 16 * on.after.dense_parameters
    student = on.after.weight_bytes
    if step.cached_logits is None:
        return snapshots + student
    per_token = step.cached_logits * (4 if on.facts.vocab_size <= 2**16 else 6)
    return snapshots + student + per_token * step.sequences * step.sequence_length


@step_disk.register
def _(_step: PruneTraining, on: Surroundings) -> int:
    # As above; gates are trained too, or have masks and scores.
    return 2 * 2 * 16 * on.before.dense_parameters


@step_disk.register
def _(step: QuantizeCalibrated, on: Surroundings) -> int:
    # What a block gave before it was quantized is what it is trained to give.
    files = 3 if step.solver == "signround" else 2
    return files * _states(tokens_of(step, on.facts), on) + _journal(on)


@step_disk.register(PruneWidth)
@step_disk.register(PruneHeads)
def _(step: PruneWidth | PruneHeads, on: Surroundings) -> int:
    return 2 * _states(step.calibration_tokens, on) + _journal(on)


@step_disk.register
def _(step: PruneHidden, on: Surroundings) -> int:
    # Those of the narrow model too: before and after a block, and where a killed job would go on.
    directions = 4 * on.facts.hidden_size**2
    return 5 * _states(step.calibration_tokens, on) + directions + _journal(on)


@step_disk.register
def _(step: PruneCalibrated, on: Surroundings) -> int:
    states = _states(step.calibration_tokens, on)
    if not step.runs_backwards:
        return 2 * states + _journal(on)
    # Inputs of all blocks, outputs of the last, slopes before and after a block, and two files while the inputs are made.
    gradients = _GRADIENT_BYTES * on.before.dense_parameters
    return (on.before.blocks + 5) * states + gradients + _journal(on)


@step_disk.register(PruneDepth)
@step_disk.register(PruneExperts)
@step_disk.register(QuantizeGguf)
@step_disk.register(QuantizeOnnx)
def _(step: PruneDepth | PruneExperts | QuantizeGguf | QuantizeOnnx, on: Surroundings) -> int:
    # Images stay in memory.
    return 0 if on.facts.preprocessing is not None else 2 * _states(step.calibration_tokens, on)


def _states(tokens: int, on: Surroundings) -> int:
    """What all tokens are between two blocks."""
    return _STATE_BYTES * tokens * on.facts.hidden_size


def _journal(on: Surroundings) -> int:
    """Blocks that are finished, until all are."""
    return on.after.weight_bytes
