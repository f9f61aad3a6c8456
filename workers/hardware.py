"""What a worker has, found out without torch."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

from app.settings import Settings


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
    answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
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
