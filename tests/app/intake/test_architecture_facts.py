"""Architectures whose config and tensors go by other names than Llama's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from model_files import safetensors, safetensors_header

from app.errors import IntakeError
from app.intake.read_model import read_model
from app.spec.facts import ModelFacts

Shapes = dict[str, tuple[int, ...]]

GPT2 = {
    "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_positions": 64,
    "vocab_size": 32,
}  # fmt: skip
# As the original checkpoint has it: no prefix, and a causal mask among the tensors.
GPT2_SHAPES: Shapes = {
    "wte.weight": (32, 16), "wpe.weight": (64, 16), "h.0.ln_1.weight": (16,), "h.0.attn.bias": (1, 1, 64, 64),
    "h.0.attn.c_attn.weight": (16, 48),
}  # fmt: skip
OPT = {
    "architectures": ["OPTForCausalLM"], "model_type": "opt", "hidden_size": 16, "num_hidden_layers": 1,
    "max_position_embeddings": 64, "vocab_size": 32, "word_embed_proj_dim": 8,
}  # fmt: skip
OPT_SHAPES: Shapes = {
    "model.decoder.embed_tokens.weight": (32, 8), "model.decoder.layers.0.self_attn_layer_norm.weight": (16,),
    "model.decoder.layers.0.fc1.weight": (32, 16),
}  # fmt: skip
MIXTRAL = {
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_size": 16, "num_hidden_layers": 1,
    "max_position_embeddings": 64, "vocab_size": 32, "num_experts_per_tok": 2,
}  # fmt: skip
MIXTRAL_SHAPES: Shapes = {
    "model.embed_tokens.weight": (32, 16), "lm_head.weight": (32, 16),
    "model.layers.0.block_sparse_moe.gate.weight": (4, 16),
    **{f"model.layers.0.block_sparse_moe.experts.{n}.w1.weight": (32, 16) for n in range(4)},
}  # fmt: skip
NEOX = {
    "architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox", "hidden_size": 16, "num_hidden_layers": 1,
    "max_position_embeddings": 64, "vocab_size": 32, "tie_word_embeddings": False,
}  # fmt: skip
NEOX_SHAPES: Shapes = {
    "gpt_neox.embed_in.weight": (32, 16), "embed_out.weight": (32, 16), "gpt_neox.layers.0.mlp.dense_h_to_4h.weight": (64, 16),
}  # fmt: skip


def read(directory: Path, config: dict[str, Any], shapes: Shapes) -> ModelFacts:
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "model.safetensors").write_bytes(safetensors(safetensors_header(shapes)))
    return read_model({path.name: path for path in directory.iterdir()}).facts


def test_gpt2_is_read_by_its_own_keys(tmp_path: Path) -> None:
    facts = read(tmp_path, GPT2, GPT2_SHAPES)
    assert (facts.num_blocks, facts.hidden_size, facts.max_positions) == (1, 16, 64)
    assert facts.tied_embeddings
    assert [t.name for t in facts.compressible()] == ["h.0.attn.c_attn.weight"]


def test_embeddings_of_opt_may_be_narrower_than_its_blocks(tmp_path: Path) -> None:
    assert read(tmp_path, OPT, OPT_SHAPES).hidden_size == 16
    with pytest.raises(IntakeError, match="embed_tokens"):
        read(tmp_path, OPT | {"word_embed_proj_dim": 16}, OPT_SHAPES)


def test_a_head_under_another_name_is_a_head(tmp_path: Path) -> None:
    assert not read(tmp_path, NEOX, NEOX_SHAPES).tied_embeddings


def test_experts_that_a_token_meets_are_known(tmp_path: Path) -> None:
    facts = read(tmp_path, MIXTRAL, MIXTRAL_SHAPES)
    assert facts.experts_per_token == 2
    assert facts.active_share() == pytest.approx(1 - 0.5 * 4 * 512 / facts.parameters)


def test_experts_in_one_tensor_are_refused(tmp_path: Path) -> None:
    fused: Shapes = {"model.layers.0.mlp.experts.gate_up_proj": (4, 64, 16)}
    with pytest.raises(IntakeError, match="gate_up_proj holds all experts"):
        read(tmp_path, MIXTRAL, MIXTRAL_SHAPES | fused)
