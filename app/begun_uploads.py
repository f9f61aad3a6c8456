"""Which upload holds the parts of which file: so that a command that was broken off goes on where it was.

One small JSON file per user. A file that has changed since (size or time) is another file.
"""

from __future__ import annotations

import json
import os
from pathlib import Path


def default_path() -> Path:
    """Where a user's begun uploads are remembered (XDG base directories)."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "modelpress" / "uploads.json"


class BegunUploads:
    """Upload ids by service and file. What cannot be read counts as empty: nothing is lost but time."""

    def __init__(self, service_url: str, path: Path | None = None) -> None:
        self._service = service_url
        self._path = path or default_path()

    def find(self, file: Path) -> str | None:
        """Id of the upload begun for this file as it is now."""
        return self._read().get(self._key(file))

    def remember(self, file: Path, upload_id: str) -> None:
        """Write down that an upload of this file was begun."""
        self._write(self._read() | {self._key(file): upload_id})

    def forget(self, *files: Path) -> None:
        """Their uploads are used up."""
        gone = {self._key(file) for file in files}
        self._write({key: upload for key, upload in self._read().items() if key not in gone})

    def _key(self, file: Path) -> str:
        facts = file.stat()
        return f"{self._service} {file.absolute()} {facts.st_size} {facts.st_mtime_ns}"

    def _read(self) -> dict[str, str]:
        try:
            content = json.loads(self._path.read_text())
        except (FileNotFoundError, ValueError):
            return {}
        return dict(content) if isinstance(content, dict) else {}

    def _write(self, content: dict[str, str]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self._path.with_suffix(f".{os.getpid()}")
        fresh.write_text(json.dumps(content, indent=1))
        fresh.replace(self._path)
