"""What the process of a job may touch: its own scratch directory, a scrubbed environment, and bounded resources.

Levels, strongest first; each has all of those below it:

namespaces  bubblewrap: no network, no other process, no file but what is mounted for it; and the seccomp filter
landlock    Landlock: no file but those named; signals and TCP stay inside where the kernel can; and the seccomp filter
process     a session and process group of its own, no credentials in the environment, no capabilities, limits on memory, file size,
            open files, processes and processor time, first to be killed when memory is out, death with its supervisor
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from app.settings import SandboxLevel
from workers.confinement import bubblewrap, landlock, seccomp
from workers.confinement.access import job_access

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_CAPBSET_DROP, _PR_CAP_AMBIENT = 1, 4, 24, 47
_PR_CAP_AMBIENT_CLEAR_ALL = 4
_MAX_CAPABILITY = 63
_LIBC = ctypes.CDLL(None, use_errno=True)
_KEPT_VARIABLES = (
    "PATH",
    "LANG",
    "LC_ALL",
    "LD_LIBRARY_PATH",
    "CUDA_VISIBLE_DEVICES",
    "NVIDIA_VISIBLE_DEVICES",
)
_FIRST_TO_BE_KILLED = b"1000"
_BUBBLEWRAP_ADDS = 128
"""bubblewrap ends with this and the signal's number when a signal ended the command."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds of a job's process."""

    threads: int
    address_space_bytes: int | None
    """Per process; None on a GPU, where CUDA reserves far more address space than it uses."""
    file_bytes: int
    processor_seconds: int
    """Per process, of all its threads. The supervisor's clock comes first; this holds where the supervisor sleeps."""
    open_files: int = 4096
    processes: int = 8192
    """Of the user, threads included and other jobs' too; the kernel does not apply it to root."""


@dataclass(frozen=True, kw_only=True)
class Sandbox:
    """Where a command may run."""

    level: SandboxLevel
    scratch: Path
    """Its working directory, which it reads; it writes in a few directories there alone, see `access`."""
    limits: Limits
    gpu: bool = False


def spawn(command: Sequence[str], inside: Sandbox, *, pipe: int, log: Path) -> subprocess.Popen[bytes]:
    """Start a command inside the sandbox, as the leader of a new process group; `pipe` stays open in it.

    Raises OSError where this machine does not have the level.
    """
    scratch, limits = inside.scratch, inside.limits
    with log.open("ab") as output, _confined(command, inside) as (line, descriptors, confine):
        return subprocess.Popen(
            line,
            cwd=scratch,
            env=_environment(scratch, limits.threads),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=(pipe, *descriptors),
            start_new_session=True,
            preexec_fn=lambda: _between_fork_and_exec(limits, confine),  # noqa: PLW1509 - beside this thread there is that of traces at most
        )


@contextlib.contextmanager
def _confined(
    command: Sequence[str], inside: Sandbox
) -> Iterator[tuple[list[str], tuple[int, ...], Callable[[], None]]]:
    """The command line of a level, descriptors it needs, and what the new process does to itself before it."""
    access = job_access(inside.scratch, gpu=inside.gpu)
    if inside.level == "process":
        yield [*command], (), _drop_capabilities
    elif inside.level == "landlock":
        version = landlock.abi()
        ruleset = landlock.create_ruleset(access, version=version)
        instructions = seccomp.program()
        try:
            yield [*command], (), lambda: _give_up(ruleset, version, instructions)
        finally:
            os.close(ruleset)
    else:
        descriptor = os.memfd_create("seccomp")
        try:
            os.pwrite(descriptor, seccomp.program(), 0)
            line = bubblewrap.arguments(access, filter_descriptor=descriptor, directory=inside.scratch)
            yield [*line, *command], (descriptor,), lambda: None
        finally:
            os.close(descriptor)


def _give_up(ruleset: int, version: int, instructions: bytes) -> None:
    _drop_capabilities()
    seccomp.no_new_privileges()
    landlock.restrict_self(ruleset, version=version)
    seccomp.restrict_self(instructions)


def return_code(process: subprocess.Popen[bytes], *, timeout_seconds: float) -> int:
    """How a sandboxed command ended: its status, or minus the signal that killed it; -9 if it will not leave."""
    try:
        code = process.wait(timeout=timeout_seconds)
    except subprocess.TimeoutExpired:
        return -signal.SIGKILL
    return _BUBBLEWRAP_ADDS - code if code > _BUBBLEWRAP_ADDS else code


def hide_memory() -> None:
    """Keep this process's memory and environment, which hold credentials, from others of the same user."""
    _LIBC.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


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
        # Else torch looks the name up in /etc/passwd, which is not there.
        "USER": "modelpress",
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


def _between_fork_and_exec(limits: Limits, confine: Callable[[], None]) -> None:
    die_with_parent()
    # Where memory is hidden, see `hide_memory`, this file is root's.
    _LIBC.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)
    Path("/proc/self/oom_score_adj").write_bytes(_FIRST_TO_BE_KILLED)
    _LIBC.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    for what, value in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, limits.file_bytes),
        (resource.RLIMIT_NOFILE, limits.open_files),
        (resource.RLIMIT_NPROC, limits.processes),
        (resource.RLIMIT_CPU, limits.processor_seconds),
        (resource.RLIMIT_AS, limits.address_space_bytes),
    ):
        if value is not None:
            hard = resource.getrlimit(what)[1]
            bounded = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(what, (bounded, bounded))
    confine()


def _drop_capabilities() -> None:
    """Have none after the next exec, root or not: CAP_PERFMON opens every other's environment. bubblewrap does its own."""
    for capability in range(_MAX_CAPABILITY + 1):
        # Refused to one that has no capabilities to begin with, and for numbers that mean nothing yet.
        _LIBC.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)
    _LIBC.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
