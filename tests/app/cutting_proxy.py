"""A TCP proxy before a real server that breaks its first connections after so many bytes, as networks do."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from urllib.parse import urlsplit


@dataclass
class CuttingProxy:
    """Forwards to `target`; connection n is cut once `cuts[n]` bytes went the given way, later ones not at all."""

    target: tuple[str, int]
    cuts: list[int]
    direction: str
    connections: int = 0
    listener: socket.socket = field(default_factory=lambda: socket.create_server(("127.0.0.1", 0)))
    sockets: list[socket.socket] = field(default_factory=list)
    pumps: list[threading.Thread] = field(default_factory=list)

    @property
    def url(self) -> str:
        """Where to connect."""
        return f"http://127.0.0.1:{self.listener.getsockname()[1]}"

    def serve(self) -> None:
        """Take connections until the listener is closed."""
        with suppress(OSError):
            while True:
                near, _ = self.listener.accept()
                limit = self.cuts[self.connections] if self.connections < len(self.cuts) else None
                self.connections += 1
                far = socket.create_connection(self.target)
                up, down = (limit, None) if self.direction == "up" else (None, limit)
                self.sockets += [near, far]
                for pair in ((near, far, up), (far, near, down)):
                    self.pumps.append(threading.Thread(target=_pump, args=pair))
                    self.pumps[-1].start()

    def close(self) -> None:
        """Cut everything that is left."""
        self.listener.shutdown(socket.SHUT_RDWR)
        _cut(*self.sockets)
        for pump in self.pumps:
            pump.join()
        for end in (self.listener, *self.sockets):
            end.close()


def _pump(source: socket.socket, sink: socket.socket, budget: int | None) -> None:
    with suppress(OSError):
        while chunk := source.recv(65536):
            sink.sendall(chunk if budget is None else chunk[:budget])
            if budget is not None:
                budget -= len(chunk)
                if budget <= 0:
                    break
    _cut(source, sink)


def _cut(*ends: socket.socket) -> None:
    for end in ends:
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


@contextmanager
def cutting_proxy(server_url: str, *cuts: int, direction: str) -> Iterator[CuttingProxy]:
    """A proxy before `server_url`; `direction` is `up` (requests) or `down` (answers)."""
    address = urlsplit(server_url)
    proxy = CuttingProxy((str(address.hostname), int(address.port or 0)), list(cuts), direction)
    thread = threading.Thread(target=proxy.serve)
    thread.start()
    yield proxy
    proxy.close()
    thread.join()
