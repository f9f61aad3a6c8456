"""Child process that loads one model directory and answers commands about it: all it knows are the exported files.

`python -m workers.engine.measure.runner DIRECTORY --threads N --device cpu`. One JSON object per line on stdin, one on
stdout: `{"ok": …}` or `{"error": …}`. Its own process, so that its high-water mark is the model's and nobody else's.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TextIO

import numpy as np
from numpy.typing import NDArray

from workers.engine.measure.inputs import Inputs, load_inputs
from workers.engine.measure.results import RunnerFacts

_PR_SET_PDEATHSIG = 1


class Runner(Protocol):
    """What a runtime can do with a loaded model."""

    facts: RunnerFacts

    def outputs(self, window: NDArray[Any]) -> NDArray[np.float32]:
        """Outputs of one window, or of a batch of images: (rows, columns)."""

    def time_forward(self, batch: NDArray[Any], *, last_only: bool) -> float:
        """Milliseconds of one pass."""

    def time_decode(self, prompt: NDArray[np.int64]) -> float:
        """Milliseconds of one more token."""

    def generate(self, prompt: list[int], *, new_tokens: int) -> list[int]:
        """Tokens that follow a prompt."""

    def accelerator_peak_bytes(self) -> int | None:
        """Most memory held on a GPU."""


def load(directory: Path, *, device: str, threads: int) -> Runner:
    """Load a directory in the runtime its files are for."""
    if (directory / "model.onnx").is_file():
        from workers.engine.measure.runner_onnx import OnnxRunner

        return OnnxRunner(directory, device=device, threads=threads)
    from workers.engine.measure.runner_torch import TorchRunner

    return TorchRunner(directory, device=device, threads=threads)


def high_water_mark() -> int:
    """Most resident memory this process ever had, in bytes (VmHWM)."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


class Commands:
    """The commands a parent may send, each answered by a value that JSON can carry."""

    def __init__(self, runner: Runner) -> None:
        """Answer for one loaded model."""
        self._runner = runner
        self._windows: dict[str, Inputs] = {}

    def answer(self, do: str, **arguments: Any) -> Any:
        """Carry out one command by its name. Raises ValueError for a name that is none."""
        known: dict[str, Callable[..., Any]] = {
            "outputs": self._outputs,
            "forward_ms": self._forward_ms,
            "images_ms": self._images_ms,
            "decode_ms": self._decode_ms,
            "generate": self._runner.generate,
            "peak_memory": self._peak_memory,
        }
        if do not in known:
            raise ValueError(f"no command {do!r}")
        return known[do](**arguments)

    def _outputs(self, windows_file: str, index: int, target: str) -> dict[str, Any]:
        outputs = self._runner.outputs(self._window(windows_file, index))
        # Written, not mapped: mapped pages would count as this model's memory.
        outputs.tofile(target)
        return {"shape": list(outputs.shape), "finite": bool(np.isfinite(outputs).all())}

    def _forward_ms(self, tokens: list[int], batch: int, *, last_only: bool) -> float:
        return self._runner.time_forward(
            np.tile(np.asarray(tokens, np.int64), (batch, 1)), last_only=last_only
        )

    def _images_ms(self, images_file: str, batch: int) -> float:
        first = self._window(images_file, 0)[:1]
        return self._runner.time_forward(np.repeat(first, batch, axis=0), last_only=False)

    def _decode_ms(self, tokens: list[int]) -> float:
        return self._runner.time_decode(np.asarray(tokens, np.int64))

    def _peak_memory(self) -> int:
        on_accelerator = self._runner.accelerator_peak_bytes()
        return high_water_mark() if on_accelerator is None else on_accelerator

    def _window(self, windows_file: str, index: int) -> NDArray[Any]:
        if windows_file not in self._windows:
            self._windows[windows_file] = load_inputs(Path(windows_file))
        return self._windows[windows_file][index]


def serve(directory: Path, commands: TextIO, answers: TextIO, *, device: str, threads: int) -> int:
    """Load the model, say what it is, then answer until stdin ends. Returns the process's exit status."""
    try:
        runner = load(directory, device=device, threads=threads)
    except Exception as error:  # noqa: BLE001 - whatever a loader raises is the parent's to judge
        _write(answers, {"error": _describe(error)})
        return 1
    _write(answers, {"ok": runner.facts.model_dump(mode="json")})
    known = Commands(runner)
    for line in commands:
        try:
            _write(answers, {"ok": known.answer(**json.loads(line))})
        except Exception as error:  # noqa: BLE001 - the same
            _write(answers, {"error": _describe(error)})
    return 0


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:4000]


def _write(answers: TextIO, message: dict[str, Any]) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


def _die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies: nobody would read an answer, and loading can take minutes."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def main() -> int:
    """Parse the command line, and keep stdout for answers: what libraries print goes to stderr."""
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    warnings.simplefilter("ignore")
    _die_with_parent()
    return serve(arguments.directory, sys.stdin, answers, device=arguments.device, threads=arguments.threads)


if __name__ == "__main__":
    sys.exit(main())
