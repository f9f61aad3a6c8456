"""Round a slab of a weight's rows to nearest and write what it becomes: no text, and memory for a slab alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from app.spec.quantize import ScaleSearch
from workers.engine.checkpoint import CheckpointWriter, Slab
from workers.engine.checkpoint.selection import non_finite
from workers.engine.export.stored_layer import StoredLayer
from workers.engine.quantize.grid import WeightGrid
from workers.engine.quantize.packed_layers import WeightError


def round_slab(
    slab: Slab,
    rows: Tensor,
    layer: StoredLayer,
    grid: WeightGrid,
    scale_search: ScaleSearch,
    writer: CheckpointWriter,
) -> WeightError:
    """Round rows (n, columns) of one layer and write what they become where it belongs. Returns what was lost.

    Raises InvalidRequest for weights that are not finite.
    """
    weight = rows.float()
    norm = _finite_norm(weight, slab.entry.name)
    fit = layer.nearest(weight, grid, search=scale_search)
    for name, (start, content) in layer.parts(fit, slab.start).items():
        writer.write_rows(name, start, content)
    if slab.start == 0:
        for name, content in layer.input_parts(None).items():
            writer.write(name, content)
    error = fit.restored().sub_(weight).square_().sum(dtype=torch.float64).item()
    return WeightError(error, norm)


def _finite_norm(groups: Tensor, name: str) -> float:
    """The squared norm of float32 weights. Raises InvalidRequest when one of them is not finite."""
    norm = groups.square().sum(dtype=torch.float64).item()
    # The norm of finite weights can overflow too, so only a suspicious one is worth the second look.
    if not math.isfinite(norm) and not torch.isfinite(groups).all():
        raise non_finite(name)
    return norm
