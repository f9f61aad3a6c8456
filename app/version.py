"""Which Modelpress this is."""

from __future__ import annotations

import hashlib
import importlib.metadata
from functools import cache
from pathlib import Path

VERSION = importlib.metadata.version("modelpress")


@cache
def engine_version() -> str:
    """The version with a digest of the source that is installed: what decides a result beside model, spec and data.

    The API reads the workers' source too, and imports none of it; both are installed from one tree.
    """
    root = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for path in sorted(path for part in ("app", "workers") for path in (root / part).rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return f"{VERSION}+{digest.hexdigest()[:16]}"
