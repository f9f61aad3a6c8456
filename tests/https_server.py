"""A real HTTPS server of one file, with an authority of its own, that misbehaves as it is told."""

from __future__ import annotations

import datetime as dt
import ipaddress
import re
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

_PIECE = 64 * 1024


@dataclass
class Behaviour:
    """What the server serves, and how."""

    content: bytes = b""
    etag: str | None = '"one"'
    announces_length: bool = True
    cut_after: int | None = None
    """Each answer breaks off after so many bytes of its body."""
    hang_after: int | None = None
    """Each answer stands still after so many bytes of its body."""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    """Of every answer, beside the usual ones."""


class FileServer(ThreadingHTTPServer):
    """Answers GET with `behaviour`; remembers the headers of every request."""

    def __init__(self, certificate: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behaviour = Behaviour()
        self.requests: list[dict[str, str]] = []
        self.leaving = threading.Event()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        # Shaken in the thread of the connection: who does not come to it keeps nobody waiting.
        self.socket = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)

    def url(self, path: str = "/files/tiny.bin") -> str:
        """URL of a path; all of them are the same file."""
        return f"https://localhost:{self.server_port}{path}"

    @contextmanager
    def running(self) -> Iterator[FileServer]:
        """Serve until the block ends."""
        thread = threading.Thread(target=self.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield self
        finally:
            self.leaving.set()
            self.shutdown()
            self.server_close()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: FileServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.requests.append({k.lower(): v for k, v in self.headers.items()} | {"path": self.path})
        told = self.server.behaviour
        start = self._start(told)
        body = told.content[start:]
        self.send_response(206 if start else told.status)
        headers: dict[str, Any] = {"Connection": "close", "ETag": told.etag, **told.headers}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(told.content) - 1}/{len(told.content)}"
        if told.announces_length:
            headers["Content-Length"] = len(body)
        for name, value in headers.items():
            if value is not None:
                self.send_header(name, str(value))
        self.end_headers()
        self._send(body, told)

    def _start(self, told: Behaviour) -> int:
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        same = told.etag is not None and self.headers.get("If-Range", told.etag) == told.etag
        return int(wanted[1]) if wanted and same and told.status == 200 else 0

    def _send(self, body: bytes, told: Behaviour) -> None:
        for at in range(0, len(body), _PIECE):
            if told.cut_after is not None and at >= told.cut_after:
                return
            if told.hang_after is not None and at >= told.hang_after:
                self.server.leaving.wait(20)
                return
            self.wfile.write(body[at : at + _PIECE])

    def handle(self) -> None:
        # Whoever was here may have left, or not trust us.
        with suppress(OSError):
            super().handle()

    def log_message(self, *_: object) -> None:
        pass


def make_certificates(directory: Path) -> tuple[Path, Path]:
    """Files of an authority's certificate, and of a certificate with its key, signed by it, for localhost."""
    authority_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    authority = _certificate("Test authority", authority_key, "Test authority", authority_key)
    ours = _certificate("localhost", key, "Test authority", authority_key)
    (directory / "authority.pem").write_bytes(authority.public_bytes(serialization.Encoding.PEM))
    (directory / "server.pem").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        + ours.public_bytes(serialization.Encoding.PEM)
    )
    return directory / "authority.pem", directory / "server.pem"


def _certificate(
    subject: str,
    key: ec.EllipticCurvePrivateKey,
    issuer: str,
    issuer_key: ec.EllipticCurvePrivateKey,
) -> x509.Certificate:
    is_authority = subject == issuer
    now = dt.datetime.now(dt.UTC)
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    usage = x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=is_authority,
        crl_sign=is_authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=2))
        .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False
        )
        .sign(issuer_key, hashes.SHA256())
    )
