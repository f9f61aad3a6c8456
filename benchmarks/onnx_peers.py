"""onnxruntime's own quantizers, called as their documentation says; and a count of what a graph leaves in float32."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import onnx
import torch
from onnxruntime.quantization import CalibrationDataReader, quantize_static
from onnxruntime.quantization import matmul_nbits_quantizer as nbits
from onnxruntime.quantization.shape_inference import quant_pre_process

_INT8_ARITHMETIC = 4
_HEAD_ROWS = 20_000


def export_plainly(model: Any, target: Path) -> None:
    """torch.onnx.export with its defaults, free batch and sequence."""
    names = ["input_ids", "attention_mask"]
    if model.config.model_type == "bert":
        names.append("token_type_ids")
    ids = torch.arange(3, 35).reshape(2, 16)
    sample = {name: torch.ones_like(ids) if name == "attention_mask" else ids * 0 for name in names}
    sample["input_ids"] = ids
    if "use_cache" in model.config.to_dict():
        model.config.use_cache = False
    # Otherwise the graph has a second output, and a layer more than what is compared.
    if hasattr(model, "pooler"):
        model.pooler = None
    free = dict.fromkeys((0, 1), torch.export.Dim.DYNAMIC)
    is_decoder = type(model).__name__.endswith("ForCausalLM")
    torch.onnx.export(
        model.eval(), (), str(target / "model.onnx"), kwargs=sample, input_names=names,
        output_names=["logits" if is_decoder else "last_hidden_state"],
        dynamic_shapes=dict.fromkeys(names, free), dynamo=True, external_data=False, verbose=False,
    )  # fmt: skip


class Reader(CalibrationDataReader):
    """Windows of calibration text, one by one."""

    def __init__(self, path: Path, windows: torch.Tensor) -> None:
        self._names = [value.name for value in onnx.load(str(path), load_external_data=False).graph.input]
        self._windows = windows.numpy()
        self.rewind()

    def get_next(self) -> dict[str, Any] | None:
        """The next window, or None after the last."""
        return next(self._rest, None)

    def rewind(self) -> None:
        """Begin again."""
        self._rest = iter([self._feed(window[None]) for window in self._windows])

    def _feed(self, ids: Any) -> dict[str, Any]:
        known = {"input_ids": ids, "attention_mask": ids * 0 + 1, "token_type_ids": ids * 0}
        return {name: known[name] for name in self._names}


def weight_only_peers(
    path: Path, windows: torch.Tensor, block: int, *, symmetric: bool
) -> Iterator[tuple[str, Callable[[Path], None]]]:
    """Every algorithm of MatMulNBitsQuantizer at 4 bits that offers this kind of grid."""
    configs = {"default": lambda: None}
    if not symmetric:
        configs["HQQ"] = lambda: nbits.HQQWeightOnlyQuantConfig(block_size=block, bits=4)
        configs["k-quant"] = nbits.KQuantWeightOnlyQuantConfig
    configs["GPTQ"] = lambda: nbits.GPTQWeightOnlyQuantConfig(
        calibration_data_reader=Reader(path, windows), block_size=block
    )
    for algorithm, config in configs.items():

        def make(target: Path, config: Callable[[], Any] = config) -> None:
            model = onnx.load(str(path))
            quantizer = nbits.MatMulNBitsQuantizer(
                model, bits=4, block_size=block, is_symmetric=symmetric, accuracy_level=_INT8_ARITHMETIC,
                nodes_to_exclude=head_nodes(model), algo_config=config(),
            )  # fmt: skip
            quantizer.process()
            quantizer.model.save_model_to_file(str(target / "model.onnx"), False)

        yield f"MatMulNBits {algorithm} {'symmetric' if symmetric else 'asymmetric'}", make


def static_peer(path: Path, windows: torch.Tensor, *, per_channel: bool) -> Callable[[Path], None]:
    """quantize_static as its documentation says: preprocess, then calibrate by minima and maxima; MatMul and Gemm."""

    def make(target: Path) -> None:
        prepared = target / "prepared.onnx"
        quant_pre_process(str(path), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            str(prepared), str(target / "model.onnx"), Reader(prepared, windows), per_channel=per_channel,
            op_types_to_quantize=["MatMul", "Gemm"], nodes_to_exclude=head_nodes(onnx.load(str(prepared))),
        )  # fmt: skip
        prepared.unlink()

    return make


def head_nodes(model: onnx.ModelProto) -> list[str]:
    """Products with a weight as wide as a vocabulary."""
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    return [
        node.name
        for node in model.graph.node
        if node.op_type in ("MatMul", "Gemm") and max(shapes.get(node.input[1], (0,))) > _HEAD_ROWS
    ]


def float_products(path: Path, shapes: Collection[tuple[int, ...]]) -> int:
    """Products with a stored float32 weight of one of these shapes (sorted), however the weight comes to the product."""
    graph = onnx.load(str(path), load_external_data=False).graph
    stored = {
        t.name: tuple(sorted(t.dims)) for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT
    }
    producers = {output: node for node in graph.node for output in node.output}
    count = 0
    for node in graph.node:
        if node.op_type in ("MatMul", "Gemm", "FusedMatMul"):
            producer = producers.get(node.input[1])
            source = producer.input[0] if producer is not None and producer.input else node.input[1]
            count += stored.get(source) in shapes
    return count
