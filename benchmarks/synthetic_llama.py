"""A Llama with random weights and of any shape, complete with a tokenizer of bytes: for what does not depend on values."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from app.spec.facts import TensorFact
from workers.engine.checkpoint import CheckpointWriter, write_config

HEAD = 64
_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama. `keys` is the width of keys and values."""

    hidden: int
    inner: int
    keys: int
    blocks: int
    vocabulary: int = 32_000
    head: int = HEAD

    def weights(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors by name."""
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens": (self.vocabulary, self.hidden),
            "lm_head": (self.vocabulary, self.hidden),
            "model.norm": (self.hidden,),
        }
        block: dict[str, tuple[int, ...]] = {
            "input_layernorm": (self.hidden,),
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (self.keys, self.hidden),
            "self_attn.v_proj": (self.keys, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "post_attention_layernorm": (self.hidden,),
            "mlp.gate_proj": (self.inner, self.hidden),
            "mlp.up_proj": (self.inner, self.hidden),
            "mlp.down_proj": (self.hidden, self.inner),
        }
        for number in range(self.blocks):
            shapes |= {f"model.layers.{number}.{name}": shape for name, shape in block.items()}
        return shapes

    @property
    def block_parameters(self) -> int:
        """Weights of the linear layers inside blocks: what is quantized."""
        shapes = (shape for name, shape in self.weights().items() if "_proj" in name)
        return sum(rows * columns for rows, columns in shapes)


def make_llama(directory: Path, shape: Shape, *, device: str = "cpu") -> None:
    """Write config, bf16 weights in shards of 2 GB, and tokenizer; `device`: where the weights are drawn."""
    facts = [
        TensorFact(name=f"{name}.weight", dtype="BF16", shape=size) for name, size in shape.weights().items()
    ]
    generator = torch.Generator(device).manual_seed(0)
    with CheckpointWriter(directory, facts, 2_000_000_000) as writer:
        for fact in facts:
            if len(fact.shape) == 1:
                writer.write(fact.name, torch.ones(fact.shape, dtype=torch.bfloat16))
                continue
            rows, columns = fact.shape
            for start in range(0, rows, _ROWS_AT_ONCE):
                slab = torch.randn(
                    min(_ROWS_AT_ONCE, rows - start), columns, generator=generator, device=device
                )
                writer.write_rows(fact.name, start, slab.mul_(columns**-0.5).to(torch.bfloat16))
    write_config(directory, _config(shape))
    _write_tokenizer(directory)


def _config(shape: Shape) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.blocks,
        "num_attention_heads": shape.hidden // shape.head,
        "num_key_value_heads": shape.keys // shape.head,
        "head_dim": shape.head,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }


def _write_tokenizer(directory: Path) -> None:
    """One token a byte, so that a short text gives many."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: number for number, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)
