"""What is moved when weights go, against float64 and against what it should beat."""

from __future__ import annotations

import pytest
import torch
from torch import Generator, Tensor

from workers.engine.prune.compensated import refitted, removed_in_order
from workers.engine.prune.criteria import CRITERIA, LayerStatistics
from workers.engine.prune.masks import Pattern
from workers.engine.quantize.compensation import factored_in_place, output_error

ROWS, COLUMNS, DAMPING = 24, 144, 0.01


def layer(seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight (rows, columns), and H (columns, columns) of inputs that depend on each other."""
    generator = Generator().manual_seed(seed)
    mixed = torch.randn(4 * COLUMNS, 12, generator=generator) @ torch.randn(12, COLUMNS, generator=generator)
    inputs = mixed + torch.randn(4 * COLUMNS, COLUMNS, generator=generator)
    return torch.randn(ROWS, COLUMNS, generator=generator), inputs.t() @ inputs / len(inputs)


def removed(
    weight: Tensor, second_moment: Tensor, pattern: Pattern, criterion: str = "sparsegpt", seed: int = 0
) -> Tensor:
    moments = second_moment.diagonal().clone()
    with factored_in_place(second_moment, DAMPING, "layer", [], torch.arange(COLUMNS)) as factor:
        assert factor is not None
        # Where outputs are pulled at by white noise, |∂L/∂w| is the size of the input.
        gradient = moments.sqrt().expand(ROWS, -1)
        generator = Generator().manual_seed(seed)
        statistics = LayerStatistics(moments, factor.diagonal(), generator, gradient)
        return removed_in_order(weight, factor, pattern, CRITERIA[criterion], statistics)


def surgeon(weight: Tensor, second_moment: Tensor, gone: Tensor) -> Tensor:
    """Optimal Brain Surgeon in float64: from left to right, each weight that goes moves all those after it."""
    damped = second_moment.double() + DAMPING * second_moment.diagonal().double().mean() * torch.eye(COLUMNS)
    moved = weight.double().clone()
    for j in range(COLUMNS):
        inverse = torch.linalg.inv(damped[j:, j:])
        lost = moved[:, j] * gone[:, j]
        moved[:, j:] -= lost.unsqueeze(1) * inverse[0] / inverse[0, 0]
        moved[:, j][gone[:, j]] = 0
    return moved


@pytest.mark.parametrize("pattern", [Pattern(0.5), Pattern(0.3), Pattern(0.5, 4), Pattern(0.5, 8)], ids=str)
def test_weights_move_as_optimal_brain_surgeon_says(pattern: Pattern) -> None:
    weight, second_moment = layer()
    kept = second_moment.clone()
    ours = removed(weight, second_moment, pattern)
    torch.testing.assert_close(second_moment, kept)
    torch.testing.assert_close(
        ours, surgeon(weight, kept, ours == 0).float(), rtol=1e-3, atol=1e-3, check_stride=False
    )


def test_a_block_of_columns_loses_the_weights_that_can_be_made_up_for_best() -> None:
    weight, second_moment = layer()
    inverse = torch.linalg.inv(
        second_moment.double()
        + DAMPING * second_moment.diagonal().double().mean() * torch.eye(COLUMNS, dtype=torch.float64)
    )
    # H⁻¹ = Uᵀ U.
    upper = torch.linalg.cholesky(inverse, upper=True)
    scores = (weight.double() / upper.diagonal()).square()[:, :128]
    worst = scores.flatten().sort().values[scores.numel() // 2]
    gone = removed(weight, second_moment, Pattern(0.5))[:, :128] == 0
    assert torch.equal(gone, scores < worst)


@pytest.mark.parametrize("pattern", [Pattern(0.5), Pattern(0.5, 4)], ids=str)
def test_outputs_lose_less_than_by_removing_alone_and_least_after_fitting(pattern: Pattern) -> None:
    weight, second_moment = layer()
    sparse = removed(weight, second_moment, pattern)
    alone = output_error(weight.masked_fill(sparse == 0, 0) - weight, second_moment)
    moved = output_error(sparse - weight, second_moment)
    fitted = output_error(refitted(weight, sparse, second_moment, steps=10) - weight, second_moment)
    assert fitted < 0.98 * moved < 0.9 * alone


def test_fitting_ends_at_the_least_squares_of_each_row() -> None:
    weight, second_moment = layer()
    sparse = removed(weight, second_moment, Pattern(0.6))
    ours = refitted(weight, sparse, second_moment, steps=COLUMNS)
    double = second_moment.double()
    for row, given in enumerate(ours):
        kept = given != 0
        expected = torch.linalg.solve(double[kept][:, kept], double[kept] @ weight[row].double())
        torch.testing.assert_close(given[kept].double(), expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(ours != 0, sparse != 0)


def test_what_is_given_stays_as_it_was_however_it_lies() -> None:
    weight, second_moment = layer()
    for given in (weight.clone(), weight.t().contiguous().t()):
        removed(given, second_moment, Pattern(0.5))
        assert torch.equal(given, weight)


def test_a_row_without_a_weight_and_one_that_is_complete_stay_as_they_are() -> None:
    weight, second_moment = layer()
    sparse = weight.clone()
    sparse[0] = 0
    fitted = refitted(weight, sparse, second_moment, steps=5)
    assert torch.equal(fitted, sparse)


def test_every_criterion_beats_chance_and_what_sees_the_inputs_beats_what_does_not() -> None:
    lost: dict[str, float] = dict.fromkeys(CRITERIA, 0.0)
    for seed in range(4):
        weight, second_moment = layer(seed)
        for name in CRITERIA:
            sparse = removed(weight, second_moment.clone(), Pattern(0.5), name, seed)
            lost[name] += output_error(sparse - weight, second_moment)
    assert lost["sparsegpt"] < lost["wanda"] < lost["magnitude"] < 0.7 * lost["random"]
    assert lost["taylor"] == lost["wanda"]
    assert lost["gradient"] < 0.9 * lost["random"]
