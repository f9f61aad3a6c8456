"""Ids: a prefix that says the kind, then 48 bits of milliseconds and 80 random bits, so that they sort by time (ULID)."""

from __future__ import annotations

import secrets
import time
from typing import Literal

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
Kind = Literal["upl", "mdl", "dst", "job", "art"]


def new_id(kind: Kind) -> str:
    """A fresh id such as `job_01jd3…`."""
    number = (time.time_ns() // 1_000_000) << 80 | secrets.randbits(80)
    digits = (_ALPHABET[(number >> shift) & 31] for shift in range(125, -1, -5))
    return f"{kind}_{''.join(digits)}"
