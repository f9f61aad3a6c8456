"""Scales of a block's key-value cache: the largest key and the largest value over the calibration text, by E4M3's largest.

Keys are cached after the rotary embedding (and after their norm, where there is one), so they are seen where the model
hands them to its cache, whatever the architecture did to them before.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from app.errors import JobFailed
from app.spec.architectures import block_index
from app.spec.facts import TensorFact
from app.spec.kv_cache import KEY_SCALE, VALUE_SCALE
from workers.engine.architectures.skeleton import BlockCall
from workers.engine.calibration.block_stream import EnoughSeen, LiveBlock
from workers.engine.checkpoint.layout import TORCH_DTYPES
from workers.engine.export.stored_layer import one_number
from workers.engine.quantize.float_grids import E4M3_MAX


def cache_scales(block: LiveBlock, facts: Iterable[TensorFact]) -> dict[str, Tensor]:
    """Those of `facts` that belong to the block: (1,) each, by name; one for what was always zero.

    Of each window, only what leads to the keys and values is computed. Raises JobFailed when one is NaN or infinite.
    """
    watch = _LargestCached()
    call = BlockCall(block.call.args, block.call.kwargs | {"past_key_values": watch})
    replace(block, call=call).run()
    scales = {}
    for fact in facts:
        module, _, which = fact.name.rpartition(".")
        if block_index(fact.name) == block.index:
            scale = one_number(watch.peak(which, module) / E4M3_MAX, TORCH_DTYPES[fact.dtype])
            scales[fact.name] = torch.where(scale == 0, torch.ones_like(scale), scale)
    return scales


class _LargestCached:
    """Stands where a cache would, and stops the block as soon as it was given the keys and values."""

    def __init__(self) -> None:
        self._largest: dict[str, Tensor] = {}

    def update(self, keys: Tensor, values: Tensor, *_args: Any, **_kwargs: Any) -> NoReturn:
        """Note the largest of both, (1, heads, tokens, width) each; named and called as transformers' caches are."""
        for which, states in ((KEY_SCALE, keys), (VALUE_SCALE, values)):
            peak = states.abs().amax()
            self._largest[which] = torch.maximum(peak, self._largest.get(which, peak))
        raise EnoughSeen

    def peak(self, which: str, module: str) -> float:
        """The largest magnitude seen."""
        peak = self._largest[which]
        if not torch.isfinite(peak):
            raise JobFailed(
                f"What {module} would cache is NaN or infinite on the calibration text.",
                code="non_finite_activations",
                hint="Check that the original gives sensible outputs in float32, or set kv_cache to none.",
            )
        return float(peak)
