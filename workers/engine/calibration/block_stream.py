"""Run a model over windows of tokens block by block, with one block's weights in memory at a time.

The model stands on the meta device. Its own forward is run as far as the blocks, so that embeddings, masks, positions
and rotary tables are made by the model's code, whatever its architecture; the arguments each block is called with
are recorded and drive the blocks afterwards, one after the other. Hidden states wait in a spool file between blocks.
Of the embedding table only the rows of the tokens at hand are read, of the head nothing.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from app.errors import IntakeError
from workers.engine.architectures.loading import architecture_of
from workers.engine.architectures.names import name_within_base
from workers.engine.checkpoint import Checkpoint
from workers.engine.technique import Progress

Visit = Callable[[int, Tensor, Tensor], None]
"""Called with a block's index, its input and its output, each (1, tokens, hidden) in fp32."""


@dataclass(frozen=True)
class LiveBlock:
    """One block with its weights in memory, in fp32, and all inputs it has from the blocks before."""

    index: int
    module: nn.Module
    stored_names: dict[str, str]
    """Names in the checkpoint by names within the block."""
    run: Callable[[], None]
    """Run the block on every window and forget the outputs: for hooks to look on."""


Prepare = Callable[[LiveBlock], None]


def _nothing(block: LiveBlock) -> None:
    """Leave the block as it is."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A model, and what is run through it."""

    directory: Path
    windows: Tensor
    """(windows, tokens), int64, all of one length."""
    spool_directory: Path
    """Needs windows × tokens × hidden × 4 bytes of disk for as long as blocks are streamed."""
    device: str
    progress: Progress


@torch.inference_mode()
def stream_blocks(
    calibration: Calibration, visit: Visit | None = None, *, prepare: Prepare = _nothing
) -> None:
    """Call `visit` for every block and window, blocks in order.

    `prepare` is called for each block first and may change its weights: what follows sees the outputs of those.
    Raises IntakeError when the checkpoint lacks a tensor of a block.
    """
    windows, device, progress = calibration.windows, calibration.device, calibration.progress
    skeleton = _Skeleton.open(calibration.directory, windows, device)
    calls = skeleton.record_calls(windows[:1])
    first = skeleton.embed(windows[:1])
    with _Spool(calibration.spool_directory, len(windows), first.shape[1:]) as spool:
        for number in range(len(windows)):
            spool.write(number, skeleton.embed(windows[number : number + 1]))
        passes = 1 if prepare is _nothing else 2

        def said(index: int, done: int) -> None:
            share = (index + done / (passes * len(windows))) / len(calls)
            progress(share, f"block {index + 1} of {len(calls)}")

        for index, (block, call) in enumerate(zip(skeleton.blocks, calls, strict=True)):
            stored = skeleton.materialise(block, prefix=f"{skeleton.blocks_name}.{index}.")

            def run(index: int = index, block: nn.Module = block, call: _Call = call) -> None:
                for number in range(len(windows)):
                    call.run(block, spool.read(number).to(device))
                    said(index, number + 1)

            prepare(LiveBlock(index, block, stored, run))
            for number in range(len(windows)):
                hidden = spool.read(number).to(device)
                output = call.run(block, hidden)
                if visit is not None:
                    visit(index, hidden, output)
                spool.write(number, output)
                said(index, (passes - 1) * len(windows) + number + 1)
            block.to("meta")


@dataclass(frozen=True)
class _Call:
    """What a block is called with beside its hidden states, which are its first argument."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        output: Tensor | tuple[Tensor, ...] = block(hidden, *self.args, **self.kwargs)
        return output[0] if isinstance(output, tuple) else output


class _ReachedBlocks(Exception):  # noqa: N818 - control flow out of a forward that is not ours
    def __init__(self, hidden: Tensor) -> None:
        super().__init__("the forward has reached the blocks")
        self.hidden = hidden


@dataclass(frozen=True)
class _Skeleton:
    """A model without weights, and where to get them."""

    checkpoint: Checkpoint
    names: dict[str, str]
    """Names in the checkpoint by names within the base model."""
    model: nn.Module
    blocks: nn.ModuleList
    blocks_name: str
    device: str

    @classmethod
    def open(cls, directory: Path, windows: Tensor, device: str) -> _Skeleton:
        """Build the base model on the meta device and read what lies outside its blocks."""
        import transformers
        from accelerate import init_empty_weights

        config = transformers.AutoConfig.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=False
        )
        config.use_cache = False
        # Buffers are computed, not stored: rotary tables must be real.
        with init_empty_weights(include_buffers=False):
            whole = getattr(transformers, architecture_of(directory))(config)
        model = whole.base_model.float().eval()
        for buffer in model.buffers():
            buffer.data = buffer.data.to(device)
        name, blocks = next((n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList))
        checkpoint = Checkpoint.open(directory)
        names = {name_within_base(stored, whole.base_model_prefix): stored for stored in checkpoint.tensors}
        skeleton = cls(checkpoint, names, model, blocks, name, device)
        skeleton._read_outside_blocks(windows)
        return skeleton

    def materialise(self, module: nn.Module, *, prefix: str) -> dict[str, str]:
        """Read the weights of a module in fp32 from the checkpoint. Returns their names there by those in the module."""
        names: dict[str, str] = {}
        for name, _ in list(module.named_parameters()):
            stored = self.names.get(prefix + name)
            if stored is None:
                raise IntakeError(
                    f"The weights have no tensor for {prefix}{name}.",
                    code="missing_tensor",
                    hint="Save the model again with save_pretrained() and upload all of its files.",
                )
            names[name] = stored
            _set_parameter(module, name, self.checkpoint.read(stored).to(self.device, torch.float32))
        return names

    def record_calls(self, window: Tensor) -> list[_Call]:
        """The arguments of each block, from one forward in which only the first block computes."""
        calls: list[_Call] = []
        outputs: list[Any] = []
        self.materialise(self.blocks[0], prefix=f"{self.blocks_name}.0.")
        first = self.blocks[0].forward

        def record(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            calls.append(_Call(args, kwargs))
            if len(calls) == len(self.blocks):
                raise _ReachedBlocks(hidden)
            if not outputs:
                # Some architectures' blocks return a tuple: what the first one really returns has the right form.
                outputs.append(first(hidden, *args, **kwargs))
            return outputs[0]

        self._forward_with([record] * len(self.blocks), window)
        return calls

    def embed(self, window: Tensor) -> Tensor:
        """The hidden states that reach the first block: (1, tokens) -> (1, tokens, hidden)."""

        def stop(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:  # noqa: ARG001
            raise _ReachedBlocks(hidden)

        return self._forward_with([stop], window)

    def _forward_with(self, forwards: list[Callable[..., Any]], window: Tensor) -> Tensor:
        """Run the model with the forwards of its first blocks replaced, up to the one that raises _ReachedBlocks."""
        replaced = list(zip(self.blocks, forwards, strict=False))
        for block, forward in replaced:
            block.__dict__["forward"] = forward
        try:
            self.model(input_ids=window.to(self.device))
        except _ReachedBlocks as reached:
            return reached.hidden
        finally:
            for block, _ in replaced:
                del block.__dict__["forward"]
        raise RuntimeError("the model never called its blocks")

    def _read_outside_blocks(self, windows: Tensor) -> None:
        embedding = self.model.get_input_embeddings().weight  # type: ignore[operator]
        for name, parameter in list(self.model.named_parameters()):
            stored = self.names.get(name)
            # Poolers and the like may be missing; they come after the blocks and are never run.
            if name.startswith(f"{self.blocks_name}.") or stored is None:
                continue
            if parameter is embedding:
                weight = self._rows_of(stored, torch.unique(windows).tolist())
            else:
                weight = self.checkpoint.read(stored)
            _set_parameter(self.model, name, weight.to(self.device, torch.float32))

    def _rows_of(self, stored: str, tokens: list[int]) -> Tensor:
        """The embedding table with only these rows filled: the pages of the others are never touched."""
        entry = self.checkpoint.tensors[stored]
        table = torch.empty(entry.shape, dtype=torch.float32)
        for token in tokens:
            table[token] = self.checkpoint.read_rows(stored, token, token + 1)[0].float()
        return table


def _set_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    module.get_submodule(owner).register_parameter(leaf, nn.Parameter(value, requires_grad=False))


class _Spool:
    """Hidden states of all windows in one unnamed file: (windows, tokens, hidden) in fp32."""

    def __init__(self, directory: Path, windows: int, shape: torch.Size) -> None:
        self._shape = shape
        self._nbytes = shape.numel() * 4
        self._file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115 - closed by __exit__
        os.posix_fallocate(self._file.fileno(), 0, windows * self._nbytes)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def read(self, number: int) -> Tensor:
        raw = bytearray(os.pread(self._file.fileno(), self._nbytes, number * self._nbytes))
        return torch.frombuffer(raw, dtype=torch.float32).view(1, *self._shape)

    def write(self, number: int, hidden: Tensor) -> None:
        data = np.ascontiguousarray(hidden[0].float().cpu().numpy())
        os.pwrite(self._file.fileno(), data.tobytes(), number * self._nbytes)
