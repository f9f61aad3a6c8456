"""HTTP to addresses that users name: never to anything but the open internet, unless an administrator allows a network.

A name is resolved once, every address it has is checked, and the connection goes to an address that was checked: a name that
changes its mind in between leads nowhere else. Redirects are not followed; answers have limits of size and of time.

`post` is for short answers, which are read whole; `get` hands on what comes, for as long as enough of it comes.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import httpcore

from app.addresses import Network, Refused, Unanswered, check_url, open_addresses

_CONNECT_SECONDS = 5.0
_STEP_BYTES = 2**20
_BEAT_SECONDS = 1.0


@dataclass(frozen=True)
class Answer:
    """The status, and as much of the body as was asked for."""

    status: int
    body: bytes


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What a call may take."""

    seconds: float
    """For all of it, from resolving the name to the last byte."""
    answer_bytes: int
    """Of the body; the rest is not read."""
    allowed: Sequence[Network] = ()
    """Networks beyond the open internet that an administrator allows."""


@dataclass(frozen=True)
class Incoming:
    """An answer whose body is still on its way. Names of headers are in lower case."""

    status: int
    headers: Mapping[str, str]
    chunks: Iterator[bytes]


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long a download may take, and what is done meanwhile."""

    seconds: float
    """For all of it."""
    idle_seconds: float
    """For the headers, and again for each MiB: who drips is as good as silent."""
    allowed: Sequence[Network] = ()
    """As of Bounds."""
    beat: Callable[[], None] = lambda: None
    """Called at least every other second while bytes are waited for. What it raises ends the download."""


def post(url: str, body: bytes, headers: Mapping[str, str], bounds: Bounds) -> Answer:
    """POST a body. Raises Refused and Unanswered; a status of any kind is an answer."""
    deadline = _Deadline(bounds.seconds, "the time for the whole call is up")
    with _stream("POST", url, headers, body, _CheckedBackend(bounds.allowed, deadline)) as response:
        read = bytearray()
        for chunk in _chunks(response):
            read += chunk
            if len(read) >= bounds.answer_bytes:
                break
        return Answer(response.status, bytes(read[: bounds.answer_bytes]))


@contextmanager
def get(url: str, headers: Mapping[str, str], patience: Patience) -> Iterator[Incoming]:
    """GET a file, however long. Raises Refused and Unanswered, and so do the chunks; a status of any kind is an answer."""
    end = time.monotonic() + patience.seconds
    words = f"less than {_STEP_BYTES} bytes came within {patience.idle_seconds:g} seconds"
    deadline = _Deadline(min(patience.seconds, patience.idle_seconds), words, patience.beat)
    with _stream("GET", url, headers, b"", _CheckedBackend(patience.allowed, deadline)) as response:
        named = {name.decode("latin-1").lower(): v.decode("latin-1") for name, v in response.headers}
        yield Incoming(response.status, named, _paced(response, deadline, patience.idle_seconds, end))


class _Deadline:
    """When a call ends that is waited for."""

    def __init__(self, seconds: float, words: str, beat: Callable[[], None] = lambda: None) -> None:
        self.at = time.monotonic() + seconds
        self.beat = beat
        self._words = words

    def left(self, timeout: float | None) -> float:
        """Seconds until then, or the timeout where that is shorter. Raises ReadTimeout where it is over."""
        left = self.at - time.monotonic()
        if left <= 0:
            raise httpcore.ReadTimeout(self._words)
        return left if timeout is None else min(timeout, left)


@contextmanager
def _stream(
    method: str, url: str, headers: Mapping[str, str], body: bytes, backend: _CheckedBackend
) -> Iterator[httpcore.Response]:
    check_url(url)
    # Reads and writes have their time from the backend.
    options = {"timeout": {"connect": _CONNECT_SECONDS}}
    with httpcore.ConnectionPool(network_backend=backend) as pool, ExitStack() as stack:
        with _translated():
            call = pool.stream(method, url, headers=list(headers.items()), content=body, extensions=options)
            response = stack.enter_context(call)
        yield response


def _chunks(response: httpcore.Response) -> Iterator[bytes]:
    with _translated():
        yield from response.iter_stream()


def _paced(response: httpcore.Response, deadline: _Deadline, idle: float, end: float) -> Iterator[bytes]:
    """The body; each further step of it puts the deadline off, up to the end of all time."""
    came = 0
    for chunk in _chunks(response):
        came += len(chunk)
        handed_on = time.monotonic()
        yield chunk
        now = time.monotonic()
        # While we are busy with what came, nobody waits for the other side.
        deadline.at = min(end, deadline.at + now - handed_on)
        if came >= _STEP_BYTES:
            came, deadline.at = 0, min(end, now + idle)


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException, OSError) as error:
        # The pool of connections raises it "from None".
        if isinstance(error.__context__, ssl.SSLCertVerificationError):
            raise Refused(f"Its certificate is not trusted: {error.__context__.verify_message}.") from error
        raise Unanswered(
            f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        ) from error


class _CheckedBackend(httpcore.NetworkBackend):
    """Connects to checked addresses alone, until a deadline."""

    def __init__(self, allowed: Sequence[Network], deadline: _Deadline) -> None:
        self._allowed, self._deadline = allowed, deadline
        self._plain = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        """A connection to the first of the addresses of a name, all of which must be open."""
        addresses = open_addresses(host, port, self._allowed)
        stream = self._plain.connect_tcp(
            str(addresses[0]), port, self._deadline.left(timeout), local_address, socket_options
        )
        return _TimedStream(stream, self._deadline)

    def connect_unix_socket(self, path: str, *_: Any, **__: Any) -> httpcore.NetworkStream:
        """Never."""
        raise Refused(f"{path} is a unix socket.")


class _TimedStream(httpcore.NetworkStream):
    """A connection that ends at a deadline, however slowly the other side drips."""

    def __init__(self, stream: httpcore.NetworkStream, deadline: _Deadline) -> None:
        self._stream, self._deadline = stream, deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """What has come."""
        while True:
            self._deadline.beat()
            try:
                return self._stream.read(max_bytes, self._deadline.left(timeout or _BEAT_SECONDS))
            except httpcore.ReadTimeout:
                self._deadline.left(None)

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Send all of it."""
        self._stream.write(buffer, self._deadline.left(timeout))

    def close(self) -> None:
        """Close the connection."""
        self._stream.close()

    def start_tls(
        self, ssl_context: Any, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        """The same under TLS; the certificate must be the name's, not the address's."""
        secured = self._stream.start_tls(ssl_context, server_hostname, self._deadline.left(timeout))
        return _TimedStream(secured, self._deadline)

    def get_extra_info(self, info: str) -> Any:
        """What the connection knows of itself."""
        return self._stream.get_extra_info(info)
