"""JSON from strangers: capped in size and depth, without duplicate keys, NaN or lone surrogates."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from app.errors import IntakeError

_MAX_DEPTH = 32
# A list or an object takes thirty times the bytes in memory that it takes in text.
_MAX_CONTAINERS = 1_000_000

Refuse = Callable[[str], IntakeError]


class _DuplicateKeyError(ValueError):
    def __init__(self, key: str) -> None:
        super().__init__(f"the key {key[:100]!r} appears twice")
        self.key = key


def read_object(
    path: Path, *, max_bytes: int, refuse: Refuse, refuse_duplicate: Refuse | None = None
) -> dict[str, Any]:
    """The JSON object in a small file."""
    if path.stat().st_size > max_bytes:
        raise refuse(f"it has {path.stat().st_size} bytes; at most {max_bytes} are read")
    return parse_object(path.read_bytes(), refuse=refuse, refuse_duplicate=refuse_duplicate)


def parse_object(raw: bytes, *, refuse: Refuse, refuse_duplicate: Refuse | None = None) -> dict[str, Any]:
    """The JSON object in `raw`; whatever is wrong raises `refuse(what is wrong)`, a key given twice the other."""
    if raw.count(b"{") + raw.count(b"[") > _MAX_CONTAINERS:
        raise refuse(f"it has more than {_MAX_CONTAINERS} lists and objects")
    try:
        value = json.loads(
            raw.decode("utf-8"), object_pairs_hook=_without_duplicates, parse_constant=_no_constant
        )
    except _DuplicateKeyError as error:
        raise (refuse_duplicate or refuse)(str(error)) from None
    except (ValueError, RecursionError) as error:
        raise refuse(f"it is not JSON that can be read ({str(error)[:200]})") from None
    if not isinstance(value, dict):
        raise refuse("it holds no JSON object")
    if _depth_exceeds(value, _MAX_DEPTH):
        raise refuse(f"it is nested more than {_MAX_DEPTH} deep")
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _DuplicateKeyError(key)
        if any("\ud800" <= character <= "\udfff" for character in key):
            raise ValueError("a key is not Unicode text")
        found[key] = value
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _depth_exceeds(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return False
    return True
