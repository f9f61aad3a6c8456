"""One evaluator for everyone: what a quantized model on disk predicts on held-out windows, against its original.

Both in float32. Artifacts of ours are loaded by transformers from the compressed-tensors files; those of peers from the
float32 weights that their own loader made of their own files (see job.py). Activations in int8 are computed here, the
same for all: rounded per token, symmetric, over all 256 levels, as compressed-tensors does.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from workers.engine.architectures.loading import load_model
from workers.engine.measure.language import Predictions

from .job import block_linears
from .texts import digest


@dataclass(frozen=True)
class Quality:
    """How far a model is from its original. Nats."""

    kl_mean: float
    kl_median: float
    kl_p99: float
    kl_max: float
    perplexity: float
    original_perplexity: float
    delta_ln_perplexity: float
    delta_ln_perplexity_low: float
    delta_ln_perplexity_high: float
    """The 95 % interval of the difference, by paired bootstrap over windows."""
    top1_agreement: float
    tokens: int
    windows: str
    """Digest of the evaluation windows."""

    def write(self, path: Path) -> None:
        """Keep as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1))

    @classmethod
    def read(cls, path: Path) -> Quality:
        """What `write` kept."""
        return cls(**json.loads(path.read_text()))


class Original:
    """What the original predicts on windows (windows, tokens); its forward is run once and kept in a cache directory.

    Kept are the last hidden states, from which its head gives the logits: they are a hundredth of the size.
    """

    def __init__(self, directory: Path, windows: NDArray[np.int64], cache: Path) -> None:
        """Load the head; run the rest only if the cache has no states for these windows."""
        self.windows, self.digest = windows, digest(windows)
        model = load_model(directory)
        self._head = model.get_output_embeddings()
        path = cache / f"hidden-{self.digest}.npy"
        if not path.is_file():
            cache.mkdir(parents=True, exist_ok=True)
            np.save(path, _hidden_states(model, windows))
        self._hidden = torch.from_numpy(np.load(path))

    @torch.inference_mode()
    def logits(self, index: int) -> Tensor:
        """Of one window: (tokens, vocabulary)."""
        logits: Tensor = self._head(self._hidden[index])
        return logits


@torch.inference_mode()
def _hidden_states(model: Any, windows: NDArray[np.int64]) -> NDArray[np.float32]:
    states = []
    for number, window in enumerate(windows):
        tokens = torch.from_numpy(window)[None]
        states.append(model.base_model(tokens, use_cache=False).last_hidden_state[0])
        # A model may do more to its logits than its head does, and then this cache is not for it.
        if number == 0:
            torch.testing.assert_close(
                model(tokens, use_cache=False).logits[0], model.get_output_embeddings()(states[0])
            )
    return torch.stack(states).numpy()


@torch.inference_mode()
def evaluate(directory: Path, original: Original, *, int8_activations: bool) -> Quality:
    """Compare the model in a directory, compressed or plain, with its original on the original's windows."""
    model = load_quantized(directory)
    if int8_activations:
        for layer in block_linears(model).values():
            layer.register_forward_pre_hook(_rounded_inputs)
    predictions = Predictions()
    for index, window in enumerate(original.windows):
        tokens = torch.from_numpy(window)
        logits = model(tokens[None], use_cache=False).logits[0]
        predictions.add(original.logits(index), logits, tokens[1:])
    before, after = predictions.perplexities()
    delta, low, high = predictions.delta_ln_perplexity(seed=0)
    return Quality(
        **predictions.divergence_summary(),
        perplexity=after,
        original_perplexity=before,
        delta_ln_perplexity=delta,
        delta_ln_perplexity_low=low,
        delta_ln_perplexity_high=high,
        top1_agreement=predictions.agreeing / predictions.positions,
        tokens=int(original.windows.size),
        windows=original.digest,
    )


def load_quantized(directory: Path) -> Any:
    """A model of plain layers in float32, its weights decompressed by transformers where they are compressed."""
    config = json.loads((directory / "config.json").read_text())
    if "quantization_config" not in config:
        return load_model(directory)
    import transformers

    with warnings.catch_warnings():
        # That the file's settings are kept and ours for loading added: as wanted.
        warnings.filterwarnings("ignore", message="You passed `quantization_config`")
        compressed = transformers.AutoModelForCausalLM.from_pretrained(
            str(directory),
            dtype=torch.float32,
            local_files_only=True,
            quantization_config=transformers.CompressedTensorsConfig(dequantize=True),
        )
    # Its layers may round their inputs too, in a way of their own.
    model = transformers.AutoModelForCausalLM.from_config(compressed.config, dtype=torch.float32)
    weights = compressed.state_dict()
    model.load_state_dict({name: weights[name] for name in model.state_dict()})
    return model.eval()


def _rounded_inputs(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:  # noqa: ARG001
    return (round_per_token(inputs[0]), *inputs[1:])


def round_per_token(values: Tensor) -> Tensor:
    """What is left of activations (..., tokens, features) in int8 with a scale per token: the same shape."""
    scale = values.abs().amax(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / 127.5
    return (values / scale).round().clamp(-128, 127) * scale
