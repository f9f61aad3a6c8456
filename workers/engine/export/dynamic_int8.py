"""PyTorch's dynamic int8 in safetensors: how a weight is rounded, what config.json says of it, and how it is loaded.

The numbers are those of `torch.ao.quantization.quantize_dynamic` with its default configuration: a symmetric range of
[-128, 127] per tensor, found by a MinMaxObserver. Nothing is pickled, as PyTorch's own state dict of such a model would be.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from app.spec.quantize_dynamic import CODES, SCALE
from workers.engine.architectures.loading import model_from_tensors
from workers.engine.checkpoint.layout import weight_files

FORMAT: Final = "torch-dynamic-int8"
_LEAST, _MOST = -128, 127


def scale_for(peak: Tensor) -> Tensor:
    """The scale for a weight whose largest magnitude is `peak`, both float32: as PyTorch's observer computes it."""
    return torch.maximum(peak / ((_MOST - _LEAST) / 2), torch.tensor(torch.finfo(torch.float32).eps))


def encode(weight: Tensor, scale: Tensor) -> Tensor:
    """The int8 codes of float32 weights: as `torch.quantize_per_tensor` rounds, times the reciprocal in float32."""
    return weight.mul(scale.reciprocal()).round_().clamp_(_LEAST, _MOST).to(torch.int8)


def declaration() -> dict[str, Any]:
    """The `quantization_config` of such a model.

    There is no `quant_method` on purpose: transformers 5.23 ignores one that it does not know and makes up the weights it
    does not find, but refuses a config without.
    """
    return {
        "format": FORMAT,
        "weights": {"dtype": "qint8", "qscheme": "per_tensor_symmetric", "codes": CODES, "scale": SCALE},
        "inputs": "dynamic",
        "loader": "load_dynamic_int8 in docs/techniques.md of Modelpress",
    }


def is_declared(declared: dict[str, Any] | None) -> bool:
    """Whether a `quantization_config` is one of these."""
    return declared is not None and declared.get("format") == FORMAT


def load_dynamic_int8(directory: Path, auto: Any) -> tuple[nn.Module, dict[str, Any]]:
    """The model of a directory with PyTorch's dynamic int8 layers, and what transformers says of loading the rest.

    `auto` is the transformers class that would load the original, e.g. AutoModelForCausalLM. Raises KeyError for codes that
    the model has no layer for.
    """
    from safetensors.torch import load_file

    tensors = {name: t for file in weight_files(directory) for name, t in load_file(file).items()}
    layers = _take_layers(tensors)
    model, info = model_from_tensors(directory, auto, tensors)
    # Files of a bare model and of one with a head name the same layer with and without this.
    prefix = f"{model.base_model_prefix}."
    places = {name.removeprefix(prefix): name for name, _ in model.named_modules()}
    for module, (codes, scale) in layers.items():
        name = places[module.removeprefix(prefix)]
        model.set_submodule(name, _dynamic_linear(codes, scale, model.get_submodule(name).bias))
    return model, info


def _take_layers(tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, float]]:
    """Codes and scale by module, with a weight in their place that takes no memory: transformers must find one."""
    layers: dict[str, tuple[Tensor, float]] = {}
    for name in [name for name in tensors if name.endswith(f".{CODES}")]:
        module = name.removesuffix(f".{CODES}")
        codes, scale = tensors.pop(name), tensors.pop(f"{module}.{SCALE}")
        layers[module] = codes, float(scale)
        tensors[f"{module}.weight"] = torch.zeros(()).expand(codes.shape)
    return layers


def _dynamic_linear(codes: Tensor, scale: float, bias: Tensor | None) -> Any:
    """PyTorch's module for (out, in) codes; a zero point is always 0."""
    from torch.ao.nn.quantized import dynamic

    rows, columns = codes.shape
    with warnings.catch_warnings():
        # PyTorch deprecates what it packs the weights with.
        warnings.filterwarnings("ignore", message=r"torch\.quantize_per_tensor")
        linear: Any = dynamic.Linear(columns, rows)  # type: ignore[no-untyped-call]
        # torch.quantize_per_tensor would take the weights in float.
        weight = torch._make_per_tensor_quantized_tensor(codes, scale, 0)  # noqa: SLF001
        linear.set_weight_bias(weight, bias)
    return linear
