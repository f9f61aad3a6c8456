"""A service for each test that asks for one, ended with everything it started."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from service import Service

from app.db.engine import Database, get_database
from app.services.sweeping import sweep_forever
from app.settings import Settings, get_settings

sys.path.append(str(Path(__file__).parents[1] / "engine"))


@pytest.fixture
def start_service(
    any_database: Database, tmp_path: Path, override_settings: Callable[..., Settings]
) -> Iterator[Callable[[str], Service]]:
    """Call with a broker's URL for a service on it: an app, a sweeper, no worker yet. All of it ends with the test."""
    stop = threading.Event()
    started: list[Service] = []
    threads: list[threading.Thread] = []

    def start(broker_url: str) -> Service:
        from app.main import create_app

        settings = override_settings(
            redis_url=broker_url,
            lease_seconds=3,
            heartbeat_seconds=0.5,
            sweep_seconds=0.3,
            redispatch_seconds=2,
            worker_threads=1,
        )
        database = get_database()
        thread = threading.Thread(target=sweep_forever, args=(database, settings, stop))
        thread.start()
        threads.append(thread)
        client = TestClient(create_app(get_settings()))
        client.__enter__()
        started.append(Service(client, settings, database, tmp_path))
        return started[-1]

    yield start
    for service in started:
        for worker in service.workers:
            worker.family()
            for process in worker.alive():
                process.kill()
            worker.process.wait()
    stop.set()
    for thread in threads:
        thread.join()
    for service in started:
        service.client.__exit__(None, None, None)
