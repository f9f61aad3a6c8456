"""What a worker has, found out without torch."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import structlog

from app.settings import Settings

_GPU_SECONDS = 20.0
_log = structlog.get_logger(__name__)


def describe(settings: Settings) -> dict[str, Any]:
    """Processor, threads, memory in bytes, and GPUs by name."""
    return {
        "processor": _processor(),
        "threads": settings.worker_threads,
        "memory_bytes": settings.worker_memory_bytes,
        "gpus": gpus(),
    }


def gpus() -> list[str]:
    """Names of the NVIDIA GPUs this worker can see."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=_GPU_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        # It hangs when a GPU has fallen off the bus: a worker without one is still a worker.
        _log.warning("gpus_unknown", error=str(error))
        return []
    return (
        [line.strip() for line in answer.stdout.splitlines() if line.strip()]
        if answer.returncode == 0
        else []
    )


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()
