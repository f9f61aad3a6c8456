"""Which channels of a network can only go together, and which axes of which tensors go with them.

Every computed value has a layout: the spaces of channels that its second axis is made of. A convolution or linear layer
makes a space; additions and products make two spaces one; a concatenation puts layouts behind each other; flattening
repeats each channel by its places. What is not understood keeps its channels.
The same dependencies as in Fang et al. 2023, "DepGraph: Towards Any Structural Pruning", found by one pass over the calls.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.engine.onnx_network import Call


@dataclass(frozen=True)
class Segment:
    """The channels of one space, in order, each `repeat` times in a row."""

    space: int
    repeat: int = 1


Layout = tuple[Segment, ...]


@dataclass(frozen=True)
class Axis:
    """An axis of a tensor whose entries belong to channels."""

    array: str
    axis: int
    layout: Layout
    role: str
    """`reads`: a weight's inputs. `writes`: its outputs. `norm_scale`: of a batch norm. `follows`: any other."""


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer and what it costs."""

    call: Call
    places: int
    """Multiplications for each pair of an input and an output channel: places times size of the kernel."""
    reads: Layout | None
    """None for a depthwise convolution, whose outputs have one input each."""
    writes: Layout
    fixed: int = 0
    """Multiplications of a grouped convolution, whose channels all stay; it has no `places`."""


@dataclass(frozen=True)
class Channels:
    """All spaces of a network: how many channels each has, which may lose some, and what belongs to them."""

    sizes: dict[int, int]
    free: frozenset[int]
    axes: tuple[Axis, ...]
    layers: tuple[Layer, ...]
    layouts: dict[str, Layout]
    """Of every computed value, by name."""

    def width(self, layout: Layout, kept: Mapping[int, int]) -> int:
        """Entries of an axis when so many channels of each space are kept; all of those that are not named."""
        return sum(kept.get(s.space, self.sizes[s.space]) * s.repeat for s in layout)

    def macs(self, kept: Mapping[int, int] | None = None) -> int:
        """Multiplications for one image, of convolutions and linear layers."""
        kept = kept or {}
        return sum(
            layer.fixed
            + layer.places
            * self.width(layer.writes, kept)
            * (1 if layer.reads is None else self.width(layer.reads, kept))
            for layer in self.layers
        )

    def index(self, layout: Layout, kept: Mapping[int, Tensor]) -> Tensor:
        """Which entries of an axis stay when the channels `kept` of each space do: indices, ascending."""
        found, start = [], 0
        for segment in layout:
            size = self.sizes[segment.space]
            channels = kept.get(segment.space, torch.arange(size))
            found.append(
                start + (channels[:, None] * segment.repeat + torch.arange(segment.repeat)).flatten()
            )
            start += size * segment.repeat
        return torch.cat(found)

    def rows(self, axis: Axis, array: Tensor, space: int) -> Tensor:
        """What of a tensor belongs to each channel of a space: (channels, numbers)."""
        entries = array.movedim(axis.axis, 0).flatten(1) if array.dim() > 1 else array[:, None]
        parts, start = [], 0
        for segment in axis.layout:
            end = start + self.sizes[segment.space] * segment.repeat
            if segment.space == space:
                parts.append(entries[start:end].reshape(self.sizes[space], -1))
            start = end
        return torch.cat(parts, dim=1)

    def axes_of(self, space: int, *roles: str) -> Iterable[Axis]:
        """The axes that channels of a space stand in."""
        return (a for a in self.axes if a.role in roles and stands_in({space}, a.layout))


def stands_in(spaces: Container[int], layout: Layout) -> bool:
    """Whether a layout has channels of one of these spaces."""
    return any(segment.space in spaces for segment in layout)


class Spaces:
    """Spaces while they are found: made, made one, and kept whole."""

    def __init__(self) -> None:
        """None yet."""
        self._sizes: list[int] = []
        self._parents: list[int] = []
        self._whole: set[int] = set()

    def new(self, size: int) -> Layout:
        """A space of its own."""
        self._sizes.append(size)
        self._parents.append(len(self._parents))
        return (Segment(len(self._parents) - 1),)

    def find(self, space: int) -> int:
        """The number that stands for a space and all that were made one with it."""
        while self._parents[space] != space:
            space = self._parents[space]
        return space

    def size(self, layout: Layout) -> int:
        """Entries of an axis."""
        return sum(self._sizes[segment.space] * segment.repeat for segment in layout)

    def keep(self, *layouts: Layout) -> None:
        """None of these channels may go."""
        self._whole.update(segment.space for layout in layouts for segment in layout)

    def merge(self, one: Layout, other: Layout) -> None:
        """Channels that stand in the same place go together; where the two are made up otherwise, none goes."""
        if [(self._sizes[s.space], s.repeat) for s in one] != [
            (self._sizes[s.space], s.repeat) for s in other
        ]:
            self.keep(one, other)
            return
        for a, b in zip(one, other, strict=True):
            self._parents[self.find(a.space)] = self.find(b.space)

    def resolved(self, layout: Layout) -> Layout:
        """The same with the numbers that stand for its spaces."""
        return tuple(Segment(self.find(s.space), s.repeat) for s in layout)

    def sizes(self) -> dict[int, int]:
        """Channels of each space."""
        return {space: self._sizes[space] for space in range(len(self._sizes)) if self.find(space) == space}

    def free(self) -> frozenset[int]:
        """Spaces that may lose channels."""
        return frozenset(self.sizes()) - {self.find(space) for space in self._whole}
