"""Secrets and signatures of webhooks, by Standard Webhooks (https://www.standardwebhooks.com).

Each endpoint has a secret of its own, derived from the service's: none is in the database, and a copy of it signs nothing.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Sequence

PREFIX = "whsec_"


def endpoint_secret(server_secret: bytes, endpoint_id: str, version: int) -> str:
    """The secret of an endpoint, `whsec_` and 32 bytes in base64; each version is another."""
    words = f"webhook:{endpoint_id}:{version}".encode()
    return PREFIX + base64.b64encode(hmac.digest(server_secret, words, "sha256")).decode()


def signature(secrets: Sequence[str], message_id: str, timestamp: int, body: bytes) -> str:
    """The header `webhook-signature`: one `v1,<base64>` for each secret, with a space between."""
    signed = f"{message_id}.{timestamp}.".encode() + body
    return " ".join(f"v1,{_sign(secret, signed)}" for secret in secrets)


def _sign(secret: str, signed: bytes) -> str:
    key = base64.b64decode(secret.removeprefix(PREFIX))
    return base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
