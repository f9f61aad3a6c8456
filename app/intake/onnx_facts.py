"""Facts of an image classifier that came as an ONNX graph with a preprocessor_config.json beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from app.errors import IntakeError
from app.intake.names import PREPROCESSOR
from app.intake.onnx_header import OnnxHeader, OnnxNode, read_onnx
from app.intake.refusals import refused
from app.intake.strict_json import read_object
from app.spec.facts import ModelFacts, TensorFact
from app.spec.onnx_operators import OLDEST_OPSET, ONNX_NETWORK, ONNX_OPERATORS
from app.spec.preprocessing import MAX_CHANNELS, Preprocessing, parse_preprocessing

_MAX_JSON_BYTES = 2**20
_PRODUCTS = frozenset({"Conv", "Gemm", "MatMul"})
_STANDARD = ("", "ai.onnx")


def onnx_facts(files: Mapping[str, Path], name: str) -> ModelFacts:
    """Read the header of the graph `name` and the preprocessor among `files`. Raises IntakeError."""
    header = read_onnx(files[name], name)
    _check_operators(header, name)
    _check_tensors(header, name)
    channels, height, width = _image(header, name)
    preprocessing = _preprocessing(files, channels)
    if preprocessing.size != (height, width):
        made = " by ".join(map(str, preprocessing.size))
        raise refused(
            "config_mismatch",
            f"{name} takes images of {height} by {width}, and {PREPROCESSOR} makes them {made}.",
            hint=f"Give the size that the graph takes in {PREPROCESSOR}.",
        )
    labels = _labels(header, name)
    floats = tuple(tensor for tensor in header.tensors if tensor.dtype == "F32")
    last = _last_product(header)
    return ModelFacts(
        format="onnx",
        architecture=ONNX_NETWORK.name,
        family=ONNX_NETWORK.family,
        parameters=sum(tensor.elements for tensor in floats),
        dtype="F32",
        weight_bytes=files[name].stat().st_size,
        hidden_size=last.elements // labels,
        num_blocks=0,
        vocab_size=0,
        max_positions=0,
        num_labels=labels,
        preprocessing=preprocessing,
        tensors=floats,
    )


def _check_operators(header: OnnxHeader, name: str) -> None:
    if header.opset < OLDEST_OPSET:
        raise _unsupported(f"{name} is of opset {header.opset}; {OLDEST_OPSET} is the oldest that is read.")
    if any(node.holds_graph and _is_known(node) for node in header.nodes):
        raise _unsupported(f"{name} has graphs inside its nodes.")
    foreign = sorted({_full_name(node) for node in header.nodes if not _is_known(node)})
    if foreign or header.has_functions:
        what = ", ".join(foreign[:8])[:300] or "functions of its own"
        raise _unsupported(f"{name} uses {what}. Known are {', '.join(sorted(ONNX_OPERATORS))}.")


def _is_known(node: OnnxNode) -> bool:
    return node.domain in _STANDARD and node.operator in ONNX_OPERATORS


def _full_name(node: OnnxNode) -> str:
    return node.operator if node.domain in _STANDARD else f"{node.domain}.{node.operator}"


def _check_tensors(header: OnnxHeader, name: str) -> None:
    if header.external:
        raise _unsupported(
            f"{name} keeps {header.external[0][:100]} and perhaps more in another file: save the graph in one file."
        )
    weights = _weight_names(header)
    for tensor in header.tensors:
        if tensor.dtype in ("F16", "BF16", "F64"):
            raise refused(
                "unsupported_dtype", f"{tensor.name[:100]} is {tensor.dtype}.", hint="Export in float32."
            )
        if tensor.name in weights and tensor.dtype != "F32":
            raise refused("quantized_model", f"{tensor.name[:100]} is stored as {tensor.dtype}.")


def _weight_names(header: OnnxHeader) -> set[str]:
    return {node.inputs[1] for node in header.nodes if node.operator in _PRODUCTS and len(node.inputs) > 1}


def _last_product(header: OnnxHeader) -> TensorFact:
    """The weight that gives the logits."""
    tensors = {tensor.name: tensor for tensor in header.tensors}
    found = [
        tensors[node.inputs[1]]
        for node in header.nodes
        if node.operator in _PRODUCTS and len(node.inputs) > 1 and node.inputs[1] in tensors
    ]
    if not found:
        raise _unsupported("The graph has no convolution and no linear layer with weights of its own.")
    return found[-1]


def _image(header: OnnxHeader, name: str) -> tuple[int, int, int]:
    match list(header.inputs.values()):
        case [(None, int(channels), int(height), int(width))] if 0 < channels <= MAX_CHANNELS:
            return channels, height, width
        case [(int(), *_)]:
            raise _unsupported(
                f"{name} takes a fixed number of images at once: export it with a free batch (dynamic_axes or dynamic_shapes)."
            )
    raise _unsupported(
        f"{name} must take one input of (batch, channels, height, width), the batch free and the rest fixed; it takes "
        f"{str(header.inputs)[:200]}."
    )


def _labels(header: OnnxHeader, name: str) -> int:
    match list(header.outputs.values()):
        case [(_, int(labels))] if labels > 0:
            return labels
    raise _unsupported(
        f"{name} must give one output of (batch, classes), the classes fixed; it gives {str(header.outputs)[:200]}."
    )


def _preprocessing(files: Mapping[str, Path], channels: int) -> Preprocessing:
    if PREPROCESSOR not in files:
        raise refused(
            "preprocessor_missing",
            f"There is no {PREPROCESSOR} beside the graph.",
            hint="An ONNX graph does not say how pixels are scaled. Put the file beside it in a zip, e.g. "
            '{"image_processor_type": "ViTImageProcessor", "size": {"height": 224, "width": 224}, "image_mean": [0.485, 0.456, '
            '0.406], "image_std": [0.229, 0.224, 0.225]}; with "do_rescale" and "do_normalize" false, pixels stay 0 to 255.',
        )
    said: dict[str, Any] = read_object(files[PREPROCESSOR], max_bytes=_MAX_JSON_BYTES, refuse=_refuse)
    if not (said.get("image_processor_type") or said.get("feature_extractor_type")):
        raise refused("preprocessing_unknown", f"{PREPROCESSOR} does not name its image_processor_type.")
    try:
        found = parse_preprocessing(said, model_type=ONNX_NETWORK.model_type, channels=channels)
        _ = found.size
    except ValueError as error:
        raise refused("preprocessing_unknown", f"{PREPROCESSOR}: {error}.") from None
    return found


def _refuse(why: str) -> IntakeError:
    return refused("config_invalid", f"{PREPROCESSOR} cannot be used: {why}.")


def _unsupported(what: str) -> IntakeError:
    return refused("onnx_unsupported", what)
