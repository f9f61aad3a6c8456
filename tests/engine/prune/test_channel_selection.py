from __future__ import annotations

import pytest
import torch
from torch import Tensor

from workers.engine.prune.channel_selection import hardest_to_replace, refitted, strongest

INPUTS, OUTPUTS, TOKENS = 24, 10, 200


def layer(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, inputs of different size that depend on each other, and their second moment; float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs = normal(TOKENS, 8) @ normal(8, INPUTS) * normal(INPUTS).exp() + 0.3 * normal(TOKENS, INPUTS)
    return normal(OUTPUTS, INPUTS), inputs, inputs.t() @ inputs / TOKENS


def loss(weight: Tensor, moment: Tensor, kept: Tensor) -> float:
    """The energy of the outputs that is lost with the best weights for the inputs kept."""
    change = -weight
    change[:, kept] += refitted(weight, moment, kept)
    return float(((change @ moment) * change).sum())


def test_refitted_weights_are_the_least_squares_optimum() -> None:
    weight, inputs, moment = layer()
    kept = torch.tensor([0, 3, 4, 9, 20])
    best = torch.linalg.lstsq(inputs[:, kept], inputs @ weight.t()).solution.t()
    torch.testing.assert_close(refitted(weight, moment, kept), best)


def test_with_as_many_rounds_as_inputs_to_remove_the_cheapest_goes_each_time() -> None:
    weight, _, moment = layer()
    left = list(range(INPUTS))
    for _ in range(10):
        without = [[i for i in left if i != j] for j in left]
        left = min(without, key=lambda kept: loss(weight, moment, torch.tensor(kept)))
    kept = hardest_to_replace(weight.float(), torch.linalg.inv(moment).float(), INPUTS - 10)
    assert kept.tolist() == left


def test_of_two_inputs_that_carry_the_same_one_stays() -> None:
    weight, inputs, _ = layer()
    inputs[:, 1] = inputs[:, 0] + 1e-2 * inputs[:, 1]
    moment = inputs.t() @ inputs / TOKENS
    weight[:, :2] *= 100 / inputs[:, :1].square().mean().sqrt()
    inverse = torch.linalg.inv(moment)
    found = [
        hardest_to_replace(weight.clone(), inverse.clone(), 4, rounds=rounds) for rounds in (1, INPUTS - 4)
    ]
    assert len({0, 1} & set(found[1].tolist())) == 1
    assert loss(weight, moment, found[1]) < loss(weight, moment, found[0])


@pytest.mark.parametrize("seed", range(3))
def test_less_is_lost_than_by_chance_or_by_size(seed: int) -> None:
    weight, _, moment = layer(seed)
    chosen = hardest_to_replace(weight.clone(), torch.linalg.inv(moment), 16)
    by_size = strongest(weight, torch.eye(INPUTS, dtype=weight.dtype), 16)
    generator = torch.Generator().manual_seed(seed)
    by_chance = [torch.randperm(INPUTS, generator=generator)[:16].sort().values for _ in range(5)]
    found = loss(weight, moment, chosen)
    assert found < 0.8 * loss(weight, moment, by_size)
    assert all(found < 0.8 * loss(weight, moment, kept) for kept in by_chance)
    assert found < loss(weight, moment, strongest(weight, moment, 16))


def test_the_strongest_inputs_have_most_energy_and_the_earlier_wins_a_tie() -> None:
    weight = torch.tensor([[1.0, 3.0, 2.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    moment = torch.diag(torch.tensor([4.0, 1.0, 1.0, 9.0]))
    assert strongest(weight, moment, 2).tolist() == [1, 3]
    assert strongest(weight, moment, 3).tolist() == [0, 1, 3]


@pytest.mark.parametrize("count", [1, INPUTS - 1])
def test_as_many_stay_as_were_asked_for(count: int) -> None:
    weight, _, moment = layer()
    kept = hardest_to_replace(weight, torch.linalg.inv(moment), count)
    assert len(set(kept.tolist())) == count
    assert kept.tolist() == sorted(kept.tolist())
