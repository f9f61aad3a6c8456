"""The calibration a step is given: windows of its text, and a place for the states between blocks."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from workers.engine.architectures.loading import load_tokenizer
from workers.engine.calibration.block_stream import Calibration
from workers.engine.calibration.windows import model_windows
from workers.engine.technique import StepContext

WINDOW_TOKENS = 512


@contextmanager
def step_calibration(
    context: StepContext, *, tokens: int, share: float, length: int = WINDOW_TOKENS
) -> Iterator[Calibration]:
    """Calibrate `context.source` on `tokens` tokens of the step's text, in windows of `length`; its progress runs from 0 to `share`.

    Raises InvalidRequest when the text is too short for one window.
    """
    if context.calibration_text is None:
        raise ValueError("the step needs calibration text")
    windows = model_windows(
        load_tokenizer(context.source),
        context.calibration_text,
        context.facts,
        tokens=tokens,
        length=length,
    )
    with tempfile.TemporaryDirectory(dir=context.target.parent, prefix="spool-") as spool:
        yield Calibration(
            directory=context.source,
            windows=windows,
            spool_directory=Path(spool),
            device=context.device,
            progress=lambda fraction, message: context.progress(share * fraction, message),
        )
