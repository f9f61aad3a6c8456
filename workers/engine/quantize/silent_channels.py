"""Channels that carry nothing: outputs whose weights are all zero, inputs that no calibration text ever excites."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from app.spec.report import Flag
from workers.engine.checkpoint.selection import module_name

_NAMED = 5


def carrying_outputs(rows: Tensor, *, inputs_first: bool) -> Tensor:
    """Which outputs have a weight that is not zero: rows (n, columns) -> (n,), or (columns,) where rows are inputs."""
    return rows.any(0 if inputs_first else 1)


@dataclass
class ZeroOutputs:
    """Counts the outputs of one weight that carry nothing, part by part.

    It keeps no tensor of a part: small ones that stay between large ones that go would keep the heap from shrinking.
    """

    inputs_first: bool
    _complete: int = 0
    _carrying: Tensor | None = None
    """Where each part has all outputs: those that carry something so far."""

    def add(self, carrying: Tensor) -> None:
        """Take what `carrying_outputs` found in the next rows."""
        if not self.inputs_first:
            self._complete += int((~carrying).sum())
        elif self._carrying is None:
            self._carrying = carrying.clone()
        else:
            self._carrying |= carrying

    @property
    def count(self) -> int:
        """Outputs without a weight in any of the parts."""
        return self._complete if self._carrying is None else int((~self._carrying).sum())


@dataclass
class SilentChannels:
    """What was found so far, layer by layer."""

    zero_outputs: dict[str, int] = field(default_factory=dict)
    """Outputs with only zeros, by the name of the weight."""
    dead_inputs: dict[str, int] = field(default_factory=dict)
    """Inputs that were always zero, by the weight of the first layer that has them."""

    @classmethod
    def joined(cls, records: Iterable[Mapping[str, dict[str, int]]]) -> SilentChannels:
        """What records of blocks say under the names of its fields."""
        found = cls()
        for record in records:
            found.zero_outputs |= record["zero_outputs"]
            found.dead_inputs |= record["dead_inputs"]
        return found

    def look_at_weight(self, name: str, weight: Tensor) -> None:
        """Count the outputs of a weight (rows, columns) that have only zeros."""
        self.add_zero_outputs(name, int((~carrying_outputs(weight, inputs_first=False)).sum()))

    def add_zero_outputs(self, name: str, count: int) -> None:
        """Note those of a layer, if it has any."""
        if count:
            self.zero_outputs[name] = count

    def look_at_inputs(self, names: Sequence[str], moments: Tensor) -> None:
        """Count what the layers that share an input never saw: diag H, (columns,)."""
        count = int(torch.count_nonzero(moments == 0))
        if count:
            self.dead_inputs[names[0]] = count

    def flags(self, *, dead_weights: str) -> tuple[Flag, ...]:
        """One flag for each kind; `dead_weights` says what became of the weights that multiply dead inputs."""
        found = []
        if self.zero_outputs:
            found.append(
                Flag(
                    code="zero_channels",
                    detail=f"Output channels whose weights are all zero: {_listed(self.zero_outputs)}. Pruned without "
                    "being removed, or broken; they stay zero.",
                )
            )
        if self.dead_inputs:
            found.append(
                Flag(
                    code="dead_inputs",
                    detail=f"Inputs that were zero on all of the calibration text: {_listed(self.dead_inputs)}. What they "
                    f"do on other text was not taken into account. {dead_weights}",
                )
            )
        return tuple(found)


def _listed(counts: Mapping[str, int]) -> str:
    """E.g. `7 in 2 layers (a: 4, b: 3)`; a bounded number of names."""
    named = ", ".join(f"{module_name(name)}: {count:,}" for name, count in list(counts.items())[:_NAMED])
    more = f" and {len(counts) - _NAMED} more" if len(counts) > _NAMED else ""
    layers = "layer" if len(counts) == 1 else "layers"
    return f"{sum(counts.values()):,} in {len(counts)} {layers} ({named}{more})"
