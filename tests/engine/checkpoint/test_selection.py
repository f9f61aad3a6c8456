"""Chosen and untouched layers add up to all compressible ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import facts_of

from app.errors import InvalidRequest, UnsupportedForModel
from app.spec.architectures import ARCHITECTURES, is_router
from workers.engine.checkpoint import Checkpoint
from workers.engine.checkpoint.selection import select_layers


@pytest.mark.parametrize("architecture", [a.name for a in ARCHITECTURES.values() if not a.is_convolutional])
def test_chosen_and_untouched_are_all_compressible_layers(
    architecture: str, tiny: Callable[[str], Path]
) -> None:
    selection = select_layers(Checkpoint.open(tiny(architecture)), ["*.1.*"])
    names = [*selection.chosen, *(layer.name for layer in selection.untouched)]
    assert sorted(names) == sorted(fact.name for fact in facts_of(tiny(architecture)).compressible())
    assert all(
        ".1." in layer.name or is_router(layer.name) or layer.reason.startswith("outside the blocks")
        for layer in selection.untouched
    )
    assert all(layer.reason for layer in selection.untouched)
    assert selection.warnings == ()


def one_layer(directory: Path, weight: torch.Tensor, config: dict[str, object]) -> Checkpoint:
    (directory / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]} | config))
    save_file({"model.layers.0.proj.weight": weight}, directory / "model.safetensors")
    return Checkpoint.open(directory)


def test_a_pattern_matches_the_module_and_not_the_weight(tmp_path: Path) -> None:
    checkpoint = one_layer(tmp_path, torch.zeros(2, 2), {})
    selection = select_layers(checkpoint, ["*.weight"])
    assert list(selection.chosen) == ["model.layers.0.proj.weight"]
    assert selection.warnings == ("ignore pattern '*.weight' matches no layer",)
    with pytest.raises(InvalidRequest, match="No layer is left"):
        select_layers(checkpoint, ["*proj"])


def test_a_quantized_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedForModel, match="already quantized"):
        select_layers(one_layer(tmp_path, torch.zeros(2, 2), {"quantization_config": {}}), [])


def test_weights_of_eight_bits_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedForModel, match="float8_e4m3fn"):
        select_layers(one_layer(tmp_path, torch.zeros(2, 2).to(torch.float8_e4m3fn), {}), [])
