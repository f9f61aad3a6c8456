"""Run a model over windows of tokens block by block, with one block's weights in memory at a time.

Hidden states wait between blocks where a job that was killed finds them again: see `block_states`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from app.spec.calibration_memory import windows_at_once
from workers.engine.architectures.skeleton import BlockCall, Skeleton
from workers.engine.calibration.block_reader import reading_blocks
from workers.engine.calibration.block_states import BlockStates, StatesShape, open_states
from workers.engine.technique import Progress

Visit = Callable[[int, Tensor, Tensor], None]
"""Called with a block's index, its input and its output, each (1, tokens, hidden)."""


class EnoughSeen(Exception):  # noqa: N818 - control flow out of a forward that is not ours
    """A hook raises it to end a window's forward through the block: what follows is not needed."""


@dataclass(frozen=True)
class LiveBlock:
    """One block with its weights in memory, and all inputs it has from the blocks before."""

    index: int
    module: nn.Module
    stored_names: dict[str, str]
    """Names in the checkpoint by names within the block."""
    call: BlockCall
    inputs: Callable[[], Iterator[Tensor]]
    """The hidden states that the windows bring, a few windows at a time: (windows, tokens, hidden)."""
    windows: int
    window: Callable[[int], Tensor]
    """The hidden states of one window, by its number."""
    scratch: Path
    """Where files may lie that do not outlast the block."""
    alive: Callable[[], None]
    """To be called every few seconds of other work: says again how far the stream is, and may raise to stop."""

    def run(self) -> None:
        """Run the block on every window and forget the outputs: for hooks to look on."""
        for hidden in self.inputs():
            self._look(hidden)

    def run_first(self) -> None:
        """The same on the first window alone."""
        self._look(self.window(0))

    def _look(self, hidden: Tensor) -> None:
        with suppress(EnoughSeen):
            self.call.run(self.module, hidden)


Prepare = Callable[[LiveBlock], None]
Finished = Callable[[int], None]
"""Called with a block's index once its outputs are on the disk, if they are put there: with them all before are finished."""


def _nothing(block: LiveBlock) -> None:
    """Leave the block as it is."""


def _unseen(index: int, before: Tensor, after: Tensor) -> None:
    """Look at no outputs."""


def _unnoticed(index: int) -> None:
    """Keep nothing of a finished block."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A model, and what is run through it."""

    directory: Path
    windows: Tensor
    """(windows, tokens), int64, all of one length; or images, (images, channels, height, width), float32."""
    spool_directory: Path
    """Needs twice windows × tokens × hidden × 4 bytes of disk (2 where 16 bits are computed in)."""
    device: str
    progress: Progress
    dtype: torch.dtype = field(default=torch.float32)
    """What is computed in; see `compute_dtype`."""


def compute_dtype(stored: torch.dtype, device: str) -> torch.dtype:
    """bfloat16 for checkpoints in it on hardware that multiplies it natively, else float32."""
    if stored is not torch.bfloat16:
        return torch.float32
    native = device != "cpu" or torch.cpu._is_avx512_bf16_supported()  # noqa: SLF001 - there is no public question
    return torch.bfloat16 if native else torch.float32


# Not inference mode: a block may be trained, and tensors made in that mode cannot be.
@torch.no_grad()
def stream_blocks(
    calibration: Calibration,
    visit: Visit = _unseen,
    *,
    prepare: Prepare = _nothing,
    finished: Finished = _unnoticed,
    first_block: int = 0,
) -> None:
    """Call `visit` for every block and all windows, a few at a time, blocks in order.

    `prepare` is called for each block first and may change its weights: what follows sees the outputs of those.
    With `first_block`, the blocks before it are skipped: the spool directory holds what an earlier run left there.
    Raises IntakeError when the checkpoint lacks a tensor of a block.
    """
    windows, device = calibration.windows, calibration.device
    skeleton = Skeleton.open(calibration.directory, windows, device, calibration.dtype)
    calls = skeleton.record_calls(windows[:1])
    tokens = skeleton.tokens_of(windows)
    told = _Told(calibration.progress, len(calls), len(windows), passes=1 if prepare is _nothing else 2)
    with _states(calibration, skeleton, first_block) as states, reading_blocks(skeleton) as reader:
        for index in range(first_block, len(calls)):
            block, call = skeleton.blocks[index], calls[index]
            stored = reader.load(index)
            at_once = windows_at_once(tokens, _widest(block), on_gpu=device != "cpu")
            parts = _parts(len(windows), at_once)

            def inputs(index: int = index, parts: list[range] = parts) -> Iterator[Tensor]:
                for part in parts:
                    yield states.read(part.start, len(part))
                    told.windows_done(index, part.stop, earlier=0)

            scratch = calibration.spool_directory
            prepare(
                LiveBlock(index, block, stored, call, inputs, len(windows), states.read, scratch, told.again)
            )
            for part in parts:
                hidden = states.read(part.start, len(part))
                output = call.run(block, hidden)
                visit(index, hidden, output)
                states.write(part.start, output)
                told.windows_done(index, part.stop, earlier=told.passes - 1)
            block.to("meta")
            # After the last one there is nothing to go on with.
            if states.passed(index, keep=finished is not _unnoticed) or index + 1 == len(calls):
                finished(index)


def _widest(block: nn.Module) -> int:
    """Features of the widest input or output of a block's layers."""
    return max((max(p.shape) for p in block.parameters() if p.ndim > 1), default=1)


def _parts(windows: int, at_once: int) -> list[range]:
    return [range(start, min(windows, start + at_once)) for start in range(0, windows, at_once)]


@contextmanager
def _states(calibration: Calibration, skeleton: Skeleton, first_block: int) -> Iterator[BlockStates]:
    """The states that reach `first_block`, which an earlier process left if it is not the first of all."""
    windows = calibration.windows
    shape = StatesShape(len(windows), tuple(skeleton.embed(windows[:1]).shape[1:]), calibration.dtype)
    block = first_block or -1
    with open_states(calibration.spool_directory, shape, device=calibration.device, block=block) as states:
        if block == -1:
            for number in range(len(windows)):
                states.write(number, skeleton.embed(windows[number : number + 1]))
            states.passed(-1, keep=False)
        skeleton.forget_embeddings()
        yield states


@dataclass
class _Told:
    """Progress that never goes back, however often a block's windows are gone through."""

    progress: Progress
    blocks: int
    windows: int
    passes: int
    share: float = 0.0
    message: str = ""

    def windows_done(self, index: int, done: int, *, earlier: int) -> None:
        """Say that `done` windows of a pass over block `index` are through, after `earlier` whole passes."""
        share = (index + (earlier + done / self.windows) / self.passes) / self.blocks
        self.share = max(self.share, share)
        self.message = f"block {index + 1} of {self.blocks}"
        self.again()

    def again(self) -> None:
        """Say the same once more."""
        self.progress(self.share, self.message)
