"""Tiny random models of every architecture, complete with a real tokenizer, and their facts.

`from tiny_models import tiny_model, facts_of` works in every test below tests/engine: its conftest.py puts it on the path.
"""

from __future__ import annotations

import json
import re
import shutil
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny_vision import tiny_image_model

from app.intake.read_dataset import read_dataset
from app.intake.read_model import read_model
from app.spec.architectures import ARCHITECTURES
from app.spec.base import Family
from app.spec.facts import ModelFacts, TensorFact

HIDDEN = 64
BLOCKS = 4
INTERMEDIATE = 128
HEADS = 4
KEY_VALUE_HEADS = 2
HEAD_DIM = 16
POSITIONS = 128
VOCABULARY = 320
EXPERTS = 4

TEXT_ARCHITECTURES = tuple(name for name, a in ARCHITECTURES.items() if not a.takes_images)
IMAGE_ARCHITECTURES = tuple(name for name, a in ARCHITECTURES.items() if a.takes_images)

SENTENCES = (
    "The river runs past the old mill and under the bridge where children fish in summer.",
    "A small engine can pull a long train if the rails are level and the wheels are dry.",
    "She read the letter twice, folded it, and put it away without saying a word.",
    "Bread needs flour, water, salt and time; everything else is a matter of taste.",
    "When the rain stopped, the whole village came out to look at the rainbow.",
    "He asked for three apples, two pears and a loaf, and paid with an old silver coin.",
    "The clock in the tower has been wrong for years, and nobody has ever complained.",
    "In the garden the roses were open, and the bees worked until the light was gone.",
)
_SPECIAL_WORDPIECE = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
_SPECIAL_BPE = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
_WORDPIECE_TYPES = ("bert", "distilbert", "mpnet", "electra")
_WITH_HEAD_DIM = (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3", "mixtral", "qwen3_moe",
)  # fmt: skip
_DECODER_EXTRAS: dict[str, dict[str, Any]] = {
    "gemma2": {"sliding_window": 32, "query_pre_attn_scalar": HEAD_DIM},
    "gemma3_text": {"sliding_window": 32, "query_pre_attn_scalar": HEAD_DIM},
    # Embeddings narrower than the blocks, as in OPT-350M; GELU as in Galactica, for after ReLU random features are dead.
    "opt": {"ffn_dim": INTERMEDIATE, "word_embed_proj_dim": HIDDEN // 2, "activation_function": "gelu"},
    "mixtral": {"num_experts_per_tok": 2, "num_local_experts": EXPERTS},
    # The third block is dense.
    "qwen2_moe": {
        "num_experts_per_tok": 2, "num_experts": EXPERTS, "moe_intermediate_size": INTERMEDIATE // 4,
        "shared_expert_intermediate_size": INTERMEDIATE // 2, "mlp_only_layers": [2],
    },
    "qwen3_moe": {
        "num_experts_per_tok": 2, "num_experts": EXPERTS, "moe_intermediate_size": INTERMEDIATE // 4,
    },
}  # fmt: skip
_ENCODER_EXTRAS: dict[str, dict[str, Any]] = {
    "electra": {"embedding_size": HIDDEN // 2},
    "modernbert": {
        "bos_token_id": 0, "cls_token_id": 0, "eos_token_id": 2, "sep_token_id": 2, "local_attention": 32,
    },
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 32},
}  # fmt: skip


def tiny_model(
    architecture: str, directory: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any
) -> Path:
    """Write config, safetensors and tokenizer of a random model; `config` overrides keys of its configuration.

    Biases and norms are random too, so that a technique which loses one of them is caught.
    """
    import transformers

    directory.mkdir(parents=True, exist_ok=True)
    if ARCHITECTURES[architecture].takes_images:
        return tiny_image_model(architecture, directory, seed=seed, **config)
    kind = ARCHITECTURES[architecture].model_type
    model_class = getattr(transformers, architecture)
    configuration = model_class.config_class(**(_config(architecture, kind) | config))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(configuration)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(str(directory))
    write_tokenizer(directory, wordpiece=kind in _WORDPIECE_TYPES, segments=kind in ("bert", "electra"))
    return directory


Tensors = dict[str, torch.Tensor]


def changed(directory: Path, target: Path, change: Callable[[Tensors], object]) -> Path:
    """A copy of a model whose tensors were changed."""
    shutil.copytree(directory, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def write_text(path: Path, *, documents: int = 40) -> Path:
    """Write a text of blank-line separated documents, about 90 characters each, no two the same."""
    halves = [sentence.rstrip(".").split(" and ") for sentence in SENTENCES]
    lines = [
        f"{halves[i % 8][0]} and {halves[(i // 8 + i) % 8][-1]}, as told on day {i}."
        for i in range(documents)
    ]
    path.write_text("\n\n".join(lines), encoding="utf-8")
    return path


def facts_of(directory: Path) -> ModelFacts:
    """Facts of the safetensors model in a directory, from its config and headers alone."""
    config = json.loads((directory / "config.json").read_text())
    architecture = ARCHITECTURES[config["architectures"][0]]
    if architecture.takes_images:
        return read_model({file.name: file for file in directory.iterdir()}).facts
    files = sorted(directory.glob("*.safetensors"))
    tensors = tuple(fact for file in files for fact in _header(file))
    return ModelFacts(
        format="safetensors",
        architecture=architecture.name,
        family=architecture.family,
        parameters=sum(t.elements for t in tensors),
        dtype=max(tensors, key=lambda t: t.elements).dtype,
        weight_bytes=sum(file.stat().st_size for file in files),
        hidden_size=config[architecture.hidden_key],
        num_blocks=config[architecture.blocks_key],
        vocab_size=config["vocab_size"],
        max_positions=config[architecture.positions_key],
        tied_embeddings=architecture.family is Family.CAUSAL_LM
        and not any(t.name == architecture.head for t in tensors),
        num_labels=len(config.get("id2label", {0: 0, 1: 1})) if architecture.has_labels else None,
        label_names=tuple(config["id2label"].values()) if "id2label" in config else None,
        experts_per_token=config["num_experts_per_tok"] if architecture.expert_layers else None,
        attention_heads=config.get("num_attention_heads"),
        key_value_heads=config.get("num_key_value_heads"),
        tensors=tensors,
    )


def write_labelled(path: Path, texts: Sequence[str], labels: Sequence[int | str]) -> Path:
    """Texts with labels as the service keeps them."""
    source = path.with_suffix(".jsonl")
    lines = [json.dumps({"text": text, "label": label}) for text, label in zip(texts, labels, strict=True)]
    source.write_text("\n".join(lines))
    path.write_bytes(b"".join(read_dataset(source, source.name, max_bytes=2**20).chunks))
    return path


def write_tokenizer(directory: Path, *, wordpiece: bool, segments: bool = False) -> None:
    """Make a tokenizer of at most VOCABULARY entries from SENTENCES and save it as transformers does.

    With `segments` it gives `token_type_ids` too, as BERT's does.
    """
    import transformers

    build = _wordpiece if wordpiece else _byte_level_bpe
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    values = _SPECIAL_WORDPIECE if wordpiece else ["<pad>", "<unk>", "<s>", "</s>", "<mask>"]
    special: dict[str, Any] = dict(zip(names, values, strict=True))
    if not wordpiece:
        special |= {"bos_token": "<s>", "eos_token": "</s>"}
    if segments:
        special["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=build(), model_max_length=POSITIONS, **special
    ).save_pretrained(str(directory))


def _config(architecture: str, kind: str) -> dict[str, Any]:
    common: dict[str, Any] = {"vocab_size": VOCABULARY, "initializer_range": 0.1, "pad_token_id": 1}
    if ARCHITECTURES[architecture].family is Family.CAUSAL_LM:
        return common | _decoder_config(kind)
    if kind in _WORDPIECE_TYPES:
        common["pad_token_id"] = 0
    common |= _ENCODER_EXTRAS.get(kind, {})
    if kind == "distilbert":
        return common | {
            "dim": HIDDEN, "hidden_dim": INTERMEDIATE, "n_layers": BLOCKS, "n_heads": HEADS,
            "max_position_embeddings": POSITIONS,
        }  # fmt: skip
    # Roberta and MPNet count positions from pad_token_id + 1.
    return common | {
        "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_hidden_layers": BLOCKS,
        "num_attention_heads": HEADS, "max_position_embeddings": POSITIONS + 2,
    }  # fmt: skip


def _decoder_config(kind: str) -> dict[str, Any]:
    if kind == "gpt2":
        return {
            "n_embd": HIDDEN, "n_inner": INTERMEDIATE, "n_layer": BLOCKS, "n_head": HEADS, "n_positions": POSITIONS,
            "bos_token_id": 0, "eos_token_id": 2,
        }  # fmt: skip
    config: dict[str, Any] = {
        "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_hidden_layers": BLOCKS,
        "num_attention_heads": HEADS, "num_key_value_heads": KEY_VALUE_HEADS, "max_position_embeddings": POSITIONS,
        "bos_token_id": 0, "eos_token_id": 2,
    }  # fmt: skip
    if kind in _WITH_HEAD_DIM:
        config["head_dim"] = HEAD_DIM
    return config | _DECODER_EXTRAS.get(kind, {})


def _byte_level_bpe() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=_SPECIAL_BPE,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer


def _wordpiece() -> Any:
    """Whole words of SENTENCES, and letters for others: a trainer breaks ties another way in each process."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    words = sorted({word for line in SENTENCES for word in re.findall(r"\w+|[^\w\s]", line.lower())})
    letters = sorted(set("".join(words)))
    pieces = dict.fromkeys([*_SPECIAL_WORDPIECE, *letters, *(f"##{letter}" for letter in letters), *words])
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.add_special_tokens(_SPECIAL_WORDPIECE)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer


def _header(file: Path) -> list[TensorFact]:
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    return [TensorFact(name=n, dtype=t["dtype"], shape=tuple(t["shape"])) for n, t in header.items()]
