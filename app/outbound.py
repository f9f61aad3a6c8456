"""HTTP to addresses that users name: never to anything but the open internet, unless an administrator allows a network.

A name is resolved once, every address it has is checked, and the connection goes to an address that was checked: a name that
changes its mind in between leads nowhere else. Redirects are not followed; answers have limits of size and of time.
"""

from __future__ import annotations

import ipaddress
import re
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpcore

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_CONNECT_SECONDS = 5.0
_PRINTABLE = re.compile(r"[!-~]+")
_SIXTOFOUR, _NAT64 = ipaddress.ip_network("2002::/16"), ipaddress.ip_network("64:ff9b::/96")


class Refused(Exception):  # noqa: N818 - an outcome, not a failure of ours
    """The address is one we do not connect to; the text says why and what to do."""


class Unanswered(Exception):  # noqa: N818
    """No whole answer came, for a reason that may pass."""


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


def check_url(url: str) -> None:
    """Raise Refused unless it is an http or https URL with a host, and without credentials."""
    if not _PRINTABLE.fullmatch(url):
        raise Refused(
            "It must be of printable ASCII: write other characters as %XX, and names of hosts as xn--."
        )
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise Refused("It is no URL: its host or its port cannot be read.") from None
    if parts.scheme not in ("https", "http") or not parts.hostname or port == 0:
        raise Refused("It must be an absolute http:// or https:// URL.")
    if parts.username is not None or parts.password is not None:
        raise Refused("It must not hold a user name or a password.")


def check_address(url: str, allowed: Sequence[Network]) -> None:
    """Raise Refused for a URL that would not be called today, Unanswered for a name that has no address."""
    check_url(url)
    parts = urlsplit(url)
    _open_addresses(str(parts.hostname), parts.port or 443, allowed)


def post(url: str, body: bytes, headers: Mapping[str, str], bounds: Bounds) -> Answer:
    """POST a body. Raises Refused and Unanswered; a status of any kind is an answer."""
    with _stream("POST", url, headers, body, bounds) as response:
        read = bytearray()
        for chunk in response.iter_stream():
            read += chunk
            if len(read) >= bounds.answer_bytes:
                break
        return Answer(response.status, bytes(read[: bounds.answer_bytes]))


def address_is_open(address: Address, allowed: Iterable[Network]) -> bool:
    """Whether we may connect there: on the open internet, or allowed. An IPv4 address in IPv6 clothes counts as itself."""
    if any(address in network for network in allowed if network.version == address.version):
        return True
    inner = _inner(address)
    if inner is not None:
        return address_is_open(inner, allowed)
    # is_global is true for multicast addresses of global scope.
    return address.is_global and not address.is_multicast


def _inner(address: Address) -> Address | None:
    """The IPv4 address that an IPv6 one leads to, where it does."""
    if isinstance(address, ipaddress.IPv4Address):
        return None
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.sixtofour if address in _SIXTOFOUR else None


@contextmanager
def _stream(
    method: str, url: str, headers: Mapping[str, str], body: bytes, bounds: Bounds
) -> Iterator[httpcore.Response]:
    check_url(url)
    backend = _CheckedBackend(bounds.allowed, time.monotonic() + bounds.seconds)
    timeouts = {"connect": _CONNECT_SECONDS, "read": bounds.seconds, "write": bounds.seconds}
    with httpcore.ConnectionPool(network_backend=backend) as pool:
        try:
            with pool.stream(
                method, url, headers=list(headers.items()), content=body, extensions={"timeout": timeouts}
            ) as response:
                yield response
        except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException, OSError) as error:
            raise Unanswered(
                f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            ) from error


class _CheckedBackend(httpcore.NetworkBackend):
    """Connects to checked addresses alone, until a deadline."""

    def __init__(self, allowed: Sequence[Network], deadline: float) -> None:
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
        addresses = _open_addresses(host, port, self._allowed)
        stream = self._plain.connect_tcp(
            str(addresses[0]), port, _left(self._deadline, timeout), local_address, socket_options
        )
        return _TimedStream(stream, self._deadline)

    def connect_unix_socket(self, path: str, *_: Any, **__: Any) -> httpcore.NetworkStream:
        """Never."""
        raise Refused(f"{path} is a unix socket.")


class _TimedStream(httpcore.NetworkStream):
    """A connection that ends at a deadline, however slowly the other side drips."""

    def __init__(self, stream: httpcore.NetworkStream, deadline: float) -> None:
        self._stream, self._deadline = stream, deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """What has come."""
        return self._stream.read(max_bytes, _left(self._deadline, timeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Send all of it."""
        self._stream.write(buffer, _left(self._deadline, timeout))

    def close(self) -> None:
        """Close the connection."""
        self._stream.close()

    def start_tls(
        self, ssl_context: Any, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        """The same under TLS; the certificate must be the name's, not the address's."""
        secured = self._stream.start_tls(ssl_context, server_hostname, _left(self._deadline, timeout))
        return _TimedStream(secured, self._deadline)

    def get_extra_info(self, info: str) -> Any:
        """What the connection knows of itself."""
        return self._stream.get_extra_info(info)


def _left(deadline: float, timeout: float | None) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise httpcore.ReadTimeout("the time for the whole call is up")
    return left if timeout is None else min(timeout, left)


def _open_addresses(host: str, port: int, allowed: Sequence[Network]) -> list[Address]:
    """The addresses of a name, if all of them are open. Raises Refused and Unanswered."""
    addresses = _resolve(host, port)
    for address in addresses:
        if not address_is_open(address, allowed):
            raise Refused(
                f"{host} is at {address}, which is not on the open internet. An administrator may allow its "
                "network: MODELPRESS_OUTBOUND_NETWORKS."
            )
    return addresses


def _resolve(host: str, port: int) -> list[Address]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        raise Unanswered(f"{host} has no address: {error}") from None
    # An address of a link has its interface behind a %.
    return [ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in found]
