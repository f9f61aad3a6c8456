"""ONNX: export a model as one float32 graph, and check a file by means of onnx and onnxruntime alone.

What the graphs offer is what Optimum and sentence-transformers expect: `input_ids`, `attention_mask` and, for models
that tell segments apart, `token_type_ids`, with free batch and sequence sizes; out come `logits` of language models
and classifiers, `last_hidden_state` of encoders. No key-value cache: every call computes the whole sequence.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from app.errors import JobFailed, VerificationFailed
from app.spec.architectures import ARCHITECTURES
from app.spec.base import Family
from workers.engine.export.onnx_graph import clean, multiply_in_place, name_dimensions, token_embedding

MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx_data"
# The newest set of operators that TensorRT, OpenVINO and onnxruntime-web releases of the last two years all read.
OPSET = 20
# protobuf cannot write messages of 2 GiB; the graph itself takes a few megabytes.
SINGLE_FILE_BYTES = 2**31 - 2**26
_WRAPPED = "model."


class _Forward(nn.Module):
    """The model as a function of tensors alone, in the order of the graph's inputs, with one output."""

    def __init__(self, model: nn.Module, extra: dict[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.extra = extra

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Any:
        """Logits, or last hidden states."""
        segments = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        output = self.model(
            input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **segments, **self.extra
        )
        return output[0]


def export_graph(model: nn.Module, architecture: str) -> ir.Model:
    """Export a float32 transformers model in evaluation mode; the graph's weights share memory with the model's.

    Raises JobFailed (`onnx_export_failed`) for a model that torch.onnx cannot express.
    """
    is_decoder = ARCHITECTURES[architecture].family is Family.CAUSAL_LM
    forward = _Forward(model, {"use_cache": False} if is_decoder else {}).eval()
    # Plain products and a softmax run as fast as the Attention operator, which needs opset 23 (measured, onnxruntime 1.32).
    model.set_attn_implementation("eager")  # type: ignore[operator]  # a method of transformers' base class
    names = input_names(model)
    ids = torch.arange(3, 35).reshape(2, 16)
    sample = {name: torch.ones_like(ids) if name == "attention_mask" else ids * 0 for name in names}
    sample["input_ids"] = ids
    free = dict.fromkeys((0, 1), torch.export.Dim.DYNAMIC)
    graph = export_program(
        forward,
        sample,
        output="logits" if _has_logits(architecture) else "last_hidden_state",
        free=dict.fromkeys(names, free),
        architecture=architecture,
    )
    return _finished(graph)


def export_program(
    forward: nn.Module, sample: dict[str, Tensor], *, output: str, free: dict[str, Any], architecture: str
) -> ir.Model:
    """What torch.onnx makes of a module that takes `sample`, whose dimensions in `free` may have any size.

    Raises JobFailed (`onnx_export_failed`) for a model that it cannot express.
    """
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                forward,
                (),
                kwargs=sample,
                input_names=list(sample),
                output_names=[output],
                dynamic_shapes=free,
                opset_version=OPSET,
                dynamo=True,
                optimize=False,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise JobFailed(
            f"PyTorch cannot export this {architecture} to ONNX: {_first_line(error)}",
            code="onnx_export_failed",
            hint=f"Use quantize.weights for {architecture}, or report this configuration to the maintainers.",
        ) from error
    if program is None:
        raise RuntimeError("torch.onnx.export with dynamo=True returned no program")
    return program.model


def input_names(model: nn.Module) -> list[str]:
    """The graph's inputs, in order: segments only where the model was trained to tell them apart."""
    config: Any = model.config
    segments = config.model_type in ("bert", "electra") and config.type_vocab_size > 1
    return ["input_ids", "attention_mask", *(["token_type_ids"] if segments else [])]


def save_graph(model: ir.Model, directory: Path) -> int:
    """Write `model.onnx` and its weights beside it, tensor by tensor; return the bytes of both."""
    directory.mkdir(parents=True)
    ir.save(model, directory / MODEL_FILE, external_data=DATA_FILE)
    return directory_bytes(directory)


def publish_graph(directory: Path, target: Path) -> None:
    """Put a written graph where users find it: in one file, or in two where protobuf could not hold the weights."""
    import onnx

    if directory_bytes(directory) <= SINGLE_FILE_BYTES:
        onnx.save(onnx.load(str(directory / MODEL_FILE)), str(target / MODEL_FILE))
    else:
        for file in directory.iterdir():
            file.rename(target / file.name)
    (target / MODEL_FILE).chmod(0o644)


def directory_bytes(directory: Path) -> int:
    """Bytes of all files of a graph."""
    files = [file for file in directory.iterdir() if file.is_file()]
    for file in files:
        file.chmod(0o644)
    return sum(file.stat().st_size for file in files)


def rewrite_graph(directory: Path, target: Path, level: str, *, threads: int) -> int:
    """Let onnxruntime optimize a graph (`basic`, `extended` or `all`) and write it to `target`; return the bytes."""
    import onnxruntime

    target.mkdir(parents=True)
    options = _options(threads)
    options.graph_optimization_level = getattr(
        onnxruntime.GraphOptimizationLevel, f"ORT_ENABLE_{level.upper()}"
    )
    options.optimized_model_filepath = str(target / MODEL_FILE)
    entry = "session.optimized_model_external_initializers"
    options.add_session_config_entry(f"{entry}_file_name", DATA_FILE)
    options.add_session_config_entry(f"{entry}_min_size_in_bytes", "1024")
    _session(directory, options)
    return directory_bytes(target)


def check_graph(directory: Path, *, threads: int) -> None:
    """Check a written graph: valid by onnx's rules, loaded by onnxruntime, and free in both of its dimensions.

    Raises VerificationFailed.
    """
    check_valid(directory)
    for (batch, length), output in _outputs(directory, ((1, 3), (2, 5)), threads):
        if output.shape[0] != batch or (output.ndim == 3 and output.shape[1] != length):
            raise invalid_graph(f"for {batch} sequences of {length} tokens it returns {output.shape}")
        if not np.isfinite(output).all():
            raise invalid_graph("its output is not finite")


def check_valid(directory: Path) -> None:
    """Raise VerificationFailed for a graph that onnx's own rules do not allow."""
    import onnx

    try:
        onnx.checker.check_model(str(directory / MODEL_FILE))
    except onnx.checker.ValidationError as error:
        raise invalid_graph(f"onnx.checker refuses it: {_first_line(error)}") from error


def open_session(directory: Path, *, threads: int) -> Any:
    """An onnxruntime session on the CPU with the settings that users of the file will have, but for threads."""
    return _session(directory, _options(threads))


def run(session: Any, feed: dict[str, NDArray[Any]]) -> NDArray[np.float32]:
    """The first output."""
    output: NDArray[np.float32] = session.run(None, feed)[0]
    return output


def _options(threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Sessions are timed in turns: the threads of one must not spin while another runs.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def _session(directory: Path, options: Any) -> Any:
    import onnxruntime

    path = str(directory / MODEL_FILE)
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _finished(model: ir.Model) -> ir.Model:
    clean(model, prefix=_WRAPPED)
    embedding = token_embedding(model.graph)
    if embedding is not None:
        multiply_in_place(model.graph, embedding)
    name_dimensions(model.graph)
    model.producer_name = "modelpress"
    return model


def _outputs(
    directory: Path, shapes: tuple[tuple[int, int], ...], threads: int
) -> list[tuple[tuple[int, int], NDArray[np.float32]]]:
    """The graph's output for each shape of input, (batch, length)."""
    import onnx

    names = [
        value.name for value in onnx.load(str(directory / MODEL_FILE), load_external_data=False).graph.input
    ]
    feeds = [{name: np.ones(shape, dtype=np.int64) for name in names} for shape in shapes]
    return list(zip(shapes, first_outputs(directory, feeds, threads), strict=True))


def first_outputs(
    directory: Path, feeds: Sequence[dict[str, NDArray[Any]]], threads: int
) -> list[NDArray[np.float32]]:
    """What onnxruntime computes of each feed. Raises VerificationFailed when it does not."""
    try:
        session = open_session(directory, threads=threads)
        return [run(session, feed) for feed in feeds]
    except Exception as error:
        # onnxruntime's errors share no class of their own.
        raise invalid_graph(f"onnxruntime refuses it: {_first_line(error)}") from error


def _has_logits(architecture: str) -> bool:
    known = ARCHITECTURES[architecture]
    return known.family is Family.CAUSAL_LM or known.has_labels


def invalid_graph(what: str) -> VerificationFailed:
    """The error for a written graph that cannot be used."""
    return VerificationFailed(
        f"The ONNX file is not usable: {what}",
        code="onnx_invalid",
        hint="Report this with the model's configuration.",
    )


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep to ourselves that torchvision is absent, and what torch and onnxscript deprecate of each other."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            warnings.filterwarnings("ignore", category=FutureWarning)
            yield
    finally:
        logger.setLevel(level)
