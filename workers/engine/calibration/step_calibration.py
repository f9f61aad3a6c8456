"""The calibration a step is given: windows of its text, and a place for the states between blocks."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from app.errors import InvalidRequest
from app.spec.prune import PruneCalibrated, PruneHeads, PruneWidth
from app.spec.prune_hidden import PruneHidden
from app.spec.quantize import QuantizeCalibrated
from app.spec.sizes import Shape
from app.spec.step_costs import INTERPRETER_BYTES, calibration_memory
from workers.engine.architectures.loading import load_tokenizer
from workers.engine.calibration.block_journal import BlockJournal
from workers.engine.calibration.block_stream import Calibration, LiveBlock, stream_blocks
from workers.engine.calibration.windows import model_windows
from workers.engine.checkpoint import Checkpoint
from workers.engine.checkpoint.layout import weight_files
from workers.engine.technique import StepContext

WINDOW_TOKENS = 512
# Half of the least a spec may ask for: statistics of fewer tokens are those of a sentence or two.
_LEAST_TOKENS = 64


@contextmanager
def step_calibration(context: StepContext, *, tokens: int, share: float) -> Iterator[Calibration]:
    """Calibrate `context.source` on `tokens` tokens of the step's text; its progress runs from 0 to `share`.

    Raises InvalidRequest when the text is too short for one window.
    """
    windows = calibration_windows(context, tokens=tokens, length=WINDOW_TOKENS)
    with tempfile.TemporaryDirectory(dir=context.target.parent, prefix="spool-") as spool:
        yield calibration_in(Path(spool), context, windows, share=share)


def calibration_windows(context: StepContext, *, tokens: int, length: int) -> Tensor:
    """Windows of at most `length` tokens of the step's text: (windows, tokens), int64.

    Raises InvalidRequest when the text is too short for one window, or has less than a few sentences.
    """
    if context.calibration_text is None:
        raise ValueError("the step needs calibration text")
    windows = model_windows(
        load_tokenizer(context.source), context.calibration_text, context.facts, tokens=tokens, length=length
    )
    if windows.numel() < _LEAST_TOKENS:
        raise InvalidRequest(
            f"The calibration text gives {windows.numel()} tokens; with fewer than {_LEAST_TOKENS} nothing can be learned.",
            code="text_too_short",
            hint=f"Upload a longer text: the step asks for {tokens:,} tokens.",
        )
    return windows


def calibration_in(
    spool: Path,
    context: StepContext,
    windows: Tensor,
    *,
    share: float,
    dtype: torch.dtype = torch.float32,
) -> Calibration:
    """The step's model on these windows, with hidden states in the directory `spool`; progress as above."""
    return Calibration(
        directory=context.source,
        windows=windows,
        spool_directory=spool,
        device=context.device,
        more_devices=context.more_devices,
        progress=lambda fraction, message: context.progress(share * fraction, message),
        dtype=dtype,
    )


def split_progress(calibration: Calibration, share: float) -> tuple[Calibration, Calibration]:
    """One that goes first and takes a share of the progress, and one for the rest."""
    tell = calibration.progress
    return (
        replace(calibration, progress=lambda done, message: tell(share * done, message)),
        replace(calibration, progress=lambda done, message: tell(share + (1 - share) * done, message)),
    )


def journal_key(
    step: QuantizeCalibrated | PruneCalibrated | PruneWidth | PruneHeads | PruneHidden,
    context: StepContext,
    windows: Tensor,
    *,
    one_site_at_a_time: bool = False,
) -> str:
    """The same for the same work: what a journal was begun for. Inputs taken one by one find other codes than together."""
    files = [
        (file.name, (stat := file.stat()).st_size, stat.st_mtime_ns) for file in weight_files(context.source)
    ]
    digest = hashlib.sha256(windows.numpy().tobytes())
    devices = (context.device, *context.more_devices)
    told = f"{step.model_dump_json()} {files} {devices} {context.seed} {one_site_at_a_time}"
    digest.update(told.encode())
    return digest.hexdigest()


def is_short_of_memory(
    step: QuantizeCalibrated | PruneCalibrated, context: StepContext, checkpoint: Checkpoint
) -> bool:
    """Whether the statistics of a whole block would go over the budget, by the plan's own figures."""
    if context.memory_budget is None:
        return False
    shape = Shape.of(tuple(checkpoint.facts()))
    needed = calibration_memory(step, shape, context.facts, one_site_at_a_time=False)
    return INTERPRETER_BYTES + needed > context.memory_budget


def solve_into(
    journal: BlockJournal,
    calibration: Calibration,
    solve: Callable[[LiveBlock], tuple[dict[str, Tensor], dict[str, Any]]],
) -> None:
    """Solve block after block into the journal, from the first that is not finished.

    `solve` changes a block, and returns the tensors that are to be written and what is to be reported, fit for JSON.
    """
    records: dict[int, dict[str, Any]] = {}

    def prepare(block: LiveBlock) -> None:
        tensors, records[block.index] = solve(block)
        journal.put(block.index, tensors)

    def commit(_last: int) -> None:
        for index in sorted(records):
            journal.commit(index, records.pop(index))

    stream_blocks(calibration, prepare=prepare, finished=commit, first_block=journal.blocks_done)
