"""What backward passes through a block leave behind: sums that are added to while they run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from workers.engine.architectures.skeleton import BlockCall


@torch.enable_grad()
def slope_at_inputs(call: BlockCall, block: nn.Module, hidden: Tensor, slope: Tensor) -> Tensor:
    """∂L/∂h of a block's inputs from that of its outputs: both (1, tokens, hidden), as the inputs are."""
    leaf = hidden.requires_grad_()
    torch.autograd.backward(call.run(block, leaf), slope)
    if leaf.grad is None:
        raise RuntimeError("the block does not depend on its inputs")
    return leaf.grad


@contextmanager
def summed_gradients(
    block: nn.Module, wanted: Mapping[str, str]
) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Sums over the backward passes made inside the context, in float32: of |∂L/∂w|, and of (∂L/∂y)² over tokens.

    `wanted`: stored names of linear layers' weights by their names in the block; the sums, in a weight's shape and
    (outputs,), go by the stored ones. No weight's gradient is held longer than it takes to add it.
    """
    gradients: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}
    handles = []
    for inside, name in wanted.items():
        parameter = block.get_parameter(inside).requires_grad_()
        gradients[name] = torch.zeros(parameter.shape, device=parameter.device)
        layer = block.get_submodule(inside.removesuffix(".weight"))
        handles += [
            parameter.register_post_accumulate_grad_hook(_adder(gradients[name])),  # type: ignore[no-untyped-call]
            layer.register_forward_hook(_watcher(squares, name)),
        ]
    try:
        yield gradients, squares
    finally:
        for handle in handles:
            handle.remove()
        for inside in wanted:
            block.get_parameter(inside).requires_grad_(False)


def _adder(total: Tensor) -> Callable[[Tensor], None]:
    def add(parameter: Tensor) -> None:
        if parameter.grad is not None:
            total.add_(parameter.grad.abs_())
            parameter.grad = None

    return add


def _watcher(
    squares: dict[str, Tensor], name: str
) -> Callable[[nn.Module, Any, Tensor | tuple[Tensor, ...]], None]:
    def add(slope: Tensor) -> None:
        squares[name] += slope.float().square().flatten(0, -2).sum(0)

    def look(_layer: nn.Module, _inputs: Any, returned: Tensor | tuple[Tensor, ...]) -> None:
        # A router returns what it chose beside its products.
        output = returned[0] if isinstance(returned, tuple) else returned
        if name not in squares:
            squares[name] = torch.zeros(output.shape[-1], device=output.device)
        if output.requires_grad:
            output.register_hook(add)  # type: ignore[no-untyped-call]

    return look
