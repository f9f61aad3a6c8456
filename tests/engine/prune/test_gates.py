"""Gates by themselves, against the papers' formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from workers.engine.prune.gates import (
    HardConcreteGates,
    MovementGates,
    ScheduledGates,
    drawn_gate,
    open_probability,
    settled_gate,
)

HALF = [(1, 0.5)]


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4))


NAMES = ("0.weight", "2.weight")


def test_closed_on_the_smallest_weights_of_each_layer() -> None:
    model = _model()
    before = {name: model.get_parameter(name).detach().clone() for name in NAMES}
    gates = ScheduledGates(model, NAMES, [(3, 0.25)], together=False)
    x = torch.randn(5, 8)
    dense = model(x)
    gates.before_step(2)
    assert torch.equal(model(x), dense)
    gates.before_step(3)
    assert not torch.equal(model(x), dense)
    gates.settle()
    for name in NAMES:
        weight, gone = model.get_parameter(name), model.get_parameter(name) == 0
        assert int(gone.sum()) == round(0.25 * gone.numel())
        assert before[name][gone].abs().max() <= before[name][~gone].abs().min()
        assert torch.equal(weight[~gone], before[name][~gone])


def test_one_list_for_all_layers_takes_more_from_smaller_weights() -> None:
    model = _model()
    with torch.no_grad():
        model.get_parameter("2.weight").mul_(0.01)
    gates = ScheduledGates(model, NAMES, HALF, together=True)
    gates.before_step(1)
    assert not gates.open["2.weight"].any()
    assert int(gates.open["0.weight"].sum()) == (48 + 24) // 2


def test_a_closed_gate_lets_no_gradient_through_but_the_weight_keeps_its_value() -> None:
    model = _model()
    weight = model.get_parameter("0.weight")
    before = weight.detach().clone()
    gates = ScheduledGates(model, NAMES, HALF, together=False)
    gates.before_step(1)
    model(torch.randn(5, 8)).sum().backward()
    assert torch.equal(weight.grad == 0, ~gates.open["0.weight"])
    assert torch.equal(weight, before)


def test_movement_is_the_sum_of_minus_w_times_the_gradient_of_the_gated_weight() -> None:
    model, plain = _model(), _model()
    gates = MovementGates(model, NAMES, [(1, 0.5), (2, 0.25)], together=False)
    gates.open["0.weight"][:, :4] = False
    with torch.no_grad():
        plain.get_parameter("0.weight")[:, :4] = 0
    expected = torch.zeros(6, 8)
    for seed in (1, 2):
        torch.manual_seed(seed)
        x = torch.randn(5, 8)
        plain.zero_grad()
        for net in (model, plain):
            net(x).square().sum().backward()
        expected -= model.get_parameter("0.weight").detach() * plain.get_parameter("0.weight").grad
    assert torch.allclose(gates.movement["0.weight"], expected, atol=1e-5)
    assert expected[:, :4].abs().min() > 0
    # One that was closed comes back where it moved most.
    gates.before_step(1)
    threshold = expected.flatten().sort().values[24]
    assert torch.equal(gates.open["0.weight"], expected >= threshold)
    assert gates.open["0.weight"][:, :4].any()


def test_what_was_zero_before_is_closed_first() -> None:
    model = _model()
    with torch.no_grad():
        model.get_parameter("0.weight")[0] = 0
    gates = MovementGates(model, NAMES, [(1, 8 / 48)], together=False)
    model(torch.randn(5, 8)).square().sum().backward()
    gates.before_step(1)
    assert not gates.open["0.weight"][0].any()
    assert gates.open["0.weight"][1:].all()


@pytest.mark.parametrize("log_odds", [-3.0, -1.0, 0.5, 3.0])
def test_as_many_draws_are_open_as_the_formula_says(log_odds: float) -> None:
    torch.manual_seed(0)
    draws = drawn_gate(torch.full((200_000,), log_odds))
    share = open_probability(torch.tensor(log_odds)).item()
    assert (draws > 0).double().mean().item() == pytest.approx(share, abs=0.005)
    # Equation 12 of the paper, by hand.
    assert share == pytest.approx(1 / (1 + math.exp(-(log_odds - 2 / 3 * math.log(0.1 / 1.1)))), abs=1e-6)


def test_a_settled_gate_is_exactly_shut_or_open_at_the_ends() -> None:
    assert settled_gate(torch.tensor([-2.5, -2.3, 0.0, 2.3, 2.5])).tolist() == pytest.approx(
        [0, 0.0093, 0.5, 0.9907, 1], abs=1e-3
    )


def test_learned_gates_close_on_the_weights_that_the_loss_does_not_need() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 1, bias=False))
    with torch.no_grad():
        model.get_parameter("0.weight").copy_(torch.tensor([[1.0, 1, 1, 1, 0.01, 0.01, 0.01, 0.01]]))
    target = model.get_parameter("0.weight").detach().clone()
    gates = HardConcreteGates(model, ["0.weight"], penalty=0.5, rate=0.1, seed=0)
    optimizer = torch.optim.Adam(gates.gates().values(), lr=0.1, eps=1e-16, fused=True)
    at_first = gates.penalty().item()
    for step in range(1, 201):
        gates.before_step(step)
        x = torch.randn(64, 8)
        ((model(x) - x @ target.T).square().mean() + gates.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert gates.penalty().item() < 0.75 * at_first
    gates.settle()
    weight = model.get_parameter("0.weight")[0]
    assert (weight[4:] == 0).all()
    assert (weight[:4] > 0.5).all()


def test_draws_depend_on_the_step_alone() -> None:
    model = _model()
    gates = HardConcreteGates(model, NAMES, penalty=1, rate=0.1, seed=7)
    x = torch.randn(5, 8)
    outputs = []
    for step in (1, 2, 1):
        gates.before_step(step)
        outputs.append(model(x).detach())
    assert torch.equal(outputs[0], outputs[2])
    assert not torch.equal(outputs[0], outputs[1])
