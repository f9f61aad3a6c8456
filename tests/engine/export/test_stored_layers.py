"""What each format writes, against compressed-tensors' own compressors and our reader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from safetensors.torch import save_file
from torch import Tensor

from app.spec.facts import TensorFact
from app.spec.quantize import QuantizeCalibrated
from app.spec.stored import stored_tensors
from workers.engine.checkpoint.layout import DTYPE_NAMES, TensorEntry
from workers.engine.export.compressed_tensors import read_dequantized
from workers.engine.export.fp4_packed import pack_e2m1
from workers.engine.export.pack_quantized import PackedLayer
from workers.engine.export.stored_layer import StoredLayer, quantization_config
from workers.engine.quantize.layer_fit import LayerFit, fit_blocks, fit_layer
from workers.engine.quantize.packed_layers import fused_layers, planned_layer

ROWS, COLUMNS = 200, 256
NAME = "model.layers.0.mlp.up_proj.weight"
STEPS: dict[str, dict[str, Any]] = {
    "int4": {"group_size": 32},
    "int3-asymmetric": {"bits": 3, "symmetric": False},
    "w8a8-dynamic": {"bits": 8, "activations": "dynamic"},
    "w8a8-static": {"bits": 8, "activations": "static"},
    "fp8-channel": {"number_format": "fp8"},
    "fp8-channel-static": {"number_format": "fp8", "activations": "static"},
    "fp8-tensor": {"number_format": "fp8", "group_size": "tensor", "activations": "dynamic"},
    "fp8-block": {"number_format": "fp8", "group_size": "block", "activations": "dynamic"},
    "mxfp4": {"number_format": "mxfp4"},
    "mxfp4-activations": {"number_format": "mxfp4", "activations": "dynamic"},
    "nvfp4": {"number_format": "nvfp4"},
    "nvfp4-activations": {"number_format": "nvfp4", "activations": "dynamic"},
}


def layer_of(step: QuantizeCalibrated) -> StoredLayer:
    entry = TensorEntry(NAME, torch.bfloat16, (ROWS, COLUMNS), Path(), 0, 2 * ROWS * COLUMNS)
    return planned_layer(entry, step.settings_of("x"))


def fit_of(layer: StoredLayer) -> LayerFit:
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)) * 0.05
    grid = layer.grid(float(weight.abs().max()))
    if layer.block_rows > 1:
        return fit_blocks(weight, grid, size=layer.block_rows, dtype=torch.bfloat16)
    return fit_layer(weight, grid, group_size=layer.group_size, dtype=torch.bfloat16)


@pytest.mark.parametrize("given", STEPS.values(), ids=STEPS)
def test_tensors_are_those_announced_and_those_planned(given: dict[str, Any]) -> None:
    step = QuantizeCalibrated(**given)
    layer = layer_of(step)
    written = layer.tensors(fit_of(layer), input_peak=3.0)
    facts = {f.name: (f.dtype, f.shape) for f in layer.facts()}
    assert {n: (DTYPE_NAMES[t.dtype], tuple(t.shape)) for n, t in written.items()} == facts
    planned = stored_tensors(
        TensorFact(name=NAME, dtype="BF16", shape=(ROWS, COLUMNS)), step.settings_of("x")
    )
    assert {f.name: (f.dtype, f.shape) for f in planned} == facts


@pytest.mark.parametrize("given", STEPS.values(), ids=STEPS)
def test_slabs_join_to_the_whole(given: dict[str, Any]) -> None:
    layer = layer_of(QuantizeCalibrated(**given))
    fit = fit_of(layer)
    step = 128 if layer.row_multiple > 1 else 50
    slabs = [layer.parts(fit.of_rows(slice(start, start + step)), start) for start in range(0, ROWS, step)]
    for name, (_, whole) in layer.parts(fit, 0).items():
        pieces = [slab[name] for slab in slabs if name in slab]
        assert torch.equal(torch.cat([piece for _, piece in pieces]).float(), whole.float())
        starts = [start for start, _ in pieces]
        assert starts == [sum(len(piece) for _, piece in pieces[:n]) for n in range(len(pieces))]


@pytest.mark.parametrize("given", STEPS.values(), ids=STEPS)
def test_the_library_and_our_reader_make_the_fitted_weights_of_them(
    given: dict[str, Any], tmp_path: Path
) -> None:
    layer = layer_of(QuantizeCalibrated(**given))
    fit = fit_of(layer)
    tensors = layer.tensors(fit, input_peak=3.0)
    save_file(tensors, tmp_path / "model.safetensors")
    config = quantization_config([layer], [], target=str)
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    assert torch.equal(dict(read_dequantized(tmp_path))[NAME], fit.restored())
    assert torch.equal(restored_by_library(config, tensors), fit.restored().bfloat16())


def restored_by_library(config: dict[str, Any], tensors: dict[str, Tensor]) -> Tensor:
    scheme: QuantizationScheme = QuantizationConfig.model_validate(config).config_groups["group_0"]  # type: ignore[assignment]
    assert scheme.format is not None
    compressor = BaseCompressor.get_value_from_registry(str(scheme.format))
    local = {name.rpartition(".")[2]: tensor for name, tensor in tensors.items()}
    weight: Tensor = compressor.decompress(local, scheme)["weight"]
    return weight.bfloat16()


def test_halves_of_bytes_are_packed_as_the_library_packs_them() -> None:
    numbers = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.5, -1, -1.5, -2, -3, -4, -6, 0])
    codes = numbers[torch.randint(16, (5, 64), generator=torch.Generator().manual_seed(0))]
    assert torch.equal(pack_e2m1(codes), pack_fp4_to_uint8(codes))


@pytest.mark.parametrize(
    ("given", "name", "value"),
    [
        ({"bits": 8, "activations": "static"}, "input_scale", 3 / 127),
        ({"number_format": "fp8", "activations": "static"}, "input_scale", 3 / 448),
        ({"number_format": "nvfp4", "activations": "dynamic"}, "input_global_scale", 448 * 6 / 3),
    ],
)
def test_the_range_of_inputs_is_kept_as_a_scale(given: dict[str, Any], name: str, value: float) -> None:
    layer = layer_of(QuantizeCalibrated(**given))
    ((stored, scale),) = layer.input_parts(3.0).items()
    assert stored.endswith(name)
    assert scale.tolist() == pytest.approx([value], rel=2**-8)
    with pytest.raises(ValueError, match="no calibrated range"):
        layer.input_parts(None)


def test_each_scheme_has_a_group_whose_targets_are_modules_by_name() -> None:
    layers = [
        PackedLayer(f"model.layers.{n}.x", 64, 64, "BF16", 8 if n == 1 else 4, 32, True) for n in range(4)
    ]
    groups = quantization_config(layers, [], target=str)["config_groups"]
    targets = {group["weights"]["num_bits"]: group["targets"] for group in groups.values()}
    assert targets == {4: [f"model.layers.{n}.x" for n in (0, 2, 3)], 8: ["model.layers.1.x"]}
    alone = quantization_config(layers[:1], [], target=str)["config_groups"]
    assert [group["targets"] for group in alone.values()] == [["Linear"]]


def test_layers_that_are_served_as_one_are_found_by_name() -> None:
    modules = ["a.0.q_proj", "a.0.k_proj", "a.0.o_proj", "a.1.q_proj", "a.0.gate_proj", "a.0.up_proj"]
    assert fused_layers(modules) == [
        ["a.0.q_proj", "a.0.k_proj"], ["a.0.o_proj"], ["a.1.q_proj"], ["a.0.gate_proj", "a.0.up_proj"],
    ]  # fmt: skip
