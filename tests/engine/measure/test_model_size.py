from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from safetensors.torch import save_file

from workers.engine.measure.size import measure_size

Tiny = Callable[[str], Path]


def _write(directory: Path, tensors: dict[str, torch.Tensor]) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors"
    )
    return directory


def test_size_adds_up_to_the_files_on_disk(tiny: Tiny) -> None:
    directory = tiny("BertModel")
    size = measure_size(directory)
    assert size.bytes == sum(p.stat().st_size for p in directory.rglob("*") if p.is_file())
    assert sum(size.components.values()) == size.bytes
    assert {"embeddings", "attention", "feed-forward", "norms"} <= set(size.components)
    assert size.weight_bytes == (directory / "model.safetensors").stat().st_size
    assert size.bits_per_weight == pytest.approx(32, rel=0.1)


def test_zeros_that_are_stored_are_counted(tmp_path: Path) -> None:
    weight = torch.ones(10, 10)
    weight[:3] = 0
    size = measure_size(_write(tmp_path, {"a.weight": weight, "b.weight": torch.ones(100)}))
    assert size.zero_share == pytest.approx(30 / 200)
    assert size.low_bit_parameters == 0


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_packed_weights_count_as_the_weights_they_stand_for(tmp_path: Path, bits: int) -> None:
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (24, 96), dtype=torch.int8)
    tensors = {
        "l.weight_packed": pack_to_int32(codes, bits),
        "l.weight_scale": torch.ones(24, 1),
        "l.weight_shape": torch.tensor([24, 96]),
    }
    size = measure_size(_write(tmp_path, tensors))
    assert (size.parameters, size.low_bit_parameters) == (24 * 96, 24 * 96)
    assert size.zero_share == pytest.approx(float((codes == 0).float().mean()))
    assert size.components["scales"] == 24 * 4 + 16


def test_weights_of_half_a_byte_and_of_one_count_as_weights(tmp_path: Path) -> None:
    halves = torch.tensor([[0x10, 0x08, 0x22], [0x88, 0x31, 0x00]], dtype=torch.uint8)
    octets = torch.tensor([[0.0, 1.0], [2.0, -3.0]])
    tensors = {
        "a.weight_packed": halves,
        "a.weight_scale": torch.ones(2, 1).to(torch.float8_e4m3fn),
        "a.weight_global_scale": torch.ones(1),
        "a.input_global_scale": torch.ones(1),
        "b.weight": octets.to(torch.float8_e4m3fn),
        "b.weight_scale": torch.ones(2, 1),
        "b.input_scale": torch.ones(1),
    }
    size = measure_size(_write(tmp_path, tensors))
    assert (size.parameters, size.low_bit_parameters) == (12 + 4, 12 + 4)
    assert size.zero_share == pytest.approx((7 + 1) / 16)


def test_zero_points_decide_which_code_is_zero(tmp_path: Path) -> None:
    codes = torch.randint(-8, 8, (16, 64), dtype=torch.int8)
    points = torch.randint(-8, 8, (16, 2), dtype=torch.int8)
    tensors = {
        "l.weight_packed": pack_to_int32(codes, 4),
        "l.weight_scale": torch.ones(16, 2),
        "l.weight_zero_point": pack_to_int32(points, 4, packed_dim=0),
        "l.weight_shape": torch.tensor([16, 64]),
    }
    expected = (codes.view(16, 2, 32) == points[..., None]).float().mean()
    assert measure_size(_write(tmp_path, tensors)).zero_share == pytest.approx(float(expected))


def test_an_onnx_graph_counts_its_weights_and_not_its_scales(tmp_path: Path) -> None:
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    arrays = {
        "model.layers.0.mlp.w": np.ones((8, 4), np.float32),
        "w_quantized": np.ones((16, 4), np.int8),
        "w_scale": np.ones((1,), np.float32),
        "w_zero_point": np.zeros((1,), np.int8),
        "shape": np.asarray([1, 2], np.int64),
    }
    initializers = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [8, 4])
    node = helper.make_node("Identity", ["model.layers.0.mlp.w"], ["y"])
    graph = helper.make_graph([node], "g", [], [output], initializer=initializers)
    onnx.save(helper.make_model(graph), str(tmp_path / "model.onnx"))
    size = measure_size(tmp_path)
    assert (size.parameters, size.low_bit_parameters) == (32 + 64, 64)
    assert size.zero_share is None
    assert size.components["feed-forward"] == 8 * 4 * 4
    assert sum(size.components.values()) == size.bytes
