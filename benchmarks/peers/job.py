"""What every peer's runner shares: the job it reads, the meter it runs under, and the dense weights it leaves.

Runs in the peer's own environment: imports the standard library, numpy, torch and transformers, nothing of Modelpress.
A runner is called twice, each time as a process of its own: `python NAME_run.py quantize JOB.json` writes an artifact
in the peer's own format, `python NAME_run.py export JOB.json` loads that artifact by the peer's own loader and writes
what its layers compute as plain float32 weights. The second is what gets evaluated: every method by one evaluator,
on what was written and reloaded, never on the model that was in memory.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Job:
    """One model to quantize in one way."""

    model: str
    """Directory of the original in Hugging Face layout."""
    windows: str
    """An .npz whose `windows` are calibration tokens: (windows, tokens), int64."""
    method: str
    bits: int
    group_size: int | None
    """Inputs that share a scale; None for one scale per output channel."""
    artifact: str
    """Directory for what the peer writes."""
    dense: str
    """Directory for the float32 weights that the artifact stands for."""
    report: str
    """File for seconds, memory and versions."""
    threads: int
    int8_activations: bool = False
    pattern: str | None = None
    """Where half of the weights are to be zero: `unstructured` or `2:4`."""
    windows_digest: str = ""
    """Of the calibration tokens: another run's result is reused only if it had the same."""
    options: dict[str, Any] = field(default_factory=dict)
    """Settings of the method, by the peer's own names."""

    def calibration(self) -> Tensor:
        """The calibration tokens: (windows, tokens), int64."""
        with np.load(self.windows, allow_pickle=False) as stored:
            return torch.from_numpy(stored["windows"])

    def original(self, dtype: torch.dtype | str) -> nn.Module:
        """The original, loaded by transformers. `auto` is the dtype it is stored in."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.model, dtype=dtype, local_files_only=True).eval()

    def tokenizer(self) -> Any:
        """The original's tokenizer."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.model, local_files_only=True)


class Meter:
    """Wall and processor seconds of named parts of a run, and the memory it took up to the end of the quantization."""

    def __init__(self) -> None:
        """Start with nothing measured."""
        self.parts: dict[str, dict[str, float]] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Measure what runs inside. `peak_rss_bytes` is VmHWM, which never falls: that of the process up to here."""
        wall, processor = time.perf_counter(), _processor_seconds()
        yield
        self.parts[name] = {
            "seconds": time.perf_counter() - wall,
            "processor_seconds": _processor_seconds() - processor,
            "peak_rss_bytes": _peak_rss_bytes(),
        }
        if torch.cuda.is_available():
            self.parts[name]["peak_gpu_bytes"] = torch.cuda.max_memory_reserved()


def main(
    quantize: Callable[[Job, Meter], None],
    dense_weights: Callable[[Job], dict[str, Tensor]],
    packages: list[str],
) -> None:
    """The command line of a runner."""
    parser = argparse.ArgumentParser()
    parser.add_argument("do", choices=("quantize", "export"))
    parser.add_argument("job", type=Path)
    arguments = parser.parse_args()
    job = Job(**json.loads(arguments.job.read_text()))
    torch.set_num_threads(job.threads)
    if arguments.do == "export":
        write_dense(job, dense_weights(job))
        return
    meter = Meter()
    quantize(job, meter)
    report = {
        "parts": meter.parts,
        "versions": {name: version(name) for name in (*packages, "torch", "transformers")},
    }
    Path(job.report).write_text(json.dumps(report, indent=1))


@torch.no_grad()
def write_dense(job: Job, weights: dict[str, Tensor]) -> None:
    """Write the original in float32 with these weights in place of its own; each must be one of its parameters."""
    model = job.original(torch.float32)
    for name, weight in weights.items():
        model.get_parameter(name).copy_(weight)
    if hasattr(model.config, "quantization_config"):
        raise ValueError("the original is quantized already")
    model.save_pretrained(job.dense)
    job.tokenizer().save_pretrained(job.dense)


def block_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers inside blocks, by name: all but the head."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in f".{name}"
    }


@torch.no_grad()
def computed_weight(layer: nn.Module, inputs: int) -> Tensor:
    """The weight by which a layer without bias really multiplies, from its forward on unit vectors: (outputs, inputs).

    Exact in float32, as each output is one product by one and a sum of zeros.
    """
    return layer(torch.eye(inputs)).T


def _processor_seconds() -> float:
    """User and system time of this process and the children it has waited for."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _peak_rss_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
