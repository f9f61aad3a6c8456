"""What a calibrated quantizer has found so far: matrices ready to be written, and what they lost."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from torch import Tensor

from app.spec.report import LayerOutcome
from workers.engine.checkpoint.selection import Selection
from workers.engine.quantize.compensation import output_error
from workers.engine.quantize.packed_layers import WeightError
from workers.engine.quantize.silent_channels import SilentChannels


class StoredMatrix(Protocol):
    """A quantized weight as it will be written."""

    @property
    def stored_bits(self) -> float:
        """Bits per weight, scales and zero points included."""


M = TypeVar("M", bound=StoredMatrix)


@dataclass
class Solutions(Generic[M]):
    """One matrix for each quantized layer, by the stored name of its weight."""

    matrices: dict[str, M] = field(default_factory=dict)
    errors: dict[str, WeightError] = field(default_factory=dict)
    output_errors: list[tuple[float, float]] = field(default_factory=list)
    """Per layer: tr(D H Dᵀ) and tr(W H Wᵀ)."""
    warnings: list[str] = field(default_factory=list)
    silent: SilentChannels = field(default_factory=SilentChannels)

    def add(self, stored: str, matrix: M, weight: Tensor, restored: Tensor, second_moment: Tensor) -> None:
        """Keep a matrix that stands for `restored` in the place of `weight`, both (rows, columns)."""
        difference = restored - weight
        self.silent.look_at_weight(stored, weight)
        self.matrices[stored] = matrix
        self.errors[stored] = WeightError(
            float(difference.double().square().sum()), float(weight.double().square().sum())
        )
        self.output_errors.append(
            (output_error(difference, second_moment), output_error(weight, second_moment))
        )

    def relative_error(self, stored: str) -> float:
        """‖W' − W‖ / ‖W‖ of one layer."""
        error = self.errors[stored]
        return float((error.of_error / error.of_weights) ** 0.5) if error.of_weights else 0.0

    def layers(self, selection: Selection) -> tuple[LayerOutcome, ...]:
        """What became of each layer that was chosen and quantized."""
        return tuple(
            LayerOutcome(
                name=stored,
                action="quantized",
                parameters=selection.chosen[stored].fact.elements,
                bits=matrix.stored_bits,
                relative_error=self.relative_error(stored),
            )
            for stored, matrix in self.matrices.items()
        )

    def totals(self) -> dict[str, float | int | str | None]:
        """Relative errors over all layers: of the weights, and of the outputs on what was calibrated on."""
        errors = self.errors.values()
        weights = sum(error.of_weights for error in errors)
        lost, had = (sum(values) for values in zip(*self.output_errors, strict=True))
        return {
            "relative_error": (sum(error.of_error for error in errors) / weights) ** 0.5 if weights else 0.0,
            "relative_output_error": (lost / had) ** 0.5 if had else 0.0,
        }


def stored_totals(quantized: tuple[LayerOutcome, ...]) -> dict[str, float | int | str | None]:
    """How many weights were quantized, and the bits that each is stored in."""
    weights = sum(layer.parameters for layer in quantized)
    bits = sum((layer.bits or 0.0) * layer.parameters for layer in quantized)
    return {"quantized_weights": weights, "stored_bits": bits / weights}
