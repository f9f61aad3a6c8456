"""Which inputs of a layer can go, and how those that stay make up for them.

With the second moment H of the inputs, leaving out the inputs D costs tr(W_D H_DD W_Dᵀ) of the outputs' energy, and
tr(W_D ([H⁻¹]_DD)⁻¹ W_Dᵀ) once the weights that stay are refitted by W_S + W_D H_DS H_SS⁻¹, which is least squares. For
one input that is ‖W_j‖² / [H⁻¹]_jj: Hassibi and Stork 1993, "Optimal Brain Surgeon", for a whole column at a time as in
Kurtic et al. 2023, "ZipLM", section 3.1. Two inputs that carry the same look dispensable, each by itself: so
few go at a time, and those left are scored anew.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ROUNDS = 32
_TINY = 1e-30


def strongest(weight: Tensor, second_moment: Tensor, count: int) -> Tensor:
    """The `count` inputs whose own part of the outputs, ‖W_j‖² H_jj, has most energy: indices, ascending.

    weight (out, in), second_moment (in, in). The earlier input wins a tie.
    """
    energy = weight.square().sum(0) * second_moment.diagonal()
    return torch.argsort(energy, descending=True, stable=True)[:count].sort().values


def hardest_to_replace(weight: Tensor, inverse: Tensor, count: int, *, rounds: int = _ROUNDS) -> Tensor:
    """The `count` inputs that are left when those whose loss is made up for best have gone: indices, ascending.

    weight (out, in) and inverse = H⁻¹ (in, in), float32, are both used up. After each round they are those of the
    inputs left: by elimination, H⁻¹ becomes the inverse of what is left of H, and W the refitted one.
    """
    inputs = len(inverse)
    gone = torch.zeros(inputs, dtype=torch.bool, device=inverse.device)
    for number in range(rounds):
        leave = count + (inputs - count) * (rounds - 1 - number) // rounds
        going = inputs - int(gone.sum()) - leave
        if going == 0:
            continue
        losses = weight.square().sum(0) / inverse.diagonal().clamp_min(_TINY)
        losses[gone] = torch.inf
        chosen = torch.argsort(losses, stable=True)[:going]
        eliminate_(weight, inverse, chosen)
        gone[chosen] = True
    return (~gone).nonzero().flatten()


def refitted(weight: Tensor, second_moment: Tensor, kept: Tensor) -> Tensor:
    """W_S + W_D H_DS H_SS⁻¹, the weights of the inputs kept that lose least: (out, kept).

    weight (out, in), second_moment (in, in) positive definite, kept ascending indices. Raises LinAlgError if it is not.
    """
    gone = torch.ones(len(second_moment), dtype=torch.bool, device=weight.device)
    gone[kept] = False
    rows = second_moment[kept]
    factor = torch.linalg.cholesky(rows[:, kept])
    moved = torch.cholesky_solve(rows[:, gone] @ weight[:, gone].t(), factor)
    return weight[:, kept] + moved.t()


def eliminate_(weight: Tensor, inverse: Tensor, chosen: Tensor) -> None:
    """Take inputs out of W and H⁻¹: their rows and columns become zero, but for rounding."""
    rows = inverse[chosen]
    # The block is positive definite, as every principal one of H⁻¹ is.
    coupling = torch.linalg.solve(rows[:, chosen], rows)
    weight -= weight[:, chosen] @ coupling
    inverse.addmm_(rows.t(), coupling, alpha=-1)
