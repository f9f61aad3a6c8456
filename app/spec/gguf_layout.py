"""What a GGUF file of a model holds: names, block formats and bytes of its tensors, before anything is read.

Which tensor gets which format follows llama.cpp's quantizer (src/llama-quant.cpp), so that a mix means the same size
here as there. Names are those of the `gguf` package's table. Source: ggml's docs/gguf.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from app.spec.architectures import block_index
from app.spec.facts import TensorFact
from app.spec.gguf import Mix

ALIGNMENT = 32
"""Tensors begin at multiples of this many bytes."""
GGUF_FILE = "model.gguf"


@dataclass(frozen=True)
class BlockFormat:
    """How many weights one block holds, and in how many bytes."""

    name: str
    weights: int
    nbytes: int

    @property
    def bits(self) -> float:
        """Bits per weight, scales included."""
        return 8 * self.nbytes / self.weights


FORMATS = {
    f.name: f
    for f in (
        BlockFormat("F32", 1, 4),
        BlockFormat("F16", 1, 2),
        BlockFormat("Q4_0", 32, 18),
        BlockFormat("Q4_1", 32, 20),
        BlockFormat("Q5_0", 32, 22),
        BlockFormat("Q5_1", 32, 24),
        BlockFormat("Q8_0", 32, 34),
        BlockFormat("Q4_K", 256, 144),
        BlockFormat("Q5_K", 256, 176),
        BlockFormat("Q6_K", 256, 210),
    )
}
# What a tensor gets whose inputs are no multiple of 256.
_SMALLER_BLOCKS = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
_MOST = {"Q8_0": "Q8_0", "Q6_K": "Q6_K", "Q5_K_M": "Q5_K", "Q4_K_M": "Q4_K", "Q4_K_S": "Q4_K", "Q4_0": "Q4_0"}

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
    "Phi3ForCausalLM": "phi3",
}
"""llama.cpp's names of the architectures that both it and transformers read from GGUF."""

_OUTSIDE = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
}
_INSIDE = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_FOUR_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the file."""

    source: str
    """Its name in Hugging Face's layout."""
    name: str
    shape: tuple[int, ...]
    format: BlockFormat

    @property
    def nbytes(self) -> int:
        """Bytes of its blocks."""
        return math.prod(self.shape) // self.format.weights * self.format.nbytes


def gguf_tensors(tensors: Iterable[TensorFact], architecture: str, mix: Mix) -> tuple[GgufTensor, ...]:
    """Every tensor of the file, in order: matrices in the formats of the mix, vectors in float32.

    Raises ValueError for a tensor that the architecture does not have.
    """
    facts = [t for t in tensors if not _is_computed(t.name)]
    blocks = len({block_index(t.name) for t in facts} - {None})
    tied = all(t.name != "lm_head.weight" for t in facts)
    found = []
    for fact in facts:
        name = gguf_name(fact.name, architecture)
        kind = _format(name, fact.shape, mix, blocks=blocks, tied=tied)
        found.append(GgufTensor(fact.name, name, fact.shape, FORMATS[kind]))
    return tuple(found)


def gguf_name(name: str, architecture: str) -> str:
    """The name in GGUF of a tensor in Hugging Face's layout, by llama.cpp's name of the architecture."""
    # Checkpoints saved from the model below the head have no prefix.
    module, _, kind = name.removeprefix("model.").rpartition(".")
    index = block_index(name)
    if index is None:
        translated = _OUTSIDE.get(module)
    else:
        inside = _INSIDE | (_FOUR_NORMS if architecture in {"gemma2", "gemma3"} else {})
        part = inside.get(module.removeprefix(f"layers.{index}."))
        translated = part and f"blk.{index}.{part}"
    if translated is None:
        raise ValueError(f"a GGUF file of {architecture} has no tensor for {name}")
    return f"{translated}.{kind}"


def data_bytes(tensors: Iterable[GgufTensor]) -> int:
    """Bytes of the tensors in the file, each padded to the alignment."""
    return sum(padded(t.nbytes) for t in tensors)


def index_bytes(tensors: Iterable[GgufTensor]) -> int:
    """Bytes of the entries that say what each tensor is and where it lies."""
    return sum(8 + len(t.name) + 4 + 8 * len(t.shape) + 4 + 8 for t in tensors)


def padded(count: int) -> int:
    """The next multiple of the alignment."""
    return -(-count // ALIGNMENT) * ALIGNMENT


def _is_computed(name: str) -> bool:
    """Old checkpoints store rotary frequencies, which loaders compute."""
    return name.endswith("rotary_emb.inv_freq")


def _format(name: str, shape: tuple[int, ...], mix: Mix, *, blocks: int, tied: bool) -> str:
    if len(shape) != 2:
        return "F32"
    most = _MOST[mix]
    if name == "output.weight" or (name == "token_embd.weight" and tied):
        wanted = "Q8_0" if most == "Q8_0" or shape[1] % FORMATS[most].weights else "Q6_K"
    else:
        wanted = _in_block(name, mix, blocks) or most
    if shape[1] % FORMATS[wanted].weights:
        wanted = _SMALLER_BLOCKS.get(wanted, wanted)
    return wanted if shape[1] % FORMATS[wanted].weights == 0 else "F16"


def _in_block(name: str, mix: Mix, blocks: int) -> str | None:
    """The format of a tensor that a mix treats better than most; None for the others."""
    _, index, part, *_ = (*name.split("."), "", "")
    if part not in {"attn_v", "attn_qkv", "ffn_down"}:
        return None
    if part == "attn_qkv":
        return {"Q4_K_M": "Q5_K", "Q5_K_M": "Q6_K"}.get(mix)
    number, first = int(index), int(index) < blocks // 8
    if mix in {"Q4_K_M", "Q5_K_M"}:
        often = first or number >= 7 * blocks // 8 or (number - blocks // 8) % 3 == 2
        return "Q6_K" if often else None
    if mix == "Q4_K_S":
        return "Q5_K" if (number < 4 if part == "attn_v" else first) else None
    return "Q4_1" if mix == "Q4_0" and part == "ffn_down" and first else None
