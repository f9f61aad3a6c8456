"""A model directory run by onnxruntime: `model.onnx` and the files it names."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workers.engine.images.pixels import pixel_values, preprocessing_of
from workers.engine.measure.results import Loading, RunnerFacts

_MAIN_OUTPUTS = ("logits", "last_hidden_state")


class OnnxRunner:
    """One graph in onnxruntime. It has no key-value cache, so tokens are decoded by running all of them again."""

    def __init__(self, directory: Path, *, device: str, threads: int) -> None:
        """Load the graph on the CPU, or through CUDA where this onnxruntime has it."""
        import onnxruntime

        started = time.perf_counter()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # Threads that wait sleep, as in the runner of torch (runner_client.py): alone both ways took 15 ms a batch
        # of MiniLM, beside other work 120 ms spinning and 90 ms sleeping.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        providers = [*(["CUDAExecutionProvider"] if device != "cpu" else []), "CPUExecutionProvider"]
        self._session = onnxruntime.InferenceSession(
            str(directory / "model.onnx"), options, providers=providers
        )
        inputs = self._session.get_inputs()
        self._inputs = {node.name for node in inputs}
        self._pixels = inputs[0].name
        names = [node.name for node in self._session.get_outputs()]
        self._output = next((name for name in _MAIN_OUTPUTS if name in names), names[0])
        self._preprocessing = preprocessing_of(directory, channels=_channels(inputs[0].shape))
        self._end = _end_of_text(directory)
        provider = self._session.get_providers()[0].removesuffix("ExecutionProvider")
        self.facts = RunnerFacts(
            runtime=f"onnxruntime {onnxruntime.__version__}, {provider}, {threads} threads",
            format="onnx",
            loading=Loading(),
            load_seconds=time.perf_counter() - started,
        )

    def outputs(self, window: NDArray[Any]) -> NDArray[np.float32]:
        """Logits or last hidden states of one window: (tokens or 1, columns); of a batch of images: (images, classes)."""
        output = self._run(window[None] if self._preprocessing is None else window)
        result: NDArray[np.float32] = output.reshape(-1, output.shape[-1]).astype(np.float32, copy=False)
        return result

    def time_forward(self, batch: NDArray[Any], *, last_only: bool) -> float:
        """Milliseconds of one pass over (sequences, tokens), or over images. Raises ValueError for `last_only`: a graph gives all rows."""
        if last_only:
            raise ValueError("an ONNX graph computes the logits of every position")
        feed = self._feed(batch)
        started = time.perf_counter()
        self._session.run([self._output], feed)
        return (time.perf_counter() - started) * 1e3

    def time_decode(self, prompt: NDArray[np.int64]) -> float:
        """Raise ValueError: there is no cache to decode with."""
        raise ValueError(f"an ONNX graph without a cache cannot decode after {len(prompt)} tokens")

    def generate(self, prompt: list[int], *, new_tokens: int) -> list[int]:
        """Continue `prompt` by the likeliest tokens, or to the end of the text."""
        tokens = list(prompt)
        for _ in range(new_tokens):
            logits = self._run(np.asarray([tokens], dtype=np.int64))
            tokens.append(int(logits[0, -1].argmax()))
            if self._end is not None and tokens[-1] in np.atleast_1d(self._end):
                break
        return tokens[len(prompt) :]

    def accelerator_peak_bytes(self) -> int | None:
        """None: onnxruntime does not say what it holds on a GPU."""
        return None

    def _run(self, batch: NDArray[Any]) -> Any:
        return self._session.run([self._output], self._feed(batch))[0]

    def _feed(self, batch: NDArray[Any]) -> dict[str, NDArray[Any]]:
        if self._preprocessing is not None:
            return {self._pixels: pixel_values(batch, self._preprocessing)}
        known = {
            "input_ids": np.ascontiguousarray(batch),
            "attention_mask": np.ones_like(batch),
            "token_type_ids": np.zeros_like(batch),
            "position_ids": np.broadcast_to(np.arange(batch.shape[1]), batch.shape).copy(),
        }
        return {name: known[name] for name in self._inputs}


def _channels(shape: list[int | str | None]) -> int | None:
    """Of images, (batch, channels, height, width); None for tokens."""
    return shape[1] if len(shape) == 4 and isinstance(shape[1], int) else None


def _end_of_text(directory: Path) -> Any:
    """The token, or tokens, that end a text; None where there is no configuration to say so."""
    config = directory / "config.json"
    return json.loads(config.read_text()).get("eos_token_id") if config.is_file() else None
