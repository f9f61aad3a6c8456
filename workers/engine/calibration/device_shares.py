"""Share the windows that go through a block among devices: each has a copy of the block and takes windows in a row.

What they add up is summed on the first device, in the order of the devices: the same devices give the same bytes, other
devices others in the last digits. With one device there is no copy, no thread and no sum.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from workers.engine.architectures.skeleton import BlockCall

T = TypeVar("T")


def other_gpus(device: str) -> tuple[str, ...]:
    """Those that this process is shown beside the first (CUDA_VISIBLE_DEVICES says which); none for a job on the CPU."""
    if device != "cuda":
        return ()
    return tuple(f"cuda:{number}" for number in range(1, torch.cuda.device_count()))


@dataclass(frozen=True)
class WindowShare:
    """Windows that one device runs through a block, with the block and its arguments there."""

    device: str
    module: nn.Module
    call: BlockCall
    parts: Sequence[range]
    """Windows that run together, one part after the other."""


def share_windows(
    module: nn.Module, call: BlockCall, parts: Sequence[range], devices: Sequence[str]
) -> list[WindowShare]:
    """A share for each device that there is something for; the first has the block itself, the others copies as it is now."""
    each = -(-len(parts) // len(devices))
    shares = [WindowShare(devices[0], module, call, parts[:each])]
    for number, device in enumerate(devices[1:], start=1):
        if own := parts[number * each : (number + 1) * each]:
            shares.append(WindowShare(device, copied(module, device), call.on(device), own))
    return shares


def copied(module: nn.Module, device: str) -> nn.Module:
    """The module on another device; nothing of it is copied on its own."""
    moved: dict[int, object] = {id(buffer): buffer.to(device) for buffer in module.buffers()}
    for parameter in module.parameters():
        moved[id(parameter)] = nn.Parameter(parameter.detach().to(device), requires_grad=False)
    return copy.deepcopy(module, moved)


def on_all(work: Callable[[T], None], items: Sequence[T], devices: Sequence[str]) -> None:
    """Work on each item, all at once, each on the device at its place; the first in this thread.

    Raises what the first of them raised that failed, once none works any more.
    """
    if len(items) == 1:
        work(items[0])
        return

    @torch.no_grad()
    def run(item: T, device: str) -> None:
        with current_device(device):
            work(item)

    with ThreadPoolExecutor(len(items) - 1) as pool:
        others = [
            pool.submit(run, item, device) for item, device in zip(items[1:], devices[1:], strict=False)
        ]
        work(items[0])
    for other in others:
        other.result()


@contextmanager
def current_device(device: str) -> Iterator[None]:
    """What is launched meanwhile without saying where is launched on this device."""
    if torch.device(device).type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        yield
