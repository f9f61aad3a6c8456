"""Addresses that users name: which of them are on the open internet, or in a network that an administrator allows.

A name is resolved once, and every address it has is checked. `app.outbound` connects to what was checked.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterable, Sequence
from urllib.parse import urlsplit

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_PRINTABLE = re.compile(r"[!-~]+")
_SIXTOFOUR, _NAT64 = ipaddress.ip_network("2002::/16"), ipaddress.ip_network("64:ff9b::/96")


class Refused(Exception):  # noqa: N818 - an outcome, not a failure of ours
    """The address is one we do not connect to; the text says why and what to do."""


class Unanswered(Exception):  # noqa: N818
    """No whole answer came, for a reason that may pass."""


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
    open_addresses(str(parts.hostname), parts.port or 443, allowed)


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


def open_addresses(host: str, port: int, allowed: Sequence[Network]) -> list[Address]:
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
