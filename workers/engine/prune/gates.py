"""Gates: layers compute with each weight times its gate while they are trained; which gates close is what prunes.

`ScheduledGates` close on the smallest weights at the steps of a schedule, and hold in between.
Paper: Zhu and Gupta 2017, "To prune, or not to prune". A weight behind a closed gate keeps its value and is not trained.
`MovementGates` close on the weights that training moves towards zero: scores are −Σ w · ∂L/∂w over the batches, the
gradient passed straight through closed gates, so that a weight can come back.
Paper: Sanh, Wolf and Rush 2020, "Movement Pruning", equations 2 and 3, with masks that hold from the last cut on.
`HardConcreteGates` are drawn in each forward pass, and trained with the expected number of open ones as a penalty.
Paper: Louizos, Welling and Kingma 2018, "Learning Sparse Neural Networks through L0 Regularization", equations 10 to 12.
Left out: gates for rows, heads or blocks of weights; N:M patterns, which need no schedule.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from workers.engine.distill.training import Masks
from workers.engine.prune.masks import Pattern

# Temperature of the concrete distribution, and the interval it is stretched to (Louizos et al. 2018, section 4).
_BETA = 2 / 3
_LOW, _HIGH = -0.1, 1.1
# Log-odds of a gate at the start: open as it will be used, fully so in four draws of five.
_AT_FIRST = 3.0


class Gates:
    """Parameters of a model that compute times their gates from now on, by name; open, and left open, in this class."""

    settled = 0
    gate_rate = 0.0

    def __init__(self, model: nn.Module, names: Collection[str]) -> None:
        self.weights: dict[str, nn.Parameter] = {name: model.get_parameter(name) for name in names}
        for name in names:
            module, _, attribute = name.rpartition(".")
            layer = model.get_submodule(module)
            layer.register_forward_pre_hook(partial(self._put_gated, name, attribute))
            layer.register_forward_hook(partial(_put_back, attribute), always_call=True)

    def gates(self) -> dict[str, nn.Parameter]:
        """See `Pruning`."""
        return {}

    def statistics(self) -> dict[str, Tensor]:
        """See `Pruning`."""
        return {}

    def before_step(self, step: int) -> Masks:  # noqa: ARG002 - see `Pruning`
        """See `Pruning`."""
        return ()

    def penalty(self) -> Tensor:
        """See `Pruning`."""
        return torch.zeros(())

    def gated(self, name: str) -> Tensor:
        """A weight times its gates, differentiable."""
        return self.weights[name]

    @torch.no_grad()
    def settle(self) -> None:
        """Set the weights to what the model computes with when it is not trained."""
        for name, weight in self.weights.items():
            weight.copy_(self.gated(name))

    def _put_gated(self, name: str, attribute: str, layer: nn.Module, _arguments: Any) -> None:
        # An attribute of the instance hides the parameter of that name while the layer computes.
        layer.__dict__[attribute] = self.gated(name)


def _put_back(attribute: str, layer: nn.Module, _arguments: Any, _output: Any) -> None:
    layer.__dict__.pop(attribute, None)


class ScheduledGates(Gates):
    """Open or closed, closed on the smallest weights at the steps of a schedule."""

    def __init__(
        self,
        model: nn.Module,
        names: Collection[str],
        points: Sequence[tuple[int, float]],
        *,
        together: bool,
    ) -> None:
        """`points` are (step, sparsity), ascending; `together` ranks the weights of all layers in one list."""
        super().__init__(model, names)
        self._sparsity_at = dict(points)
        self._together = together
        self.settled = points[-1][0]
        self.open = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in self.weights.items()}

    def statistics(self) -> dict[str, Tensor]:
        """The masks."""
        return {f"open/{name}": mask for name, mask in self.open.items()}

    @torch.no_grad()
    def before_step(self, step: int) -> Masks:
        """Choose anew what is closed, where the schedule says so."""
        if step not in self._sparsity_at:
            return ()
        pattern = Pattern(self._sparsity_at[step])
        names = list(self.weights)
        for group in [names] if self._together else [[name] for name in names]:
            scores = torch.cat([self._scores(name).flatten() for name in group])
            lowest = pattern.lowest(scores[None], by_row=False)[0]
            parts = torch.split(lowest, [self.weights[name].numel() for name in group])
            for name, part in zip(group, parts, strict=True):
                self.open[name].copy_(~part.view_as(self.open[name]))
        return [(self.weights[name], self.open[name]) for name in names]

    def gated(self, name: str) -> Tensor:
        """A weight where its gate is open, else zero."""
        return self.weights[name] * self.open[name]

    def _scores(self, name: str) -> Tensor:
        """What stays longest scores highest."""
        return self.weights[name].abs()


class MovementGates(ScheduledGates):
    """The same, closed on the weights that training moves towards zero."""

    def __init__(
        self,
        model: nn.Module,
        names: Collection[str],
        points: Sequence[tuple[int, float]],
        *,
        together: bool,
    ) -> None:
        super().__init__(model, names, points, together=together)
        self.movement = {name: torch.zeros_like(weight) for name, weight in self.weights.items()}

    def statistics(self) -> dict[str, Tensor]:
        """Masks and scores."""
        return super().statistics() | {f"movement/{name}": score for name, score in self.movement.items()}

    def gated(self, name: str) -> Tensor:
        """A weight where its gate is open, else zero; on the way back its score is noted."""
        gated: Tensor = _Moving.apply(self.weights[name], self.open[name], self.movement[name])  # type: ignore[no-untyped-call]
        return gated

    def _scores(self, name: str) -> Tensor:
        # What an earlier step set to zero never moves, and is held there: it counts as gone already.
        return self.movement[name].detach().masked_fill(self.weights[name] == 0, -math.inf)


class _Moving(torch.autograd.Function):
    """w · mask; its gradient by w, and in passing the sum of −w · ∂L/∂(w · mask)."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor, movement: Tensor) -> Tensor:
        ctx.save_for_backward(weight, mask)
        ctx.movement = movement
        return weight * mask

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        weight, mask = ctx.saved_tensors
        ctx.movement.addcmul_(weight, upstream[0], value=-1)
        return upstream[0] * mask, None, None


class HardConcreteGates(Gates):
    """Between open and closed, drawn while the model is trained; the log-odds of each gate are learned."""

    def __init__(
        self, model: nn.Module, names: Collection[str], *, penalty: float, rate: float, seed: int
    ) -> None:
        """`penalty` is what the loss grows by with all gates open; `rate` the peak learning rate of log-odds."""
        super().__init__(model, names)
        self._penalty, self.gate_rate, self._seed = penalty, rate, seed
        self._log_odds: dict[str, nn.Parameter] = {
            name: nn.Parameter(torch.full_like(weight, _AT_FIRST)) for name, weight in self.weights.items()
        }

    def gates(self) -> dict[str, nn.Parameter]:
        """Their log-odds."""
        return {f"log_odds/{name}": log_odds for name, log_odds in self._log_odds.items()}

    def before_step(self, step: int) -> Masks:
        """Draw by the step's number, so that a training that goes on draws what it would have drawn."""
        torch.manual_seed(self._seed + step)
        return ()

    def penalty(self) -> Tensor:
        """The penalty times the expected share of gates that are not closed."""
        weights = sum(log_odds.numel() for log_odds in self._log_odds.values())
        open_gates = [open_probability(log_odds).sum() for log_odds in self._log_odds.values()]
        return self._penalty * torch.stack(open_gates).sum() / weights

    def gated(self, name: str) -> Tensor:
        """A weight times a gate that is drawn, or with gradients off times the one that it will have."""
        log_odds = self._log_odds[name]
        gate = drawn_gate(log_odds) if torch.is_grad_enabled() else settled_gate(log_odds)
        return self.weights[name] * gate


def drawn_gate(log_odds: Tensor) -> Tensor:
    """z = min(1, max(0, σ((logit u + log α) / β)·(ζ − γ) + γ)), u uniform: log α -> z, both of any shape."""
    noise = torch.rand_like(log_odds).logit(eps=1e-6)
    return _stretched(torch.sigmoid((noise + log_odds) / _BETA))


def settled_gate(log_odds: Tensor) -> Tensor:
    """The gate that is used once trained: min(1, max(0, σ(log α)·(ζ − γ) + γ))."""
    return _stretched(torch.sigmoid(log_odds))


def open_probability(log_odds: Tensor) -> Tensor:
    """How likely a drawn gate is not zero: σ(log α − β·log(−γ / ζ))."""
    return torch.sigmoid(log_odds - _BETA * math.log(-_LOW / _HIGH))


def _stretched(concrete: Tensor) -> Tensor:
    return (concrete * (_HIGH - _LOW) + _LOW).clamp(0, 1)


def share_of_zeros(tensors: Mapping[str, Tensor]) -> float:
    """Zeros over all elements."""
    zeros = sum(int((tensor == 0).sum()) for tensor in tensors.values())
    return zeros / sum(tensor.numel() for tensor in tensors.values())
