"""Addresses that users name: nothing of ours can be reached, and nobody can keep us waiting."""

from __future__ import annotations

import ipaddress
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest

from app.addresses import Refused, Unanswered, address_is_open, check_url
from app.outbound import Answer, Bounds, post

LOOPBACK = (ipaddress.ip_network("127.0.0.0/8"),)
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"
Serve = Callable[[Callable[[socket.socket], None]], str]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Call with what to do with a connection, for the URL of a server that does so."""
    stop = threading.Event()
    servers: list[tuple[socket.socket, threading.Thread]] = []

    def start(handle: Callable[[socket.socket], None]) -> str:
        listener = socket.create_server(("127.0.0.1", 0))

        def run() -> None:
            while not stop.is_set():
                with suppress(OSError), listener.accept()[0] as connection:
                    connection.settimeout(5)
                    handle(connection)

        thread = threading.Thread(target=run)
        thread.start()
        servers.append((listener, thread))
        return f"http://127.0.0.1:{listener.getsockname()[1]}/hook"

    yield start
    stop.set()
    for listener, thread in servers:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


def call(url: str, *, seconds: float = 5, allowed: object = LOOPBACK) -> Answer:
    return post(url, b"{}", {"x-test": "1"}, Bounds(seconds=seconds, answer_bytes=64, allowed=allowed))  # type: ignore[arg-type]


def test_an_answer_is_given_back_and_the_host_is_that_of_the_url(serve: Serve) -> None:
    seen = bytearray()

    def handle(connection: socket.socket) -> None:
        seen.extend(connection.recv(65536))
        connection.sendall(OK)

    url = serve(handle)
    assert call(url) == Answer(200, b"hi")
    assert seen.startswith(b"POST /hook HTTP/1.1\r\n")
    assert f"Host: {url.split('/')[2]}\r\n".encode() in seen


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "[::1]", "10.0.0.1", "169.254.169.254", "192.168.1.1", "100.64.0.1", "0.0.0.0",
     "[::ffff:127.0.0.1]", "[::ffff:10.0.0.1]", "[64:ff9b::10.0.0.1]", "[2002:7f00:1::]", "[fe80::1]", "[fc00::1]",
     "224.0.0.1", "[ff0e::1]", "2130706433", "0x7f.1", "127.1"],
)  # fmt: skip
def test_what_is_not_on_the_open_internet_is_refused(host: str) -> None:
    with pytest.raises(Refused, match="not on the open internet"):
        call(f"http://{host}:9/", allowed=())


def test_a_name_that_changes_its_address_after_it_was_checked_leads_nowhere_else(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached = threading.Event()

    def handle(connection: socket.socket) -> None:
        reached.set()
        connection.sendall(OK)

    port = int(serve(handle).split(":")[2].split("/")[0])
    answers = iter(["203.0.113.9", "127.0.0.1"])
    real = socket.getaddrinfo

    def resolve(host: str, at: int, *how: Any, **more: Any) -> list[Any]:
        return real(next(answers) if host == "rebinding.example" else host, at, *how, **more)

    monkeypatch.setattr("app.addresses.socket.getaddrinfo", resolve)
    documentation = (ipaddress.ip_network("203.0.113.0/24"),)
    with pytest.raises(Unanswered):
        call(f"http://rebinding.example:{port}/", seconds=1, allowed=documentation)
    assert not reached.is_set()


def test_a_name_of_which_one_address_is_ours_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, 80)) for a in ("8.8.8.8", "10.0.0.1")]
    monkeypatch.setattr("app.addresses.socket.getaddrinfo", lambda *_, **__: found)
    with pytest.raises(Refused, match=r"10\.0\.0\.1"):
        call("http://mixed.example/", allowed=())


def test_a_redirect_is_an_answer_and_not_followed(serve: Serve) -> None:
    visits: list[int] = []

    def handle(connection: socket.socket) -> None:
        visits.append(1)
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 302 Found\r\nLocation: /elsewhere\r\nContent-Length: 0\r\n\r\n")

    assert call(serve(handle)).status == 302
    assert len(visits) == 1


def test_of_a_long_answer_no_more_than_asked_for_is_read(serve: Serve) -> None:
    def handle(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n")
        with suppress(OSError):
            while True:
                connection.sendall(b"x" * 65536)

    answer = call(serve(handle))
    assert answer == Answer(200, b"x" * 64)


@pytest.mark.parametrize(
    "head", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n"], ids=["headers", "body"]
)
def test_an_answer_that_drips_ends_with_the_time_for_all_of_it(serve: Serve, head: bytes) -> None:
    def handle(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(head)
        with suppress(OSError):
            for byte in b"HTTP/1.1 200 OK and so on" * 2:
                connection.sendall(bytes([byte]))
                time.sleep(0.1)

    began = time.monotonic()
    with pytest.raises(Unanswered):
        call(serve(handle), seconds=1)
    assert time.monotonic() - began < 4


@pytest.mark.parametrize(
    "url",
    [
        "ftp://example.org/",
        "/hook",
        "http://",
        "http://a:b@example.org/",
        "file:///etc/passwd",
        "http://x:99999/",
        "http://[",
        "https://[abc]/",
        "http://example.org/\u00fc",
        "http://\u00fc.example/",
        "http://a\0b/",
        "http://a/ b",
    ],
)
def test_urls_that_are_none_of_ours_are_refused(url: str) -> None:
    with pytest.raises(Refused):
        check_url(url)


def test_an_allowed_network_allows_no_other() -> None:
    allowed = (ipaddress.ip_network("10.1.0.0/16"),)
    assert address_is_open(ipaddress.ip_address("10.1.2.3"), allowed)
    assert address_is_open(ipaddress.ip_address("::ffff:10.1.2.3"), allowed)
    assert not address_is_open(ipaddress.ip_address("10.2.0.1"), allowed)
    assert address_is_open(ipaddress.ip_address("8.8.8.8"), allowed)
