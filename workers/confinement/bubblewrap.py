"""bubblewrap: namespaces of its own for a process, with nothing mounted but what it needs.

https://github.com/containers/bubblewrap
"""

from __future__ import annotations

from pathlib import Path

from workers.confinement.access import Access

PROGRAM = "bwrap"
_OWN = ("user", "pid", "net", "ipc", "uts", "cgroup-try")


def arguments(access: Access, *, filter_descriptor: int, directory: Path) -> list[str]:
    """The command line to put in front of a command that is to run in `directory`."""
    line = [PROGRAM, *(f"--unshare-{name}" for name in _OWN), "--die-with-parent", "--cap-drop", "ALL"]
    line += ["--seccomp", str(filter_descriptor), "--proc", "/proc", "--dev", "/dev"]
    for path in _kernel_knobs():
        line += ["--ro-bind", str(path), str(path)]
    for path in access.devices:
        line += ["--dev-bind", str(path), str(path)]
    for path in access.readable:
        line += ["--ro-bind", str(path), str(path)]
    for path in access.writable:
        line += ["--bind", str(path), str(path)]
    # bubblewrap's own root and /dev are in memory that no limit counts.
    return [*line, "--remount-ro", "/dev", "--remount-ro", "/", "--chdir", str(directory), "--"]


def _kernel_knobs() -> list[Path]:
    """What of /proc belongs to no process and may be written to.

    A worker that runs as root is root to these files in any namespace, without a capability: /proc/sys/kernel/core_pattern
    would be a way out.
    """
    shared = (path for path in Path("/proc").iterdir() if not path.name.isdigit() and not path.is_symlink())
    return sorted(path for path in shared if path.is_dir() or path.stat().st_mode & 0o222)
