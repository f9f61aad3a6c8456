"""What the process of a job may touch: its own scratch directory, a scrubbed environment, and bounded resources.

Level `process` is what this module gives: a session and process group of its own, no credentials in the environment,
limits on memory, file size, files and core dumps, and death with its supervisor. It does not yet hide the file system
or the network; `/health/ready` says so by naming the level. Namespaces and Landlock will be further levels here.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

LEVEL = "process"

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)
_KEPT_VARIABLES = (
    "PATH",
    "LANG",
    "LC_ALL",
    "LD_LIBRARY_PATH",
    "CUDA_VISIBLE_DEVICES",
    "NVIDIA_VISIBLE_DEVICES",
)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds of a job's process."""

    threads: int
    address_space_bytes: int | None
    """Per process; None on a GPU, where CUDA reserves far more address space than it uses."""
    file_bytes: int
    open_files: int = 4096


def spawn(
    command: Sequence[str], *, scratch: Path, limits: Limits, pipe: int, log: Path
) -> subprocess.Popen[bytes]:
    """Start a command inside the sandbox, as the leader of a new process group; `pipe` stays open in it."""
    scratch.joinpath("tmp").mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            cwd=scratch,
            env=_environment(scratch, limits.threads),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=(pipe,),
            start_new_session=True,
            preexec_fn=lambda: _confine(limits),  # noqa: PLW1509 - a prefork worker has one thread here
        )


def die_with_parent() -> None:
    """Have the kernel kill this process when the thread that started it ends, however that happens."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def kill_group(process: subprocess.Popen[bytes], *, grace_seconds: float) -> None:
    """End a process and all it started: ask, wait, then force. Returns when the leader is gone."""
    _signal_group(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=grace_seconds)
    # The leader may be gone and a child of it not: the group is killed in any case.
    _signal_group(process.pid, signal.SIGKILL)
    process.wait()


def resident_bytes(group: int) -> int:
    """Anonymous and shared memory of a process group: what counts against a budget; mapped files do not."""
    total = 0
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        try:
            if os.getpgid(int(entry.name)) == group:
                total += _anonymous_bytes(Path(entry.path, "status").read_text())
        except (ProcessLookupError, FileNotFoundError, PermissionError):
            continue
    return total


def _anonymous_bytes(status: str) -> int:
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return sum(int(fields.get(name, "0 kB").split()[0]) * 1024 for name in ("RssAnon", "RssShmem"))


def _signal_group(group: int, number: signal.Signals) -> None:
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return


def _environment(scratch: Path, threads: int) -> dict[str, str]:
    kept = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    return kept | {
        "HOME": str(scratch / "tmp"),
        "TMPDIR": str(scratch / "tmp"),
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        # A thread that spins while it waits takes the core from another job, or from a runner beside it.
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
    }


def _confine(limits: Limits) -> None:
    """Runs between fork and exec."""
    die_with_parent()
    for what, value in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, limits.file_bytes),
        (resource.RLIMIT_NOFILE, limits.open_files),
        (resource.RLIMIT_AS, limits.address_space_bytes),
    ):
        if value is not None:
            hard = resource.getrlimit(what)[1]
            bounded = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(what, (bounded, bounded))
