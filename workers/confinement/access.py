"""Which files a job's process needs: what it runs on, its job, and a GPU where it has one. All else is hidden or refused."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import app
import workers

# The loader's cache is in /etc, and Debian's libblas is a link through /etc/alternatives.
_SYSTEM = (
    "/usr",
    "/lib",
    "/lib64",
    "/lib32",
    "/bin",
    "/sbin",
    "/etc/ld.so.cache",
    "/etc/alternatives",
    "/sys",
)
NULL_DEVICES = tuple(Path("/dev") / name for name in ("null", "zero", "full", "random", "urandom"))
WRITABLE_IN_SCRATCH = ("stages", "journal", "tmp")


@dataclass(frozen=True, kw_only=True)
class Access:
    """Files and directories with all below them, by what may be done to them. Each of them exists."""

    readable: tuple[Path, ...]
    writable: tuple[Path, ...]
    devices: tuple[Path, ...] = ()


def job_access(scratch: Path, *, gpu: bool) -> Access:
    """What a job may touch: of its scratch directory it reads all, and writes what is made here if it is not there."""
    writable = tuple(scratch / name for name in WRITABLE_IN_SCRATCH)
    for directory in writable:
        directory.mkdir(parents=True, exist_ok=True)
    return Access(
        readable=(*_existing([*_SYSTEM, *_python(), *_libraries()]), scratch),
        writable=writable,
        devices=tuple(sorted(Path("/dev").glob("nvidia*"))) if gpu else (),
    )


def _python() -> Iterable[str]:
    """The interpreter, what is installed for it, and our own packages. Never `sys.path`: it may name any directory."""
    real = Path(sys.executable).resolve().parents[1]
    ours = (str(Path(package.__path__[0]).resolve()) for package in (app, workers))
    return (sys.prefix, sys.base_prefix, str(real), *ours)


def _libraries() -> list[str]:
    return [path for path in os.environ.get("LD_LIBRARY_PATH", "").split(":") if path.startswith("/")]


def _existing(paths: Iterable[str]) -> list[Path]:
    # /lib before /lib/x: a directory is mounted before what lies in it.
    return sorted({Path(path) for path in paths if path != "/" and Path(path).exists()})
