"""Packing against compressed-tensors' own, and our reader against both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import save_file

from app.errors import VerificationFailed
from workers.engine.export.compressed_tensors import read_dequantized, read_schemes
from workers.engine.export.pack_quantized import PackedLayer, pack_columns, pack_rows
from workers.engine.export.stored_layer import quantization_config

BITS = (8, 4, 3, 2)


def config_of(bits: int, group_size: int | None, *, symmetric: bool = False) -> dict[str, Any]:
    layer = PackedLayer("a", 37, 40, "BF16", bits, group_size, symmetric)
    return quantization_config([layer], ["model.layers.0.x"], target=str)


def random_codes(rows: int, columns: int, bits: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(bits)
    half = 1 << (bits - 1)
    return torch.randint(-half, half, (rows, columns), generator=generator).to(torch.int8)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("columns", [1, 7, 31, 32, 33, 40, 96, 200])
def test_rows_are_packed_as_the_library_packs_them(bits: int, columns: int) -> None:
    codes = random_codes(5, columns, bits)
    packed = pack_rows(codes, bits)
    assert torch.equal(packed, pack_to_int32(codes, bits))
    assert torch.equal(unpack_from_int32(packed, bits, codes.shape), codes)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("rows", "groups"), [(1, 4), (33, 1), (64, 3), (100, 5)])
def test_zero_points_are_packed_as_the_library_packs_them(bits: int, rows: int, groups: int) -> None:
    codes = random_codes(rows, groups, bits)
    assert torch.equal(pack_columns(codes, bits), pack_to_int32(codes, bits, packed_dim=0))


@pytest.mark.parametrize("bits", BITS)
def test_zero_points_of_slabs_join_to_those_of_the_whole(bits: int) -> None:
    codes = random_codes(100, 3, bits)
    slabs = [pack_columns(codes[start : start + 32], bits) for start in range(0, 100, 32)]
    assert torch.equal(torch.cat(slabs), pack_columns(codes, bits))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_announced_shapes_are_those_packed(bits: int, symmetric: bool) -> None:
    layer = PackedLayer("m", 50, 96, "BF16", bits, 32, symmetric)
    codes = random_codes(50, 96, bits)
    assert pack_rows(codes, bits).shape == layer.packed.shape
    assert pack_columns(codes[:, :3], bits).shape == layer.zero_point.shape
    assert len(layer.facts()) == (3 if symmetric else 4)


def test_stored_bits_count_scales_zero_points_and_shape() -> None:
    layer = PackedLayer("m", 64, 128, "BF16", 4, 32, False)
    codes, scales, zeros, shape = 64 * 128 // 2, 64 * 4 * 2, 64 * 4 // 2, 16
    assert layer.stored_bits() == 8 * (codes + scales + zeros + shape) / (64 * 128)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [None, 8])
def test_the_library_reads_the_config(bits: int, group_size: int | None) -> None:
    weights = QuantizationConfig.model_validate(config_of(bits, group_size)).config_groups["group_0"].weights
    assert (weights.num_bits, weights.symmetric, weights.group_size) == (bits, False, group_size)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [None, 8])
def test_our_reader_gives_scale_times_code_less_zero_point(
    tmp_path: Path, bits: int, group_size: int | None
) -> None:
    rows, columns = 37, 40
    codes, groups = random_codes(rows, columns, bits), columns // (group_size or columns)
    zeros, scales = random_codes(rows, groups, bits), torch.rand(rows, groups).to(torch.bfloat16)
    stored = {
        "a.weight_packed": pack_to_int32(codes, bits),
        "a.weight_scale": scales,
        "a.weight_shape": torch.tensor([rows, columns]),
        "a.weight_zero_point": pack_to_int32(zeros, bits, packed_dim=0),
        "b.weight": torch.rand(3),
    }
    save_file(stored, tmp_path / "model.safetensors")
    config = config_of(bits, group_size)
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    wide = (t.double().repeat_interleave(columns // groups, dim=1) for t in (scales, zeros))
    scale, zero = wide
    read = dict(read_dequantized(tmp_path))
    assert read.keys() == {"a.weight", "b.weight"}
    assert torch.equal(read["a.weight"].double(), scale * (codes - zero))
    assert torch.equal(read["b.weight"], stored["b.weight"])


def test_a_plain_checkpoint_reads_as_it_is(tmp_path: Path) -> None:
    save_file({"b.weight_scale": torch.rand(3)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    assert read_schemes(tmp_path) is None
    assert list(dict(read_dequantized(tmp_path))) == ["b.weight_scale"]


def test_another_format_is_refused_and_not_guessed_at(tmp_path: Path) -> None:
    config = config_of(4, None)
    config["config_groups"]["group_0"]["format"] = "dense"
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    with pytest.raises(VerificationFailed, match="dense"):
        read_schemes(tmp_path)
