"""Bearer tokens of a real issuer on loopback: discovery, keys and their rotation, and every way a token can be wrong."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from fastapi.testclient import TestClient
from key_support import MakeKey, bearer
from pydantic import ValidationError

from app.db.engine import Database
from app.services import oidc
from app.settings import Settings

AUDIENCE = "modelpress"


class Issuer:
    """An OpenID Connect issuer with one key at a time."""

    def __init__(self) -> None:
        self.fetched: list[str] = []
        self.rotate("first")
        issuer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                issuer.fetched.append(self.path)
                body = json.dumps(issuer.documents()[self.path]).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()

    def rotate(self, kid: str) -> None:
        """Go on with a new key."""
        self.kid, self.key = kid, ec.generate_private_key(ec.SECP256R1())

    def documents(self) -> dict[str, Any]:
        """What it serves."""
        public = json.loads(jwt.algorithms.ECAlgorithm.to_jwk(self.key.public_key()))
        return {
            "/.well-known/openid-configuration": {"issuer": self.url, "jwks_uri": f"{self.url}/jwks"},
            "/jwks": {"keys": [public | {"kid": self.kid, "alg": "ES256", "use": "sig"}]},
        }

    def token(self, *, without: str = "", kid: str | None = None, **changes: Any) -> str:
        """A token for a submitter of `acme`, with changes to its claims."""
        now = int(time.time())
        claims = {
            "iss": self.url, "aud": AUDIENCE, "sub": "ada", "exp": now + 300, "tenant": "acme", "role": "submitter",
        } | changes  # fmt: skip
        claims.pop(without, None)
        return jwt.encode(claims, self.key, algorithm="ES256", headers={"kid": kid or self.kid})

    def stop(self) -> None:
        """Go away."""
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def issuer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Issuer]:
    oidc.issuer_keys.cache_clear()
    oidc._ensure_tenant.cache_clear()
    running = Issuer()
    yield running
    if running.thread.is_alive():
        running.stop()


@pytest.fixture
def trusting(guarded: None, issuer: Issuer, override_settings: Callable[..., Settings]) -> None:
    """A service that takes the issuer's tokens."""
    override_settings(oidc_issuer=issuer.url, oidc_audience=AUDIENCE)


def call(client: TestClient, token: str, path: str = "/v1/jobs") -> tuple[int, str]:
    answer = client.get(path, headers=bearer(token))
    return answer.status_code, answer.json().get("code", "")


def test_a_token_opens_what_its_claims_say(
    trusting: None, any_database: Database, client: TestClient, issuer: Issuer
) -> None:
    headers = bearer(issuer.token())
    made = client.post("/v1/uploads", json={"name": "a", "size": 1}, headers=headers)
    assert made.status_code == 201
    url = made.headers["location"]
    assert call(client, issuer.token(role=["other", "reader"]), url)[0] == 200
    assert call(client, issuer.token(tenant="umbrella"), url)[0] == 404
    assert call(client, issuer.token(), "/v1/keys") == (403, "forbidden")
    log = client.get("/v1/audit", headers=bearer(issuer.token(role="administrator"))).json()["items"]
    assert [entry["principal"] for entry in log] == ["oidc:ada"]
    assert len(issuer.fetched) == 2, "discovery and keys, once"


def test_a_token_that_is_wrong_in_one_place_is_refused(
    trusting: None, client: TestClient, issuer: Issuer
) -> None:
    other = Issuer()
    other.stop()
    good = issuer.token()
    head, _, signature = good.split(".")
    forged = jwt.encode({"sub": "ada", "tenant": "acme", "role": "administrator"}, "x" * 32).split(".")[1]
    public = issuer.key.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
    claims = jwt.decode(good, options={"verify_signature": False})
    wrong = {
        "audience": issuer.token(aud="another"),
        "no audience": issuer.token(without="aud"),
        "issuer": issuer.token(iss="https://elsewhere.example"),
        "no end": issuer.token(without="exp"),
        "no subject": issuer.token(without="sub"),
        "not yet": issuer.token(nbf=int(time.time()) + 600),
        "signature": f"{head}.{forged}.{signature}",
        "somebody else's key": other.token(iss=issuer.url, kid=issuer.kid),
        "no algorithm": jwt.encode(claims, None, algorithm="none", headers={"kid": issuer.kid}),
        "HMAC with the public key": jwt.encode(
            claims, public, algorithm="HS256", headers={"kid": issuer.kid}
        ),
        "no token": "a.b.c",
        "nothing": "x",
    }
    assert {name: call(client, token) for name, token in wrong.items()} == dict.fromkeys(
        wrong, (401, "token_invalid")
    )
    assert call(client, issuer.token(exp=int(time.time()) - 60)) == (401, "token_expired")
    assert call(client, good)[0] == 200


@pytest.mark.parametrize(
    "claims", [{"without": "tenant"}, {"without": "role"}, {"role": "king"}, {"tenant": "A B"}, {"tenant": 1}]
)
def test_a_token_without_tenant_or_role_is_not_let_in(
    trusting: None, client: TestClient, issuer: Issuer, claims: dict[str, Any]
) -> None:
    assert call(client, issuer.token(**claims)) == (403, "claims_missing")


def test_keys_rotate_and_unknown_ones_cost_the_issuer_little(
    trusting: None, client: TestClient, issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = issuer.token()
    assert call(client, old)[0] == 200
    issuer.rotate("second")
    monkeypatch.setattr(oidc, "RETRY_SECONDS", 0.0)
    assert call(client, issuer.token())[0] == 200
    assert call(client, old) == (401, "token_invalid")
    monkeypatch.setattr(oidc, "RETRY_SECONDS", 3600.0)
    before = len(issuer.fetched)
    for number in range(5):
        assert call(client, issuer.token(kid=str(number)))[0] == 401
    assert len(issuer.fetched) == before


def test_while_the_issuer_is_away_known_keys_go_on_and_unknown_ones_are_503(
    trusting: None, client: TestClient, issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = issuer.token()
    assert call(client, token)[0] == 200
    issuer.stop()
    monkeypatch.setattr(oidc, "FRESH_SECONDS", 0.0)
    monkeypatch.setattr(oidc, "RETRY_SECONDS", 0.0)
    assert call(client, token)[0] == 200
    oidc.issuer_keys.cache_clear()
    assert call(client, token) == (503, "issuer_unavailable")


def test_keys_of_our_own_work_beside_tokens(
    make_key: MakeKey, trusting: None, client: TestClient, issuer: Issuer
) -> None:
    assert call(client, make_key())[0] == 200
    assert issuer.fetched == []


@pytest.mark.parametrize(
    ("issuer_url", "audience"), [("http://login.example.org", AUDIENCE), ("https://login.example.org", "")]
)
def test_an_issuer_that_cannot_be_trusted_is_no_setting(issuer_url: str, audience: str) -> None:
    with pytest.raises(ValidationError):
        Settings(oidc_issuer=issuer_url, oidc_audience=audience)
