"""A model without weights, and its blocks' weights one block at a time.

The model stands on the meta device. Its own forward is run as far as the blocks, so that embeddings, masks, positions
and rotary tables are made by the model's code, whatever its architecture; the arguments each block is called with
are recorded and can drive the blocks afterwards, one after the other.
Of the embedding table only the rows of the tokens at hand are read, of the head nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from app.errors import IntakeError
from app.spec.architectures import ARCHITECTURES, blocks_name
from workers.engine.architectures.experts import separate_experts
from workers.engine.architectures.loading import architecture_of
from workers.engine.architectures.names import name_in_memory, name_within_base
from workers.engine.checkpoint import Checkpoint


@dataclass(frozen=True)
class BlockCall:
    """What a block is called with beside its hidden states, which are its first argument."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    others: tuple[Any, ...] | None = None
    """What it returns after its hidden states; None where it returns those alone, and no tuple."""

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """Call the block as the model would: (windows, tokens, hidden) -> the same."""
        output: Tensor | tuple[Tensor, ...] = block(hidden, *self.args, **self.kwargs)
        return output[0] if isinstance(output, tuple) else output

    def on(self, device: str) -> BlockCall:
        """The same on another device."""
        from accelerate.utils import send_to_device

        return replace(
            self, args=send_to_device(self.args, device), kwargs=send_to_device(self.kwargs, device)
        )

    def returned(self, hidden: Tensor) -> Any:
        """Hidden states in the form that the block would return them in."""
        return hidden if self.others is None else (hidden, *self.others)


class _ReachedBlocks(Exception):  # noqa: N818 - control flow out of a forward that is not ours
    def __init__(self, hidden: Tensor) -> None:
        super().__init__("the forward has reached the blocks")
        self.hidden = hidden


@dataclass(frozen=True)
class Skeleton:
    """A model without weights, and where to get them."""

    checkpoint: Checkpoint
    names: dict[str, str]
    """Names in the checkpoint by names within the base model."""
    whole: nn.Module
    """The model with its head, of which nothing is read."""
    model: nn.Module
    """The base model within it."""
    blocks: nn.ModuleList
    blocks_name: str
    device: str
    dtype: torch.dtype
    """What its parameters are in, and so what is computed in."""

    @classmethod
    def open(cls, directory: Path, windows: Tensor, device: str, dtype: torch.dtype) -> Skeleton:
        """Build the base model on the meta device and read what lies outside its blocks."""
        whole = model_without_weights(directory)
        model = whole.base_model
        architecture = ARCHITECTURES[architecture_of(directory)]
        for buffer in model.buffers():
            buffer.data = buffer.data.to(device)
        checkpoint = Checkpoint.open(directory)
        names = {
            name_within_base(name_in_memory(stored, architecture.name), whole.base_model_prefix): stored
            for stored in checkpoint.tensors
        }
        # Models have other lists too: of experts, of norms for each head.
        name = next(found for n in names if (found := blocks_name(n)) is not None)
        blocks = model.get_submodule(name)
        if not isinstance(blocks, nn.ModuleList):
            raise TypeError(f"{name} of {architecture.name} is no list of blocks")
        skeleton = cls(checkpoint, names, whole.eval(), model, blocks, name, device, dtype)
        skeleton._read_outside_blocks(windows)
        return skeleton

    def materialise(self, module: nn.Module, *, prefix: str) -> dict[str, str]:
        """Read the weights of a module from the checkpoint. Returns their names there by those in the module."""
        names = self.stored_names(module, prefix=prefix)
        for name, stored in names.items():
            self.place(module, name, self.checkpoint.read(stored))
        return names

    def stored_names(self, module: nn.Module, *, prefix: str) -> dict[str, str]:
        """Names in the checkpoint of a module's parameters, by those in the module. Raises IntakeError where one is missing."""
        names = {name: self.names.get(prefix + name) for name, _ in module.named_parameters()}
        for name, stored in names.items():
            if stored is None:
                raise IntakeError(
                    f"The weights have no tensor for {prefix}{name}.",
                    code="missing_tensor",
                    hint="Save the model again with save_pretrained() and upload all of its files.",
                )
        return {name: stored for name, stored in names.items() if stored is not None}

    def place(self, module: nn.Module, name: str, weight: Tensor) -> None:
        """Give a module a parameter, on the device and in the dtype that is computed in."""
        # Cast where it is faster: a weight in memory that a GPU reads by itself arrives while the next one is asked for.
        set_parameter(module, name, weight.to(self.device, non_blocking=True).to(self.dtype))

    def record_calls(self, window: Tensor) -> list[BlockCall]:
        """The arguments of each block, from one forward in which only the first block computes."""
        calls: list[BlockCall] = []
        outputs: list[Any] = []
        self.materialise(self.blocks[0], prefix=f"{self.blocks_name}.0.")
        first = self.blocks[0].forward

        def record(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            calls.append(BlockCall(args, kwargs))
            if not outputs:
                # Some architectures' blocks return a tuple: what the first one really returns has the right form.
                outputs.append(first(hidden, *args, **kwargs))
            if len(calls) == len(self.blocks):
                raise _ReachedBlocks(hidden)
            return outputs[0]

        self._forward_with([record] * len(self.blocks), window)
        # A job that goes on at a later block would keep it to the end.
        self.blocks[0].to("meta")
        others = outputs[0][1:] if isinstance(outputs[0], tuple) else None
        return [replace(call, others=others) for call in calls]

    def tokens_of(self, windows: Tensor) -> int:
        """Tokens that each window brings to the blocks: of images, those of their patches."""
        return int((self.embed(windows[:1]) if windows.is_floating_point() else windows).shape[1])

    def embed(self, window: Tensor) -> Tensor:
        """The hidden states that reach the first block: (1, tokens), or an image, -> (1, tokens, hidden)."""

        def stop(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:  # noqa: ARG001
            raise _ReachedBlocks(hidden)

        return self._forward_with([stop], window)

    def forget_embeddings(self) -> None:
        """Give their memory back, once nothing is to be embedded any more."""
        self.model.get_input_embeddings().to("meta")  # type: ignore[operator]

    def _forward_with(self, forwards: list[Callable[..., Any]], window: Tensor) -> Tensor:
        """Run the model with the forwards of its first blocks replaced, up to the one that raises _ReachedBlocks."""
        replaced = list(zip(self.blocks, forwards, strict=False))
        for block, forward in replaced:
            block.__dict__["forward"] = forward
        try:
            if window.is_floating_point():
                self.model(pixel_values=window.to(self.device, self.dtype))
            else:
                self.model(input_ids=window.to(self.device))
        except _ReachedBlocks as reached:
            return reached.hidden
        finally:
            for block, _ in replaced:
                del block.__dict__["forward"]
        raise RuntimeError("the model never called its blocks")

    def _read_outside_blocks(self, windows: Tensor) -> None:
        is_text = not windows.is_floating_point()
        embedding = self.model.get_input_embeddings().weight if is_text else None  # type: ignore[operator]
        for name, parameter in list(self.model.named_parameters()):
            stored = self.names.get(name)
            # Poolers and the like may be missing; they come after the blocks and are never run.
            if name.startswith(f"{self.blocks_name}.") or stored is None:
                continue
            if parameter is embedding:
                weight = self._rows_of(stored, torch.unique(windows).tolist())
            else:
                weight = self.checkpoint.read(stored)
            set_parameter(self.model, name, weight.to(self.device, self.dtype))

    def _rows_of(self, stored: str, tokens: list[int]) -> Tensor:
        """The embedding table with only these rows filled: the pages of the others are never touched."""
        entry = self.checkpoint.tensors[stored]
        table = torch.empty(entry.shape, dtype=self.dtype)
        for token in tokens:
            table[token] = self.checkpoint.read_rows(stored, token, token + 1)[0].to(self.dtype)
        return table


def model_without_weights(directory: Path, **config: int) -> Any:
    """The whole model on the meta device, its experts separate; `config` are keys of its configuration to be changed."""
    import transformers
    from accelerate import init_empty_weights

    architecture = ARCHITECTURES[architecture_of(directory)]
    configuration = transformers.AutoConfig.from_pretrained(
        str(directory), local_files_only=True, trust_remote_code=False
    )
    for key, value in {"use_cache": False, **config}.items():
        setattr(configuration, key, value)
    # Buffers are computed, not stored: rotary tables must be real.
    with init_empty_weights(include_buffers=False):
        whole = getattr(transformers, architecture.name)(configuration)
    whole.base_model.float().eval()
    if architecture.expert_layers is not None:
        separate_experts(whole.base_model, architecture.expert_layers)
    return whole


def set_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    """Put a tensor in the place of a parameter, by its name within the module."""
    owner, _, leaf = name.rpartition(".")
    module.get_submodule(owner).register_parameter(leaf, nn.Parameter(value, requires_grad=False))
