"""Which sandbox this machine has: the strongest level that holds when it is tried, not one that ought to work."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from app.errors import Unavailable
from app.settings import GIB, SANDBOX_LEVELS, SandboxLevel, Settings
from workers import sandbox
from workers.confinement import bubblewrap, landlock, seccomp

_PROBE_SECONDS = 30
_PROBE_LIMITS = sandbox.Limits(
    threads=1, address_space_bytes=None, file_bytes=GIB, processor_seconds=_PROBE_SECONDS
)
# Run inside: writes where it may, then does what must fail. Ends with the name of the first thing that did not.
_PROBE = """
import os, socket, sys
secret, port = sys.argv[1], int(sys.argv[2])
open("tmp/written", "w").close()
def connect():
    socket.create_connection(("127.0.0.1", port), 1)
for what, attempt in {
    "a file outside can be read": lambda: open(secret).close(),
    "a file outside can be made": lambda: open(secret + "-made", "w").close(),
    "its inputs can be written": lambda: open("inputs", "a").close(),
    "the network can be reached": connect,
    "it can leave its process group": os.setsid,
}.items():
    try:
        attempt()
    except OSError:
        continue
    sys.exit(what)
"""


@dataclass(frozen=True)
class Found:
    """The level a worker runs jobs at, and why not at each stronger one."""

    level: SandboxLevel
    missing: dict[SandboxLevel, str]


def strongest(settings: Settings) -> Found:
    """Try the levels, strongest first. Raises Unavailable when only levels below the configured minimum hold."""
    missing: dict[SandboxLevel, str] = {}
    for level in SANDBOX_LEVELS[: SANDBOX_LEVELS.index(settings.sandbox) + 1]:
        why_not = None if level == "process" else probe(level, settings.data_dir.absolute())
        if why_not is None:
            return Found(level, missing)
        missing[level] = why_not
    raise Unavailable(
        f"This machine does not have the sandbox that MODELPRESS_SANDBOX={settings.sandbox} asks for: "
        + "; ".join(f"{level}: {why}" for level, why in missing.items())
        + ".",
        code="no_sandbox",
        hint="Install bubblewrap where user namespaces are allowed, use a kernel with Landlock (5.13 or later), or allow a weaker level.",
    )


def probe(level: SandboxLevel, directory: Path) -> str | None:
    """Why this machine does not have a level, None if it has. A process is started below `directory` and tries to get out."""
    if not seccomp.supported():
        return "the system calls of this processor are not known"
    if level == "landlock" and landlock.abi() == 0:
        return "the kernel has no Landlock, or it is switched off"
    if level == "namespaces" and shutil.which(bubblewrap.PROGRAM) is None:
        return "bubblewrap is not installed"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(prefix="sandbox-probe-", dir=directory) as outside,
            socket.create_server(("127.0.0.1", 0)) as listener,
        ):
            return _tried(level, Path(outside), listener.getsockname()[1])
    except (OSError, subprocess.SubprocessError) as error:
        return f"it cannot be set up ({error})"


def _tried(level: SandboxLevel, outside: Path, port: int) -> str | None:
    scratch, secret, log = outside / "job", outside / "secret", outside / "log"
    scratch.mkdir()
    for file in (secret, scratch / "inputs"):
        file.write_text("secret")
    command = [sys.executable, "-I", "-S", "-c", _PROBE, str(secret), str(port)]
    with log.open("ab") as pipe:
        inside = sandbox.Sandbox(level=level, scratch=scratch, limits=_PROBE_LIMITS)
        process = sandbox.spawn(command, inside, pipe=pipe.fileno(), log=log)
    code = sandbox.return_code(process, timeout_seconds=_PROBE_SECONDS)
    sandbox.kill_group(process, grace_seconds=0)
    said = " ".join(log.read_text(errors="replace").split())[-300:]
    return None if code == 0 else said or f"the process that tried it ended with code {code}"
