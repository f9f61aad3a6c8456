"""Talk to the child process that runs a model (runner.py), and end it whatever happens."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryFile
from types import TracebackType
from typing import IO, Any, Literal, NoReturn, Self

import numpy as np
from numpy.typing import NDArray

import workers
from app.errors import JobFailed, OutOfMemory, VerificationFailed
from workers.engine.measure.results import RunnerFacts

_ENVIRONMENT = {
    # Threads that spin at a barrier take the core that the work waits for: where anything else runs on the machine,
    # a forward pass took 8.6 s so, and 2.1 s with sleeping threads.
    "OMP_WAIT_POLICY": "PASSIVE",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


class RunnerClient:
    """One model alive in a process of its own; use it in a `with`, which starts and kills the process.

    Failures are the model's: JobFailed (`original_is_broken`) for the original, VerificationFailed for the result,
    OutOfMemory for either when the kernel killed it.
    """

    def __init__(
        self,
        directory: Path,
        *,
        role: Literal["original", "result"],
        device: str = "cpu",
        threads: int = 1,
        timeout_seconds: float = 3600,
    ) -> None:
        """Name the model; nothing is started before `with`, nothing is loaded before `ready`."""
        self._directory = directory
        self._role = role
        self._timeout = timeout_seconds
        self._command = [
            *(sys.executable, "-m", "workers.engine.measure.runner", str(directory.resolve())),
            *("--threads", str(threads), "--device", device),
        ]
        self._environment = (
            os.environ | _ENVIRONMENT | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": _python_path()}
        )

    def __enter__(self) -> Self:
        """Start the process; it loads its model while the caller does something else."""
        self._stderr: IO[bytes] = TemporaryFile()
        self._unread = b""
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=self._environment,
            bufsize=0,
        )
        self._stdin, self._stdout = _descriptor(self._process.stdin), _descriptor(self._process.stdout)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Kill the process; it has nothing to save."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._stderr):
            if stream is not None:
                stream.close()

    def ready(self) -> RunnerFacts:
        """Wait until the model is loaded."""
        return RunnerFacts.model_validate(self._answer())

    def outputs(self, windows_file: Path, index: int, target: Path) -> tuple[NDArray[np.float32], bool]:
        """Outputs of one window, mapped from `target` (rows, columns), and whether all of them are finite."""
        made = self._ask("outputs", windows_file=str(windows_file), index=index, target=str(target))
        return np.memmap(target, dtype=np.float32, mode="r+", shape=tuple(made["shape"])), made["finite"]

    def forward_ms(self, tokens: list[int], *, batch: int, last_only: bool) -> float:
        """Milliseconds of one forward pass over `batch` copies of `tokens`."""
        return float(self._ask("forward_ms", tokens=tokens, batch=batch, last_only=last_only))

    def images_ms(self, images_file: Path, *, batch: int) -> float:
        """Milliseconds of one forward pass over `batch` copies of the first image."""
        return float(self._ask("images_ms", images_file=str(images_file), batch=batch))

    def decode_ms(self, tokens: list[int]) -> float:
        """Milliseconds of decoding one token after `tokens`, with their keys and values cached."""
        return float(self._ask("decode_ms", tokens=tokens))

    def generate(self, prompt: list[int], *, new_tokens: int) -> list[int]:
        """The likeliest tokens after `prompt`."""
        return [int(token) for token in self._ask("generate", prompt=prompt, new_tokens=new_tokens)]

    def peak_memory(self) -> int:
        """Bytes of memory the process has held at most: resident, or on the GPU it runs on."""
        return int(self._ask("peak_memory"))

    def _ask(self, do: str, **arguments: Any) -> Any:
        line = json.dumps({"do": do} | arguments) + "\n"
        try:
            os.write(self._stdin, line.encode())
        except BrokenPipeError:
            self._raise_death()
        return self._answer()

    def _answer(self) -> Any:
        answer = json.loads(self._read_line())
        if "error" in answer:
            self._fail(answer["error"])
        return answer["ok"]

    def _read_line(self) -> bytes:
        deadline = time.monotonic() + self._timeout
        while b"\n" not in self._unread:
            remaining = deadline - time.monotonic()
            if remaining <= 0 or not select.select([self._stdout], [], [], remaining)[0]:
                self._fail(f"no answer within {self._timeout:.0f} s")
            received = os.read(self._stdout, 65536)
            if not received:
                self._raise_death()
            self._unread += received
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _raise_death(self) -> NoReturn:
        status = self._process.wait()
        if status == -9:
            raise OutOfMemory(
                f"The process that ran the {self._role} model was killed.",
                hint="It most likely ran out of memory: use a worker with more, or set evaluation.enabled to false.",
            )
        self._stderr.seek(0)
        tail = self._stderr.read().decode(errors="replace").strip().splitlines()[-5:]
        self._fail(f"its process ended with status {status}. " + " | ".join(tail))

    def _fail(self, why: str) -> NoReturn:
        if self._role == "original":
            raise JobFailed(
                f"The original model does not run: {why}",
                code="original_is_broken",
                hint="Load and run the model with transformers where you got it, mend it, and upload it again.",
            )
        raise VerificationFailed(
            f"The exported model does not run by itself: {why}",
            hint="This is a defect of the export, not of your model: report it with the job's id.",
        )


def _descriptor(pipe: IO[bytes] | None) -> int:
    if pipe is None:
        raise ValueError("the process was started without this pipe")
    return pipe.fileno()


def _python_path() -> str:
    """Where the child finds this very code, whatever directory the parent was started in."""
    here = str(Path(workers.__file__).resolve().parents[1])
    return os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
