"""Round each convolution and linear layer to int8 when the one forward of all calibration images reaches it.

The images go through the model together, once, and each of them twice: as the original computes, and with weights and
inputs rounded. A layer that is called is given all its inputs, as the rounded layers before it leave them. Its H is that
of the patches its kernel meets (im2col), one for each group of channels, and its columns are rounded with compensation as
those of any linear layer (GPTQ, Frantar et al. 2022; for convolutions, Frantar & Alistarh 2022, "Optimal Brain
Compression"). What its outputs then differ by on average from the original's goes into its bias (Nagel et al. 2019,
"Data-Free Quantization Through Weight Equalization and Bias Correction", sec. 4.2, on data): of channels that a grid for
all of them is too coarse for, the values nearest to zero are lost, all to the same side.
Memory holds the model and the widest layer's activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from app.errors import JobFailed
from workers.engine.calibration.activation_ranges import BINS, least_error_range
from workers.engine.checkpoint.selection import non_finite
from workers.engine.export.onnx_qdq import LEVELS, InputGrid
from workers.engine.quantize.compensation import compensated, factor_or_none, output_error
from workers.engine.quantize.packed_layers import WeightError
from workers.engine.quantize.patches import groups_of, second_moments
from workers.engine.quantize.qdq import nearest_rows
from workers.engine.quantize.solutions import Solutions
from workers.engine.technique import Progress


@dataclass(frozen=True)
class Int8Weight:
    """A weight as int8 codes of its own shape, and a positive scale for each of its outputs."""

    codes: NDArray[np.int8]
    scales: NDArray[np.float32]

    @property
    def stored_bits(self) -> float:
        """Bits per weight, scales and zero points included."""
        return 8 + 40 * len(self.scales) / int(self.codes.size)


@dataclass(frozen=True)
class ForwardSolver:
    """Solves the layers of one model in the order they are called."""

    stored_names: Mapping[str, str]
    """Names in the checkpoint of the weights to round, by the modules' names in the model."""
    damping: float
    clips: bool
    """Whether ranges of inputs may leave out extreme values."""
    threads: int
    progress: Progress
    solutions: Solutions[Int8Weight] = field(default_factory=Solutions[Int8Weight])

    @torch.no_grad()
    def solve(self, model: nn.Module, pixels: Tensor) -> None:
        """Round the layers in place: pixels (images, channels, height, width). Raises JobFailed for one that is never called."""
        with self._hooked(model):
            model(pixel_values=torch.cat((pixels, pixels)))
        unseen = set(self.stored_names.values()) - self.solutions.matrices.keys()
        if unseen:
            raise JobFailed(
                f"Calibration never reached {', '.join(sorted(unseen))}.",
                code="layer_never_called",
                hint="Put these layers on the step's ignore list.",
            )

    @contextmanager
    def _hooked(self, model: nn.Module) -> Iterator[None]:
        handles = [
            model.get_submodule(name).register_forward_hook(self._solving(stored))
            for name, stored in self.stored_names.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _solving(self, stored: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
        def hook(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
            wanted = output.chunk(2)[0]
            given = rounded(inputs[0].chunk(2)[1], clips=self.clips)
            self._solve(stored, layer, given)
            found = type(layer).forward(layer, given)
            self.progress(
                len(self.solutions.matrices) / len(self.stored_names),
                f"layer {len(self.solutions.matrices)} of {len(self.stored_names)}",
            )
            return torch.cat((wanted, found + _corrected(layer, wanted - found)))

        return hook

    def _solve(self, stored: str, layer: nn.Module, inputs: Tensor) -> None:
        parameter = layer.get_parameter("weight")
        if not torch.isfinite(parameter).all():
            raise non_finite(stored)
        moments = second_moments(layer, inputs)
        if not torch.isfinite(moments.diagonal(dim1=1, dim2=2)).all():
            raise JobFailed(
                f"The inputs of {stored} are NaN or infinite on the calibration images.",
                code="non_finite_activations",
                hint="Check that the original gives sensible outputs in float32.",
            )
        weight = parameter.flatten(1)
        parts = [
            self._round(stored, rows, moment)
            for rows, moment in zip(weight.chunk(groups_of(layer)), moments, strict=True)
        ]
        codes, scales, restored = (torch.cat(values) for values in zip(*parts, strict=True))
        self._keep(stored, weight, restored, moments)
        shaped = codes.to(torch.int8).view_as(parameter).cpu().numpy()
        self.solutions.matrices[stored] = Int8Weight(shaped, scales.cpu().numpy())
        parameter.copy_(restored.view_as(parameter))

    def _round(self, stored: str, rows: Tensor, moment: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes (outputs, columns), scales (outputs,) and rounded weights of one group."""
        fit = nearest_rows(rows)
        factor = factor_or_none(moment, self.damping, stored, self.solutions.warnings)
        if factor is not None:
            fit = compensated(rows, factor, fit, threads=self.threads)
        return fit.codes, fit.scale[:, 0].contiguous(), fit.restored()

    def _keep(self, stored: str, weight: Tensor, restored: Tensor, moments: Tensor) -> None:
        """Add up what was lost, of the weights and of the outputs."""
        self.solutions.silent.look_at_weight(stored, weight)
        difference = restored - weight
        self.solutions.errors[stored] = WeightError(
            float(difference.double().square().sum()), float(weight.double().square().sum())
        )
        lost, had = (
            sum(output_error(p, h) for p, h in zip(values.chunk(len(moments)), moments, strict=True))
            for values in (difference, weight)
        )
        self.solutions.output_errors.append((lost, had))


def rounded(inputs: Tensor, *, clips: bool) -> Tensor:
    """Inputs as a runtime will give them: on 256 points between both ends of what there is, or of what is worth keeping."""
    low, high = min(0.0, float(inputs.min())), max(0.0, float(inputs.max()))
    if clips and low < high:
        counts = torch.histc(inputs.float(), BINS, low, high).cpu()
        low, high = least_error_range(counts, low, high, levels=LEVELS)
    grid = InputGrid.spanning(low, high, None)
    codes = torch.round(inputs / grid.scale) + grid.zero
    return (codes.clamp_(0, LEVELS) - grid.zero) * grid.scale


def _corrected(layer: nn.Module, lost: Tensor) -> Tensor:
    """Add to a layer's bias what its outputs lost on average; what that adds to the outputs, in a shape that fits them."""
    if getattr(layer, "bias", None) is None:
        return torch.zeros((), device=lost.device)
    dimensions = (0, 2, 3) if isinstance(layer, nn.Conv2d) else tuple(range(lost.dim() - 1))
    mean = lost.mean(dimensions, keepdim=True)
    layer.get_parameter("bias").add_(mean.flatten())
    return mean
