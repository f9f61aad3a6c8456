"""Run a model over windows of tokens block by block, with one block's weights in memory at a time.

Hidden states wait between blocks where a job that was killed finds them again: see `block_states`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from app.spec.calibration_memory import windows_at_once
from workers.engine.architectures.skeleton import BlockCall, Skeleton
from workers.engine.calibration.block_reader import reading_blocks
from workers.engine.calibration.block_states import BlockStates, StatesShape, open_states
from workers.engine.calibration.device_shares import WindowShare, on_all, share_windows
from workers.engine.calibration.stream_progress import StreamProgress
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
    devices: tuple[str, ...] = ("cpu",)
    """Those that share the work; the block and all it is given are on the first."""
    shared: Callable[[], list[LiveBlock]] | None = None
    """The block on each of several devices as it is now, each with some of the inputs; None where there is one device."""

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
    more_devices: tuple[str, ...] = ()
    """Others that take some of the windows: see `device_shares`."""
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
    last_block: int | None = None,
) -> None:
    """Call `visit` for every block and all windows, a few at a time, blocks in order.

    `prepare` is called for each block first and may change its weights: what follows sees the outputs of those.
    With `first_block`, the blocks before it are skipped: the spool directory holds what an earlier run left there. Those
    after `last_block` are not run.
    Raises IntakeError when the checkpoint lacks a tensor of a block.
    """
    windows, device = calibration.windows, calibration.device
    devices = (device, *calibration.more_devices)
    skeleton = Skeleton.open(calibration.directory, windows, device, calibration.dtype)
    calls = skeleton.record_calls(windows[:1])
    calls = calls if last_block is None else calls[: last_block + 1]
    tokens = skeleton.tokens_of(windows)
    told = StreamProgress(
        calibration.progress, len(calls), len(windows), passes=1 if prepare is _nothing else 2
    )
    with _states(calibration, skeleton, first_block) as states, reading_blocks(skeleton) as reader:
        for index in range(first_block, len(calls)):
            block, call = skeleton.blocks[index], calls[index]
            stored = reader.load(index)
            at_once = windows_at_once(tokens, _widest(block), on_gpu=device != "cpu")
            parts = _parts(len(windows), at_once)
            run = _BlockRun(
                index, stored, states, told, WindowShare(device, block, call, parts), devices, len(windows)
            )
            prepare(run.live(calibration.spool_directory))
            run.pass_on(visit)
            block.to("meta")
            # After the last one there is nothing to go on with.
            if states.passed(index, keep=finished is not _unnoticed) or index + 1 == len(calls):
                finished(index)


@dataclass(frozen=True)
class _BlockRun:
    """All windows' way through one block."""

    index: int
    stored_names: dict[str, str]
    states: BlockStates
    told: StreamProgress
    whole: WindowShare
    """Every window on the first device."""
    devices: tuple[str, ...]
    windows: int

    def live(self, scratch: Path) -> LiveBlock:
        """What is prepared."""
        alone = LiveBlock(
            self.index,
            self.whole.module,
            self.stored_names,
            self.whole.call,
            partial(self._inputs, self.whole),
            self.windows,
            self.states.read,
            scratch,
            self.told.again,
            self.devices,
        )

        def shared() -> list[LiveBlock]:
            return [
                replace(alone, module=share.module, call=share.call, inputs=partial(self._inputs, share))
                for share in self._shares()
            ]

        return alone if len(self.devices) == 1 else replace(alone, shared=shared)

    def pass_on(self, visit: Visit) -> None:
        """Make outputs of all inputs; those that are looked at are made one after the other."""

        def run(share: WindowShare) -> None:
            for part in share.parts:
                hidden = self._read(share, part)
                output = share.call.run(share.module, hidden)
                visit(self.index, hidden, output)
                self.states.write(part.start, output)
                self._tell(share, part, earlier=self.told.passes - 1)

        on_all(run, self._shares() if visit is _unseen else [self.whole], self.devices)

    def _shares(self) -> list[WindowShare]:
        return share_windows(self.whole.module, self.whole.call, self.whole.parts, self.devices)

    def _inputs(self, share: WindowShare) -> Iterator[Tensor]:
        for part in share.parts:
            yield self._read(share, part)
            self._tell(share, part, earlier=0)

    def _read(self, share: WindowShare, part: range) -> Tensor:
        return self.states.read(part.start, len(part)).to(share.device)

    def _tell(self, share: WindowShare, part: range, *, earlier: int) -> None:
        """The first device's pace is taken for that of all: progress is told from one thread."""
        if share.parts[0].start == 0:
            done = part.stop * self.windows // share.parts[-1].stop
            self.told.windows_done(self.index, done, earlier=earlier)


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
