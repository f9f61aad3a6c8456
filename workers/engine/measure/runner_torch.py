"""A model directory run by transformers: plain safetensors, compressed-tensors, GGUF, NF4, and PyTorch's dynamic int8."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from app.spec.base import Family, Format
from app.spec.gguf_layout import GGUF_FILE
from workers.engine.architectures.loading import family_of, loader_of
from workers.engine.export import dynamic_int8, nf4_reader
from workers.engine.export.dynamic_int8 import load_dynamic_int8
from workers.engine.export.gguf.reader import read_configuration
from workers.engine.images.pixels import pixel_values, preprocessing_of
from workers.engine.measure.results import Loading, RunnerFacts


class TorchRunner:
    """One model in float32, loaded by `from_pretrained` and nothing of ours; but for what transformers cannot load by itself.

    That is dynamic int8, and NF4 without bitsandbytes.
    """

    def __init__(self, directory: Path, *, device: str, threads: int) -> None:
        """Load the model. What the loader made up or dropped is in `facts.loading`."""
        started = time.perf_counter()
        torch.set_num_threads(threads)
        self._is_causal = family_of(directory) is Family.CAUSAL_LM
        self._preprocessing = preprocessing_of(directory)
        is_gguf = (directory / GGUF_FILE).is_file()
        declared = None if is_gguf else _declared(directory)
        kind = _format(declared, is_gguf=is_gguf)
        # PyTorch has these kernels for CPUs alone.
        self._device = device = "cpu" if kind == dynamic_int8.FORMAT else device
        self._model, loading = _load_gguf(directory) if is_gguf else _load(directory, declared)
        self._model.to(device).eval()
        self._cache: Any = None
        self.facts = RunnerFacts(
            runtime=_runtime(device, threads, kind, declared),
            format=kind,
            loading=loading,
            tied=_is_tied(self._model) if self._preprocessing is None else None,
            caches=self._is_causal,
            load_seconds=time.perf_counter() - started,
        )

    @torch.inference_mode()
    def outputs(self, window: NDArray[Any]) -> NDArray[np.float32]:
        """Logits or last hidden states of one window: (tokens or 1, columns); of a batch of images: (images, classes)."""
        arguments = {"use_cache": False} if self._is_causal else {}
        batch = window[None] if self._preprocessing is None else window
        output = self._model(self._batch(batch), **arguments)[0]
        result: NDArray[np.float32] = output.float().reshape(-1, output.shape[-1]).cpu().numpy()
        return result

    @torch.inference_mode()
    def time_forward(self, batch: NDArray[Any], *, last_only: bool) -> float:
        """Milliseconds of one pass over (sequences, tokens), or over images; `last_only` as in serving: a cache, one row of logits."""
        arguments = {"use_cache": True, "logits_to_keep": 1} if last_only else {}
        tokens = self._batch(batch)
        started = self._now()
        self._model(tokens, **arguments)
        return (self._now() - started) * 1e3

    @torch.inference_mode()
    def time_decode(self, prompt: NDArray[np.int64]) -> float:
        """Milliseconds of decoding one more token after `prompt`, whose keys and values are kept between calls."""
        if self._cache is None:
            self._cache = self._model(
                self._batch(prompt[None]), use_cache=True, logits_to_keep=1
            ).past_key_values
        token = self._batch(prompt[None, -1:])
        started = self._now()
        self._model(token, past_key_values=self._cache, use_cache=True)
        return (self._now() - started) * 1e3

    @torch.inference_mode()
    def generate(self, prompt: list[int], *, new_tokens: int) -> list[int]:
        """Continue `prompt` by the likeliest tokens, or to the end of the text."""
        tokens = self._batch(np.asarray([prompt], dtype=np.int64))
        end, cache, written = self._model.config.eos_token_id, None, list[int]()
        for _ in range(new_tokens):
            output = self._model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, tokens = output.past_key_values, output.logits[:, -1:].argmax(-1)
            written.append(int(tokens))
            if end is not None and written[-1] in np.atleast_1d(end):
                break
        return written

    def accelerator_peak_bytes(self) -> int | None:
        """Most memory held on the GPU so far; None on a CPU."""
        return torch.cuda.max_memory_allocated(self._device) if self._device != "cpu" else None

    def _batch(self, batch: NDArray[Any]) -> Tensor:
        """Tokens as they are, or images with their pixels scaled."""
        values = batch if self._preprocessing is None else pixel_values(batch, self._preprocessing)
        return torch.from_numpy(np.ascontiguousarray(values)).to(self._device)

    def _now(self) -> float:
        if self._device != "cpu":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def _declared(directory: Path) -> dict[str, Any] | None:
    """How the weights are quantized, if they are."""
    declared: dict[str, Any] | None = json.loads((directory / "config.json").read_text()).get(
        "quantization_config"
    )
    return declared


def _format(declared: dict[str, Any] | None, *, is_gguf: bool) -> Format:
    if is_gguf:
        return "gguf"
    if dynamic_int8.is_declared(declared):
        return dynamic_int8.FORMAT
    if nf4_reader.is_declared(declared):
        return nf4_reader.FORMAT
    return "safetensors" if declared is None else "compressed-tensors"


def _load_gguf(directory: Path) -> tuple[Any, Loading]:
    # The configuration is the file's own: that of config.json would hide what its header says wrongly.
    return _from_pretrained(directory, gguf_file=GGUF_FILE, config=read_configuration(directory / GGUF_FILE))


def _load(directory: Path, declared: dict[str, Any] | None) -> tuple[Any, Loading]:
    import transformers

    if declared is None:
        return _from_pretrained(directory)
    if dynamic_int8.is_declared(declared) or nf4_reader.is_declared(declared):
        load = load_dynamic_int8 if dynamic_int8.is_declared(declared) else nf4_reader.load_nf4
        model, info = load(directory, loader_of(directory))
        return model, _loading(info)
    # Left compressed, every layer would be unpacked by its first call anyway: do it where it is not timed.
    # transformers 5.23 does that while loading for one scheme alone, and then rounds neither inputs nor the cache.
    rounds = _rounds_inputs(declared) or _rounds_cache(declared)
    whole = len(declared["config_groups"]) == 1 and not rounds
    model, loading = _from_pretrained(
        directory, quantization_config=transformers.CompressedTensorsConfig(dequantize=whole)
    )
    if not whole:
        model.hf_quantizer.compressor.decompress_model(model)
        # E2M1 is unpacked to bfloat16; transformers' own `float` refuses a model that was quantized.
        torch.nn.Module.float(model)
    return model, loading


def _from_pretrained(directory: Path, **arguments: Any) -> tuple[Any, Loading]:
    model, info = loader_of(directory).from_pretrained(
        str(directory),
        dtype=torch.float32,
        local_files_only=True,
        trust_remote_code=False,
        output_loading_info=True,
        **arguments,
    )
    return model, _loading(info)


def _loading(info: dict[str, Any]) -> Loading:
    return Loading(
        missing=tuple(sorted(info["missing_keys"])),
        unexpected=tuple(sorted(info["unexpected_keys"])),
        mismatched=tuple(sorted(key[0] for key in info["mismatched_keys"])),
    )


def _rounds_inputs(declared: dict[str, Any]) -> bool:
    return any(group["input_activations"] is not None for group in declared["config_groups"].values())


def _rounds_cache(declared: dict[str, Any]) -> bool:
    return declared.get("kv_cache_scheme") is not None


def _is_tied(model: Any) -> bool | None:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None:
        return None
    # A quantized layer's weight is a method, and no tensor that another could share.
    return isinstance(head.weight, Tensor) and bool(
        head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    )


def _runtime(device: str, threads: int, kind: Format, declared: dict[str, Any] | None) -> str:
    import transformers

    where = f"{threads} threads" if device == "cpu" else torch.cuda.get_device_name(device)
    name = f"transformers {transformers.__version__}, torch {torch.__version__}, float32, {where}"
    if kind == dynamic_int8.FORMAT:
        return f"{name}, linear layers in dynamic int8 ({torch.backends.quantized.engine})"
    if kind == "safetensors":
        return name
    if kind == nf4_reader.FORMAT:
        return f"{name}, NF4 unpacked while loading without bitsandbytes"
    rounded = {"inputs": _rounds_inputs, "keys and values": _rounds_cache}
    found = [what for what, is_rounded in rounded.items() if declared and is_rounded(declared)]
    simulated = f", the rounding of {' and of '.join(found)} simulated" if found else ""
    return f"{name}, weights decompressed while loading{simulated}"
