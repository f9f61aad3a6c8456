"""The distinct inputs of a block's layers, with the statistics that a solver of one's own needs of each."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

import torch
from torch import Tensor

from app.errors import JobFailed
from workers.engine.calibration.activation_ranges import Extremes, input_extremes
from workers.engine.calibration.block_stream import LiveBlock
from workers.engine.calibration.input_moments import gather_moments, reached_sites
from workers.engine.checkpoint.selection import non_finite


@dataclass(frozen=True)
class Site:
    """An input and the layers that share it."""

    names: list[str]
    """Of the layers, within the block."""
    weights: dict[str, Tensor]
    """Of the layers, by stored name: (rows, features), as the block computes with them."""
    second_moment: Tensor
    """H = Σ x xᵀ / T: (features, features)."""
    extremes: Extremes


def block_sites(block: LiveBlock, wanted: Container[str]) -> list[Site]:
    """Run the block on all windows and return the inputs of its wanted layers; `wanted` holds stored names.

    Raises JobFailed when a wanted layer is never called or an input is not finite, InvalidRequest for such a weight.
    """
    chosen, sites = reached_sites(block, wanted)
    if not sites:
        return []
    with input_extremes(block.module, [site.layers[0] for site in sites]) as extremes:
        gather_moments(block, sites)
    return [
        _checked(
            Site(
                site.layers,
                {chosen[name]: block.module.get_parameter(f"{name}.weight") for name in site.layers},
                site.second_moment(),
                extremes[site.layers[0]],
            )
        )
        for site in sites
    ]


def _checked(site: Site) -> Site:
    if not torch.isfinite(site.second_moment.diagonal()).all():
        raise JobFailed(
            f"The inputs of {', '.join(site.weights)} are NaN or infinite on the calibration text.",
            code="non_finite_activations",
            hint="Check that the original gives sensible outputs in float32; quantize.weights needs no activations.",
        )
    for name, weight in site.weights.items():
        if not torch.isfinite(weight).all():
            raise non_finite(name)
    return site
