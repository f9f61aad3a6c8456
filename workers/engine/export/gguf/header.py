"""The header of a GGUF file: what a model is, in llama.cpp's keys, from its configuration in transformers' words.

Source of the keys: ggml's docs/gguf.md and llama.cpp's converter. What a configuration says and no key can hold
(sliding windows of llama, biases where there are none, other activations) is found by reading the file back
(reader.py), and refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from gguf import GGML_QUANT_VERSION, GGMLQuantizationType, GGUFWriter, LlamaFileType, RopeScalingType
from numpy import dtype
from torch import Tensor

from app.errors import UnsupportedForModel
from app.spec.gguf import QuantizeGguf
from app.spec.gguf_layout import ARCHITECTURES, FORMATS, GgufTensor, padded
from workers.engine.export.gguf.tokenizer import add_tokenizer

_FILE_TYPES = {
    "Q8_0": LlamaFileType.MOSTLY_Q8_0,
    "Q6_K": LlamaFileType.MOSTLY_Q6_K,
    "Q5_K_M": LlamaFileType.MOSTLY_Q5_K_M,
    "Q4_K_M": LlamaFileType.MOSTLY_Q4_K_M,
    "Q4_K_S": LlamaFileType.MOSTLY_Q4_K_S,
    "Q4_0": LlamaFileType.MOSTLY_Q4_0,
}
ROPE_FACTORS = "rope_freqs.weight"


def encode_header(
    config: Any, tokenizer: Any, tensors: Sequence[GgufTensor], step: QuantizeGguf, *, calibration_tokens: int
) -> bytes:
    """All bytes before the first tensor, padding included."""
    writer = GGUFWriter(None, ARCHITECTURES[config.architectures[0]])
    writer.add_type("model")
    writer.add_file_type(_FILE_TYPES[step.mix])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    _add_shape(writer, config)
    _add_rotary(writer, config)
    if config.architectures[0].startswith("Gemma"):
        _add_gemma(writer, config)
    add_tokenizer(writer, tokenizer, size=config.vocab_size)
    writer.add_string("modelpress.technique", step.technique)
    writer.add_string("modelpress.mix", step.mix)
    writer.add_bool("modelpress.compensated", step.compensate)
    writer.add_uint32("modelpress.calibration_tokens", calibration_tokens)
    for tensor in tensors:
        kind = GGMLQuantizationType[tensor.format.name]
        writer.add_tensor_info(tensor.name, tensor.shape, dtype("float32"), tensor.nbytes, raw_dtype=kind)
    return _bytes_of(writer)


def rope_factors(config: Any) -> tuple[GgufTensor, Tensor] | None:
    """Llama 3's scaling of rotary frequencies as the tensor that llama.cpp divides them by; None where there is none."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = config.rope_parameters or {}
    if parameters.get("rope_type") != "llama3":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    exponents = torch.arange(len(scaled), dtype=torch.float32) / len(scaled)
    factors = parameters["rope_theta"] ** -exponents / scaled.float()
    return GgufTensor("", ROPE_FACTORS, tuple(factors.shape), FORMATS["F32"]), factors


def _add_shape(writer: GGUFWriter, config: Any) -> None:
    head = _head_dim(config)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_key_length(head)
    writer.add_value_length(head)


def _add_rotary(writer: GGUFWriter, config: Any) -> None:
    parameters = config.rope_parameters
    # Gemma 3 has one set for blocks with a window and one for those without.
    parameters = parameters.get("full_attention", parameters)
    partial = parameters.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None) or 1.0)
    writer.add_rope_dimension_count(int(_head_dim(config) * partial))
    writer.add_rope_freq_base(parameters["rope_theta"])
    kind = parameters.get("rope_type", "default")
    if kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(parameters["factor"])
    elif kind == "yarn":
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(parameters["factor"])
        writer.add_rope_scaling_orig_ctx_len(parameters["original_max_position_embeddings"])
    elif kind not in {"default", "llama3"}:
        raise UnsupportedForModel(
            f"Rotary embeddings scaled by {kind} cannot be written as GGUF here.",
            code="unsupported_configuration",
            hint="Use quantize.calibrated, whose result keeps the model's own configuration.",
        )
    if config.architectures[0].startswith("Phi3") and kind == "default":
        # llama.cpp wants to know that the context was not extended.
        writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)


def _add_gemma(writer: GGUFWriter, config: Any) -> None:
    writer.add_sliding_window(config.sliding_window)
    if config.attn_logit_softcapping is not None:
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    if config.final_logit_softcapping is not None:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _bytes_of(writer: GGUFWriter) -> bytes:
    """The package writes to files alone."""
    with TemporaryDirectory(prefix="gguf-header-") as directory:
        file = Path(directory) / "header.gguf"
        steps: tuple[Callable[[], None], ...] = (
            lambda: writer.write_header_to_file(file),
            writer.write_kv_data_to_file,
            writer.write_ti_data_to_file,
            writer.close,
        )
        for step in steps:
            step()
        content = file.read_bytes()
    return content + bytes(padded(len(content)) - len(content))
