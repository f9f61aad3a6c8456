"""Run a method of a peer or a setting of ours on a model, each in a process of its own, and judge what it wrote."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from app.spec.facts import ModelFacts

from .catalogue import Case, OurSetting, PeerMethod
from .environments import python_of
from .evaluator import Original, Quality, evaluate

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Subject:
    """A model, the texts for it as windows, and where what is made of it goes."""

    name: str
    model: Path
    facts: ModelFacts
    group_size: int
    calibration_text: Path
    calibration_windows: Path
    windows_digest: str
    original: Original
    work: Path
    cache: Path
    threads: int


@dataclass(frozen=True)
class Outcome:
    """What one method did to one model."""

    name: str
    version: str
    seconds: float
    """Of the quantization: for a peer without loading and saving, for ours with both."""
    processor_seconds: float
    peak_rss_bytes: int
    bits_per_weight: float
    """Of the linear layers inside blocks: all that is stored for them, over their weights."""
    quality: Quality
    reused: bool = False


def run_ours(subject: Subject, case: Case, setting: OurSetting) -> Outcome:
    """Quantize by a setting of ours."""
    work = _emptied(subject.work / case.title(subject.group_size) / f"ours-{setting.name}")
    job = {
        "model": str(subject.model),
        "steps": setting.for_case(case, subject.group_size),
        "calibration_text": str(subject.calibration_text),
        "artifact": str(work / "artifact"),
        "report": str(work / "report.json"),
        "threads": subject.threads,
    }
    (work / "job.json").write_text(json.dumps(job, indent=1))
    _run(
        [sys.executable, str(HERE / "ours_run.py"), str(work / "job.json")], work / "log.txt", subject.threads
    )
    quality = evaluate(work / "artifact", subject.original, int8_activations=case.int8_activations)
    quality.write(work / "quality.json")
    return _outcome(subject, work, f"ours-{setting.name}", package="torch")


def run_peer(subject: Subject, case: Case, method: PeerMethod, *, reuse: bool) -> Outcome:
    """Quantize by a method of a peer, or take what an earlier run of the very same job left if `reuse` says so."""
    work = subject.work / case.title(subject.group_size) / method.name
    job = {
        "model": str(subject.model),
        "windows": str(subject.calibration_windows),
        "method": method.method,
        "bits": case.bits,
        "group_size": subject.group_size if case.grouped else None,
        "artifact": str(work / "artifact"),
        "dense": str(work / "dense"),
        "report": str(work / "report.json"),
        "threads": subject.threads,
        "int8_activations": case.int8_activations,
        "pattern": case.pattern,
        "windows_digest": subject.windows_digest,
        "options": method.options,
    }
    reused = reuse and _did(work, job)
    if not reused:
        _emptied(work)
        (work / "job.json").write_text(json.dumps(job, indent=1))
        _run_peer(subject, method, work, "quantize")
    if not (reused and _judged(work, subject)):
        _run_peer(subject, method, work, "export")
        quality = evaluate(work / "dense", subject.original, int8_activations=case.int8_activations)
        quality.write(work / "quality.json")
        # Several times the artifact's size, and made again from it in seconds.
        shutil.rmtree(work / "dense")
    return _outcome(subject, work, method.name, package=_PACKAGES[method.peer], reused=reused)


_PACKAGES = {
    "llmcompressor": "llmcompressor",
    "autoround": "auto-round",
    "nncf": "nncf",
    "torchao": "torchao",
}


def _did(work: Path, job: dict[str, Any]) -> bool:
    """Whether this very job has been done before."""
    files = work / "job.json", work / "report.json"
    return all(file.is_file() for file in files) and json.loads(files[0].read_text()) == job


def _judged(work: Path, subject: Subject) -> bool:
    path = work / "quality.json"
    return path.is_file() and Quality.read(path).windows == subject.original.digest


def _run_peer(subject: Subject, method: PeerMethod, work: Path, do: str) -> None:
    python = python_of(method.peer, subject.cache)
    command = [str(python), str(HERE / f"{method.peer}_run.py"), do, str(work / "job.json")]
    _run(command, work / f"{do}-log.txt", subject.threads)


def _run(command: list[str], log: Path, threads: int) -> None:
    """Run a command to its end, its output into a file. Raises SystemExit with the end of it when the command fails."""
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        # Threads that spin while they wait take the core that another process needs.
        "OMP_WAIT_POLICY": "PASSIVE",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    with log.open("w") as output:
        done = subprocess.run(command, env=environment, stdout=output, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise PeerFailed(f"{' '.join(command)}: status {done.returncode}\n{log.read_text()[-2000:]}")


class PeerFailed(Exception):  # noqa: N818 - named by what has happened
    """A run ended with an error; its output is the message."""


def _outcome(subject: Subject, work: Path, name: str, *, package: str, reused: bool = False) -> Outcome:
    """Put together what was measured, and keep it for the tables (table.py)."""
    report = json.loads((work / "report.json").read_text())
    quantization = report["parts"]["quantize"]
    outcome = Outcome(
        name=name,
        version=report["versions"][package],
        seconds=quantization["seconds"],
        processor_seconds=quantization["processor_seconds"],
        peak_rss_bytes=quantization["peak_rss_bytes"],
        bits_per_weight=_bits_per_weight(work / "artifact", subject.facts),
        quality=Quality.read(work / "quality.json"),
        reused=reused,
    )
    (work / "outcome.json").write_text(json.dumps(asdict(outcome), indent=1))
    return outcome


def _bits_per_weight(artifact: Path, facts: ModelFacts) -> float:
    """Bits stored for the linear layers inside blocks, scales included, over the weights of these layers."""
    stored = 0
    for file in artifact.glob("*.safetensors"):
        with safe_open(file, "np") as tensors:
            names = [name for name in tensors.keys() if ".layers" in name or ":layers" in name]  # noqa: SIM118
            stored += sum(_nbytes(tensors.get_slice(name)) for name in names if "norm" not in name)
    weights = sum(fact.elements for fact in facts.tensors if "_proj" in fact.name)
    return 8 * stored / weights


def _nbytes(entry: Any) -> int:
    elements = 1
    for length in entry.get_shape():
        elements *= length
    return elements * _BYTES[entry.get_dtype()]


_BYTES = {
    "F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "U8": 1, "I8": 1, "BOOL": 1,
}  # fmt: skip


def _emptied(directory: Path) -> Path:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    return directory
