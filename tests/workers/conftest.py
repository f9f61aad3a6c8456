"""Benches for the supervisor, on the databases a test asks for."""

from __future__ import annotations

from pathlib import Path

import pytest
from bench import Bench

from app.db.engine import Database


@pytest.fixture
def bench(any_database: Database, tmp_path: Path) -> Bench:
    """On SQLite and on PostgreSQL."""
    return Bench(any_database, tmp_path)


@pytest.fixture
def fast_bench(database: Database, tmp_path: Path) -> Bench:
    """On SQLite alone, for what has nothing to do with SQL."""
    return Bench(database, tmp_path)
