from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import BLOCKS, IMAGE_ARCHITECTURES, TEXT_ARCHITECTURES, facts_of, tiny_model
from tiny_vision import LABELS, SIDE

from app.spec.architectures import block_index
from workers.engine.architectures.loading import load_model, load_tokenizer


@pytest.mark.parametrize("architecture", TEXT_ARCHITECTURES)
def test_tiny_model_loads_and_gives_finite_outputs(architecture: str, tiny: Callable[[str], Path]) -> None:
    directory = tiny(architecture)
    tokens = load_tokenizer(directory)("The river runs past the mill.", return_tensors="pt")
    assert tokens["input_ids"].shape[1] > 5
    with torch.inference_mode():
        output = load_model(directory)(**tokens)[0]
    assert torch.isfinite(output).all()
    assert output.std() > 0.01


@pytest.mark.parametrize("architecture", TEXT_ARCHITECTURES)
def test_facts_agree_with_the_loaded_model(architecture: str, tiny: Callable[[str], Path]) -> None:
    directory = tiny(architecture)
    facts = facts_of(directory)
    model = load_model(directory)
    assert facts.num_blocks == BLOCKS
    assert (
        facts.tied_embeddings == getattr(model.config, "tie_word_embeddings", False)
        or facts.family == "encoder"
    )
    # By elements, for transformers holds the experts of a block in one parameter.
    in_blocks = [p for n, p in model.named_parameters() if block_index(n) is not None and p.dim() > 1]
    assert sum(t.elements for t in facts.compressible()) == sum(p.numel() for p in in_blocks)


@pytest.mark.parametrize("architecture", IMAGE_ARCHITECTURES)
def test_tiny_image_classifier_tells_images_apart(architecture: str, tiny: Callable[[str], Path]) -> None:
    directory = tiny(architecture)
    facts, model = facts_of(directory), load_model(directory)
    with torch.inference_mode():
        logits = model(
            pixel_values=torch.randn(4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
        )[0]
    assert logits.shape == (4, LABELS)
    assert logits.std(0).min() > 0.01
    assert facts.num_labels == LABELS
    layers = [p for p in model.parameters() if p.dim() in (2, 4)]
    assert sum(t.elements for t in facts.compressible()) == sum(p.numel() for p in layers)


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    first, second = (tiny_model("LlamaForCausalLM", tmp_path / name, seed=3) for name in "ab")
    other = tiny_model("LlamaForCausalLM", tmp_path / "c", seed=4)
    contents = [(d / "model.safetensors").read_bytes() for d in (first, second, other)]
    assert contents[0] == contents[1] != contents[2]
