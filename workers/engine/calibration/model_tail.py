"""What comes after a model's blocks, and how a loss at its end depends on what the last block gives.

A language model's loss is its own, the cross-entropy of the next token, summed over a window. Encoders are given no labels, and a loss that
compares their outputs with themselves has no slope; theirs is the inner product of what they put out (label logits, or
the last hidden states) with white noise: the slope of -log p where the outputs are seen with Gaussian noise, and its mean
square is the diagonal of that model's Fisher information (Martens 2020, "New insights and perspectives on the natural
gradient method", sec. 5 and 9.2).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from app.errors import IntakeError
from app.spec.architectures import ARCHITECTURES
from app.spec.base import Family
from app.spec.calibration_memory import LOGITS_AT_ONCE
from workers.engine.architectures.loading import architecture_of
from workers.engine.architectures.skeleton import BlockCall, Skeleton, set_parameter


@dataclass(frozen=True)
class ModelTail:
    """The layers after the blocks, with their weights in memory."""

    skeleton: Skeleton
    calls: list[BlockCall]
    model: nn.Module
    """What puts out logits, or hidden states where there is no head."""
    predicts_tokens: bool

    @classmethod
    @contextmanager
    def open(cls, skeleton: Skeleton, calls: list[BlockCall]) -> Iterator[ModelTail]:
        """Hold what is used of the head in memory. Raises IntakeError when the checkpoint lacks a tensor of it."""
        architecture = ARCHITECTURES[architecture_of(skeleton.checkpoint.directory)]
        predicts_tokens = architecture.family is Family.CAUSAL_LM
        if not predicts_tokens and not architecture.has_labels:
            # Embeddings are pooled from hidden states, and checkpoints may lack BERT's own pooler.
            if hasattr(skeleton.model, "pooler"):
                skeleton.model.pooler = None  # type: ignore[assignment]
            yield cls(skeleton, calls, skeleton.model, predicts_tokens)
            return
        head = _head_parameters(skeleton, architecture.head)
        for module, leaf, name in head:
            set_parameter(module, leaf, skeleton.checkpoint.read(name).to(skeleton.device, skeleton.dtype))
        if hasattr(skeleton.whole.config, "output_router_logits"):
            # The routers are in the blocks, which are not run here.
            skeleton.whole.config.output_router_logits = False
        yield cls(skeleton, calls, skeleton.whole, predicts_tokens)
        for module, leaf, _ in head:
            set_parameter(module, leaf, module.get_parameter(leaf).to("meta"))

    @torch.enable_grad()
    def slope(self, window: Tensor, hidden: Tensor, generator: torch.Generator) -> Tensor:
        """∂L/∂h at the last block's outputs h, of one window: (1, tokens), (1, tokens, hidden) -> (1, tokens, hidden)."""
        window = window.to(self.skeleton.device)
        leaf = hidden.detach().requires_grad_()
        with self._handing_on(leaf):
            if self.predicts_tokens:
                self._add_slope_of_next_token(window)
            else:
                output = self.model(input_ids=window)[0].float()
                noise = torch.randn(output.shape, generator=generator).to(output.device)
                torch.autograd.backward((noise * output).sum())
        if leaf.grad is None:
            raise RuntimeError("the outputs do not depend on the blocks")
        return leaf.grad

    def _add_slope_of_next_token(self, window: Tensor) -> None:
        """Some positions at a time, since logits are many times wider than hidden states."""
        config: Any = self.model.config
        at_once = max(1, LOGITS_AT_ONCE // config.vocab_size)
        for places in torch.split(torch.arange(window.shape[1] - 1, device=window.device), at_once):
            logits = self.model(input_ids=window, logits_to_keep=places).logits[0]
            loss = nn.functional.cross_entropy(logits.float(), window[0, places + 1], reduction="sum")
            torch.autograd.backward(loss)

    @contextmanager
    def _handing_on(self, hidden: Tensor) -> Iterator[None]:
        """Let the blocks return `hidden`, whatever they are given."""

        def hand_on(call: BlockCall) -> Any:
            return lambda *_args, **_kwargs: call.returned(hidden)

        replaced = list(zip(self.skeleton.blocks, self.calls, strict=True))
        for block, call in replaced:
            block.__dict__["forward"] = hand_on(call)
        try:
            yield
        finally:
            for block, _ in replaced:
                del block.__dict__["forward"]


def _head_parameters(skeleton: Skeleton, stored_head: str) -> list[tuple[nn.Module, str, str]]:
    """What the whole model has beside its base: modules, names in them, and names in the checkpoint.

    A language model's head that is not stored shares the word embeddings.
    """
    base = {id(module) for module in skeleton.model.modules()}
    output = skeleton.whole.get_output_embeddings()  # type: ignore[operator]
    tensors = skeleton.checkpoint.tensors
    found = []
    for place, module in skeleton.whole.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False) if id(module) not in base else ():
            name = f"{place}.{leaf}".removeprefix(".")
            if module is output and leaf == "weight":
                name = stored_head if stored_head in tensors else _word_embeddings(skeleton)
            if name not in tensors or tensors[name].shape != tuple(parameter.shape):
                raise IntakeError(
                    f"The weights have no tensor {name} of the shape {tuple(parameter.shape)}.",
                    code="missing_tensor",
                    hint="Save the model again with save_pretrained() and upload all of its files.",
                )
            found.append((module, leaf, name))
    return found


def _word_embeddings(skeleton: Skeleton) -> str:
    """The stored name of the word embeddings' table."""
    table = skeleton.model.get_input_embeddings().weight  # type: ignore[operator]
    return next(skeleton.names[n] for n, p in skeleton.model.named_parameters() if p is table)
