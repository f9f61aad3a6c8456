"""What every calibrated quantizer does with a block: find its inputs, and factor the statistics of each."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence

import torch
from torch import Tensor

from app.errors import JobFailed
from workers.engine.calibration.block_stream import LiveBlock
from workers.engine.calibration.input_moments import InputSite, input_moments
from workers.engine.checkpoint.selection import module_name
from workers.engine.quantize.compensation import Factor, NotPositiveDefinite, factorize


def block_sites(block: LiveBlock, wanted: Container[str]) -> Iterator[tuple[InputSite, list[str]]]:
    """Run the block, and give each distinct input with the stored names of its layers, in the order of `site.layers`.

    `wanted` holds stored names. Raises JobFailed after the last site when a wanted layer was never called.
    """
    chosen = {module_name(name): stored for name, stored in block.stored_names.items() if stored in wanted}
    for site in input_moments(block.module, chosen, block.run):
        yield site, [chosen.pop(name) for name in site.layers]
    if chosen:
        unseen = ", ".join(chosen.values())
        raise JobFailed(
            f"Calibration never reached {unseen}.",
            code="layer_never_called",
            hint="Put these layers on the step's ignore list, or use quantize.weights.",
        )


def factor_of_site(
    second_moment: Tensor, stored: Sequence[str], damping: float, warnings: list[str]
) -> Factor | None:
    """What all layers of an input share; None, with a warning that names them, where there is no factor.

    Raises JobFailed when the moments are not finite.
    """
    names = ", ".join(stored)
    if not torch.isfinite(second_moment).all():
        raise JobFailed(
            f"The inputs of {names} are NaN or infinite on the calibration text.",
            code="non_finite_activations",
            hint="Check that the original gives sensible outputs in float32; quantize.weights needs no activations.",
        )
    try:
        factor = factorize(second_moment, damping)
    except NotPositiveDefinite:
        warnings.append(f"rounded to nearest, since the inputs' statistics have no factor: {names}")
        return None
    if factor.damping > damping:
        warnings.append(f"damped by {factor.damping:g} to have a factor: {names}")
    return factor
