from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from tiny_models import BLOCKS, SENTENCES, tiny_model

from app.errors import IntakeError
from workers.engine.architectures.loading import load_model, load_tokenizer
from workers.engine.checkpoint.gguf_source import convert_gguf

GGUF_NAMES = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
    "Phi3ForCausalLM": "phi3",
}
Kind = gguf.GGMLQuantizationType


def _ignore_progress(fraction: float, message: str) -> None:
    assert 0 <= fraction <= 1, message


def _llama_cpp_tensors(directory: Path, name: str) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """The tensors as llama.cpp's converter stores them: its names, q and k permuted, Gemma's norms plus one."""
    model = load_model(directory)
    config = model.config
    kind = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == name)
    table = gguf.get_tensor_name_map(kind, BLOCKS)
    for hf_name, tensor in model.state_dict().items():
        if hf_name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = tensor.float().numpy()
        gguf_name = table.get_name(hf_name, try_suffixes=(".weight", ".bias"))
        if name == "llama" and (".attn_q." in gguf_name or ".attn_k." in gguf_name):
            heads = config.num_attention_heads if ".attn_q." in gguf_name else config.num_key_value_heads
            halves = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
            array = halves.swapaxes(1, 2).reshape(array.shape)
        if name.startswith("gemma") and "norm.weight" in gguf_name:
            array = array + 1
        yield gguf_name, np.ascontiguousarray(array)


def write_gguf(directory: Path, file: Path, name: str, kind: Kind, **extra: Any) -> Path:
    """Write a Hugging Face directory as GGUF with its matrices in `kind`."""
    config = load_model(directory).config
    writer = gguf.GGUFWriter(str(file), name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(getattr(config, "head_dim", config.hidden_size // config.num_attention_heads))
    if name == "llama":
        writer.add_rope_dimension_count(config.head_dim)
    if name != "gemma3":
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if name.startswith("gemma"):
        writer.add_sliding_window(config.sliding_window)
    _add_tokenizer(writer, directory)
    for key, value in extra.items():
        writer.add_key_value(
            f"{name}.{key.replace('__', '.')}",
            value,
            gguf.GGUFValueType.STRING if isinstance(value, str) else gguf.GGUFValueType.FLOAT32,
        )
    for tensor_name, array in _llama_cpp_tensors(directory, name):
        if array.ndim == 1:
            writer.add_tensor(tensor_name, array)
        else:
            writer.add_tensor(tensor_name, gguf.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _add_tokenizer(writer: gguf.GGUFWriter, directory: Path) -> None:
    model = json.loads((directory / "tokenizer.json").read_text())
    vocabulary = sorted(model["model"]["vocab"], key=model["model"]["vocab"].get)
    special = {token["id"] for token in model["added_tokens"]}
    vocabulary += [f"<unused{i}>" for i in range(320 - len(vocabulary))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if i in special else 1 for i in range(len(vocabulary))])
    writer.add_token_merges([" ".join(pair) for pair in model["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(1)


def _logits(directory: Path) -> torch.Tensor:
    model = load_model(directory)
    with torch.inference_mode():
        return model(torch.arange(48).view(1, -1) * 5 % 300 + 5).logits


@pytest.mark.parametrize("architecture", GGUF_NAMES)
def test_a_float_file_computes_what_its_source_did(
    architecture: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    source = tiny(architecture)
    file = write_gguf(source, tmp_path / "m.gguf", GGUF_NAMES[architecture], Kind.F32)
    convert_gguf(file, tmp_path / "out", max_shard_bytes=10**9, progress=_ignore_progress)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == [architecture]
    assert config["dtype"] == "float32"
    assert "quantization_config" not in config
    torch.testing.assert_close(_logits(tmp_path / "out"), _logits(source), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(Kind.Q4_0, torch.bfloat16), (Kind.Q8_0, torch.bfloat16), (Kind.BF16, torch.bfloat16), (Kind.F16, torch.float16)],
)  # fmt: skip
def test_tensors_are_those_transformers_reads(
    kind: Kind, dtype: torch.dtype, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    file = write_gguf(tiny("LlamaForCausalLM"), tmp_path / "m.gguf", "llama", kind)
    convert_gguf(file, tmp_path / "out", max_shard_bytes=50_000, progress=_ignore_progress)
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()
    ours = load_model(tmp_path / "out", dtype="auto").state_dict()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        str(tmp_path), gguf_file="m.gguf", dtype=torch.float32
    ).state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, theirs[name].to(dtype)), name


def test_the_tokenizer_gives_the_same_ids(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    source = tiny("LlamaForCausalLM")
    file = write_gguf(source, tmp_path / "m.gguf", "llama", Kind.F16)
    convert_gguf(file, tmp_path / "out", max_shard_bytes=10**9, progress=_ignore_progress)
    text = " ".join(SENTENCES) + "</s> a café, 12 things\n\n<s>"
    converted = load_tokenizer(tmp_path / "out")
    assert converted(text, add_special_tokens=False) == load_tokenizer(source)(text, add_special_tokens=False)
    assert converted.eos_token_id == 2


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_are_tied_when_the_file_has_no_output_matrix(*, tied: bool, tmp_path: Path) -> None:
    source = tiny_model("LlamaForCausalLM", tmp_path / "source", tie_word_embeddings=tied)
    file = write_gguf(source, tmp_path / "m.gguf", "llama", Kind.F32)
    convert_gguf(file, tmp_path / "out", max_shard_bytes=10**9, progress=_ignore_progress)
    assert load_model(tmp_path / "out").config.tie_word_embeddings is tied
    torch.testing.assert_close(_logits(tmp_path / "out"), _logits(source), atol=1e-5, rtol=1e-5)


def test_linear_rope_scaling_is_kept(tmp_path: Path) -> None:
    scaled = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0}
    source = tiny_model("LlamaForCausalLM", tmp_path / "source", rope_parameters=scaled)
    extra = {"rope__scaling__type": "linear", "rope__scaling__factor": 4.0}
    file = write_gguf(source, tmp_path / "m.gguf", "llama", Kind.F32, **extra)
    convert_gguf(file, tmp_path / "out", max_shard_bytes=10**9, progress=_ignore_progress)
    torch.testing.assert_close(_logits(tmp_path / "out"), _logits(source), atol=1e-5, rtol=1e-5)


def test_llama3_rope_scaling_is_recovered_from_its_factors(tmp_path: Path) -> None:
    scaled = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_theta": 500_000.0,
    }  # fmt: skip
    source = tiny_model("LlamaForCausalLM", tmp_path / "source", rope_parameters=scaled)
    model = load_model(source)
    plain = 500_000.0 ** (-torch.arange(0, 16, 2) / 16)
    factors = (plain / model.model.rotary_emb.inv_freq).numpy().astype(np.float32)
    writer_file = write_gguf(source, tmp_path / "m.gguf", "llama", Kind.F32)
    with_factors = _add_tensor(writer_file, tmp_path / "f.gguf", "rope_freqs.weight", factors)
    convert_gguf(with_factors, tmp_path / "out", max_shard_bytes=10**9, progress=_ignore_progress)
    torch.testing.assert_close(_logits(tmp_path / "out"), _logits(source), atol=1e-5, rtol=1e-5)


def _add_tensor(file: Path, target: Path, name: str, array: np.ndarray[Any, Any]) -> Path:
    """Write a GGUF file again with one more tensor."""
    reader = gguf.GGUFReader(file)
    writer = gguf.GGUFWriter(str(target), "llama")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            item = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], sub_type=item)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def test_a_tensor_without_a_place_is_refused(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    file = write_gguf(tiny("LlamaForCausalLM"), tmp_path / "m.gguf", "llama", Kind.F32)
    odd = _add_tensor(file, tmp_path / "o.gguf", "blk.0.attn_q.bias", np.zeros(64, np.float32))
    with pytest.raises(IntakeError, match=r"blk\.0\.attn_q\.bias"):
        convert_gguf(odd, tmp_path / "out", max_shard_bytes=10**9, progress=_ignore_progress)


def test_an_unknown_rope_scaling_is_refused(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    file = write_gguf(
        tiny("LlamaForCausalLM"), tmp_path / "m.gguf", "llama", Kind.F32, rope__scaling__type="longrope"
    )
    with pytest.raises(IntakeError, match="longrope"):
        convert_gguf(file, tmp_path / "out", max_shard_bytes=10**9, progress=_ignore_progress)


def test_a_foreign_architecture_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "mamba")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(IntakeError) as caught:
        convert_gguf(tmp_path / "m.gguf", tmp_path / "out", max_shard_bytes=10**9, progress=_ignore_progress)
    assert caught.value.code == "unsupported_architecture"


def test_a_cut_off_file_is_refused(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    file = write_gguf(tiny("LlamaForCausalLM"), tmp_path / "m.gguf", "llama", Kind.F32)
    (tmp_path / "cut.gguf").write_bytes(file.read_bytes()[:-4096])
    with pytest.raises(IntakeError) as caught:
        convert_gguf(
            tmp_path / "cut.gguf", tmp_path / "out", max_shard_bytes=10**9, progress=_ignore_progress
        )
    assert caught.value.code == "damaged_weights"
