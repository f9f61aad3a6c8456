"""A service of the demo's own, as `modelpress serve` starts it: an empty data directory, a free port on loopback."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from app.client import ClientError

_STOP_SECONDS = 30
_URL = re.compile(rb"http://\S+")


@contextmanager
def running_service(directory: Path) -> Iterator[str]:
    """The URL of a service that answers, until the block ends; then it and all it started are stopped, its data removed."""
    data = (directory / "service").absolute()
    data.mkdir(parents=True)
    log = directory / "service.log"
    with log.open("wb") as log_file:
        process = subprocess.Popen(
            [sys.executable, "-m", "app.cli", "serve", "--host", "127.0.0.1", "--port", "0"],
            env=_environment(data),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log_file,
            start_new_session=True,  # Ctrl-C reaches the demo alone, which then stops the service in order
        )
    try:
        yield _url(process, log)
    finally:
        _stop(process)
        with contextlib.suppress(FileNotFoundError):
            shutil.move(data / "worker.log", directory / "worker.log")
        shutil.rmtree(data, ignore_errors=True)


def _environment(data: Path) -> dict[str, str]:
    """Ours, without settings that would lead the demo to somebody's real database or broker."""
    ours = {k: v for k, v in os.environ.items() if not k.startswith("MODELPRESS_")}
    for name in ("DATABASE_URL", "REDIS_URL"):
        ours.pop(name, None)
    return ours | {"MODELPRESS_DATA_DIR": str(data)}


def _url(process: subprocess.Popen[bytes], log: Path) -> str:
    """The URL the service prints once it answers."""
    if process.stdout is not None:
        for line in process.stdout:
            found = _URL.search(line)
            if found:
                return found[0].decode()
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-5:])
    raise ClientError(f"The service did not start. The end of {log}:\n{tail}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Stop the service; a second Ctrl-C must not leave it running."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process.terminate()
        process.wait(timeout=_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    finally:
        if process.stdout is not None:
            process.stdout.close()
        signal.signal(signal.SIGINT, before)
