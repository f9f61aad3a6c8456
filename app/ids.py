"""Ids: a prefix that says the kind, then 48 bits of milliseconds and 80 random bits, so that they sort by time (ULID)."""

from __future__ import annotations

import secrets
import time
from typing import Literal

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
Kind = Literal["upl", "mdl", "dst", "job", "art", "key", "aud", "whe", "msg"]


def new_id(kind: Kind) -> str:
    """A fresh id such as `job_01jd3…`."""
    number = (time.time_ns() // 1_000_000) << 80 | secrets.randbits(80)
    return f"{kind}_{_base32(number, 26)}"


def new_secret() -> str:
    """256 random bits as 52 letters and digits."""
    return _base32(secrets.randbits(256), 52)


def _base32(number: int, digits: int) -> str:
    return "".join(_ALPHABET[(number >> 5 * place) & 31] for place in reversed(range(digits)))
