"""Imports in tests: made over the API, fetched attempt by attempt."""

from __future__ import annotations

import threading
from typing import Any

from fastapi.testclient import TestClient
from sqlalchemy import update

from app.db.engine import Database
from app.db.tables import Import
from app.services.import_fetching import take_due
from app.settings import get_settings


def start(client: TestClient, url: str, **more: Any) -> dict[str, Any]:
    """A new import, as it is answered."""
    answer = client.post("/v1/imports", json={"url": url, **more})
    assert answer.status_code == 202, answer.text
    return dict(answer.json())


def look(client: TestClient, upload: dict[str, Any]) -> dict[str, Any]:
    """An import as it is now."""
    answer = client.get(upload["urls"]["self"])
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def attempt(database: Database, stop: threading.Event | None = None) -> bool:
    """Make one attempt at what is due; False: nothing is."""
    taken = take_due(database, get_settings(), stop or threading.Event())
    if taken is None:
        return False
    taken.run()
    return True


def make_due(database: Database) -> None:
    """Let the time of the next attempt come, or leases be over."""
    with database.write() as session:
        session.execute(update(Import).where(Import.due_at.is_not(None)).values(due_at=1.0))
