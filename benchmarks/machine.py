"""On what a figure was measured: kept with the figures, since they mean little without it."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def description() -> dict[str, str | float]:
    """The machine, what ran on it and how busy it was when the benchmark began."""
    return {
        "processor": _line("/proc/cpuinfo", "model name"),
        "cores": os.cpu_count() or 0,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": _version("torch"),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        # Above the number of cores, others were at work too, and times are not to be trusted.
        "load": round(os.getloadavg()[0], 2),
    }


def _line(file: str, name: str) -> str:
    lines = Path(file).read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "unknown")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _commit() -> str:
    """The commit the figures belong to; `+` where files differ from it."""
    root = Path(__file__).parent
    git = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--exclude=*"]
    done = subprocess.run(git, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
