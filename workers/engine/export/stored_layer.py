"""What a quantized weight becomes in a checkpoint: its tensors, and its entry in config.json.

One class for each of the formats; tensors and keys are as compressed-tensors 0.20 reads them, and vLLM. NF4 alone is
bitsandbytes': see `nf4_packed`.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from app.spec.architectures import block_index
from app.spec.facts import TensorFact
from app.spec.quantize import ScaleSearch
from workers.engine.checkpoint.layout import TORCH_DTYPES
from workers.engine.quantize.grid import WeightGrid
from workers.engine.quantize.layer_fit import LayerFit, fit_layer

Parts = dict[str, tuple[int, Tensor]]
"""By a tensor's name: the first of the rows given, and the rows."""


@dataclass(frozen=True)
class StoredLayer(ABC):
    """The tensors one quantized weight (rows, columns) becomes; `module` is its name without `.weight`."""

    module: str
    rows: int
    columns: int
    dtype: str
    """Of the checkpoint, and so of most scales, in safetensors' spelling."""

    bits: int
    group_size: int | None
    """Columns that share a scale; None: all."""

    @property
    def block_rows(self) -> int:
        """Rows whose scales depend on each other."""
        return 1

    @property
    def refits_scales(self) -> bool:
        """Whether a row's scales may be moved for themselves once they are found, and can be stored as `grid.stored` gives them."""
        return self.block_rows == 1

    @property
    def row_multiple(self) -> int:
        """Slabs of rows must begin at a multiple of it."""
        return 1

    @property
    def needs_peak(self) -> bool:
        """Whether the grid depends on the largest of all weights that are served as one."""
        return False

    @property
    @abstractmethod
    def alike(self) -> Hashable:
        """Layers of one input with equal ones may be solved together, row below row."""

    @abstractmethod
    def grid(self, peak: float) -> WeightGrid:
        """What its codes may be; `peak` is the largest magnitude of all weights that are served as one with it."""

    def nearest(
        self,
        weight: Tensor,
        grid: WeightGrid,
        *,
        importance: Tensor | None = None,
        search: ScaleSearch = "mse",
        threads: int = 1,
    ) -> LayerFit:
        """Scales searched and the nearest codes of rows (n, columns), float32, from a multiple of `block_rows` on.

        `importance` (columns,) weighs the errors.
        """
        return fit_layer(
            weight,
            grid,
            group_size=self.group_size,
            dtype=TORCH_DTYPES[self.dtype],
            importance=importance,
            search=search,
            threads=threads,
        )

    @abstractmethod
    def facts(self) -> list[TensorFact]:
        """All its tensors."""

    @abstractmethod
    def parts(self, fit: LayerFit, start: int) -> Parts:
        """What some rows, from `start` on, become. What the whole weight has once comes with its first row."""

    @abstractmethod
    def scheme(self) -> dict[str, Any]:
        """Its entry in `config_groups`, without the targets, or what is like it."""

    def input_parts(self, peak: float | None) -> dict[str, Tensor]:  # noqa: ARG002 - for those that round inputs
        """Tensors that say how inputs are rounded, whose largest magnitude was `peak` on calibration text."""
        return {}

    def tensors(self, fit: LayerFit, input_peak: float | None = None) -> dict[str, Tensor]:
        """All its tensors, by name."""
        stored = {name: content for name, (_, content) in self.parts(fit, 0).items()}
        return stored | self.input_parts(input_peak)

    def stored_bits(self) -> float:
        """Bits per weight, scales, zero points and shape included."""
        return 8 * sum(fact.nbytes for fact in self.facts()) / (self.rows * self.columns)

    def _fact(self, what: str, dtype: str, shape: tuple[int, ...]) -> TensorFact:
        return TensorFact(name=f"{self.module}.{what}", dtype=dtype, shape=shape)

    def _in_dtype(self, scale: Tensor) -> Tensor:
        return scale.to(TORCH_DTYPES[self.dtype]).cpu()


def quantization_config(
    layers: Sequence[StoredLayer],
    ignored: Sequence[str],
    *,
    target: Callable[[str], str],
    unpack_to_load: bool = False,
    scales_cache: bool = False,
) -> dict[str, Any]:
    """What `quantization_config` in config.json says, for compressed-tensors, transformers and vLLM.

    `ignored`: modules inside blocks that are left as they were; `target` gives the entry that stands for a module.
    Everything outside the blocks (heads, poolers, classifiers) is left out by pattern, whatever its prefix, unless it is
    among `layers`.
    `unpack_to_load` asks transformers to dequantize while loading; `scales_cache`: there are scales of the key-value cache.
    """
    groups = _groups(layers, target)
    only_format = groups["group_0"]["format"]
    declared = {
        "quant_method": "compressed-tensors",
        "format": only_format,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [*_outside_blocks(layers), *map(target, ignored)],
    } | ({"kv_cache_scheme": _KV_CACHE_SCHEME} if scales_cache else {})
    # transformers 5.23 makes room for unpacked zero points when it keeps weights packed, and then refuses packed ones;
    # and it unpacks E2M1 to bfloat16 whatever the model's dtype. Asked to dequantize while loading, it does both right.
    # vLLM ignores the key.
    loads_packed = not unpack_to_load and all(
        g["weights"]["symmetric"] and g["format"] not in _FP4_FORMATS for g in groups.values()
    )
    return declared if loads_packed else declared | {"dequantize": True}


_KV_CACHE_SCHEME = {
    "num_bits": 8,
    "type": "float",
    "symmetric": True,
    "group_size": None,
    "strategy": "tensor",
    "dynamic": False,
}
OUTSIDE_BLOCKS = r"(?!.*\b(?:layers?|h)\.\d+\.)"
_FP4_FORMATS = ("nvfp4-pack-quantized", "mxfp4-pack-quantized")


def _outside_blocks(layers: Sequence[StoredLayer]) -> list[str]:
    """What to ignore of all that is in no block."""
    outside = [layer.module for layer in layers if block_index(f"{layer.module}.weight") is None]
    if not outside:
        return ["lm_head", rf"re:^{OUTSIDE_BLOCKS}.*"]
    return [rf"re:^(?!(?:{'|'.join(map(re.escape, outside))})$){OUTSIDE_BLOCKS}.*"]


def _groups(layers: Sequence[StoredLayer], target: Callable[[str], str]) -> dict[str, Any]:
    """One entry for each distinct scheme, the most common first."""
    order = sorted(layers, key=lambda layer: repr(layer.scheme()))
    alike = [list(found) for _, found in groupby(order, key=lambda layer: layer.scheme())]
    alike.sort(key=len, reverse=True)
    groups: dict[str, Any] = {}
    for number, found in enumerate(alike):
        # By name where there are several: vLLM looks for the class of a fused layer before it looks for its parts.
        targets = ["Linear"] if len(alike) == 1 else [target(layer.module) for layer in found]
        groups[f"group_{number}"] = {"targets": targets, "output_activations": None} | found[0].scheme()
    return groups


def one_number(value: float, dtype: torch.dtype) -> Tensor:
    """A scale of a whole tensor as it is stored: (1,)."""
    return torch.tensor([value], dtype=dtype)
