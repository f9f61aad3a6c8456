"""Load a model or tokenizer from a Hugging Face directory, with transformers alone and nothing of ours.

Never runs code that came with the model: `trust_remote_code` is off and no hub is asked.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from app.spec.architectures import ARCHITECTURES
from app.spec.base import Family


def architecture_of(directory: Path) -> str:
    """The transformers class that `config.json` names."""
    names = json.loads((directory / "config.json").read_text()).get("architectures") or ["?"]
    return str(names[0])


def family_of(directory: Path) -> Family:
    """The family of the model in a directory; its architecture is one Modelpress knows."""
    return ARCHITECTURES[architecture_of(directory)].family


def loader_of(directory: Path) -> Any:
    """The transformers loader for a directory: of causal LMs, classifiers of text or images, or bare encoders."""
    import transformers

    architecture = architecture_of(directory)
    if ARCHITECTURES[architecture].family is Family.CAUSAL_LM:
        return transformers.AutoModelForCausalLM
    if ARCHITECTURES[architecture].takes_images:
        return transformers.AutoModelForImageClassification
    if ARCHITECTURES[architecture].has_labels:
        return transformers.AutoModelForSequenceClassification
    return transformers.AutoModel


def load_model(
    directory: Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu", attention: str | None = None
) -> Any:
    """Load a model in evaluation mode; `attention` is how transformers computes it, by default its own choice."""
    model = loader_of(directory).from_pretrained(
        str(directory),
        dtype=dtype,
        local_files_only=True,
        trust_remote_code=False,
        device_map=None,
        attn_implementation=attention,
    )
    return model.to(device).eval()


def model_from_tensors(directory: Path, auto: Any, tensors: dict[str, Tensor]) -> tuple[Any, dict[str, Any]]:
    """The model of a directory in float32 with these tensors for those of its files, and what transformers says of them.

    For files that say of themselves that they are quantized in a way that is undone already. `auto`: see `loader_of`.
    """
    import transformers

    config = transformers.AutoConfig.from_pretrained(str(directory), local_files_only=True)
    del config.quantization_config
    with torch.device("meta"):
        model_class = type(auto.from_config(config))
    model, info = model_class.from_pretrained(
        None, config=config, state_dict=tensors, dtype=torch.float32, output_loading_info=True
    )
    return model.eval(), info


def load_tokenizer(directory: Path) -> Any:
    """Load the tokenizer that lies beside a model."""
    import transformers

    return transformers.AutoTokenizer.from_pretrained(
        str(directory), local_files_only=True, trust_remote_code=False
    )
