"""The two walls between tenants: the filter on every statement of ours, and PostgreSQL's own on every statement at all."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import delete, func, insert, select, text, update
from sqlalchemy.exc import ProgrammingError, StatementError

from app.db import job_moves
from app.db.engine import Database
from app.db.tables import Base, Job, JobEvent, JobStage, Model, Tenant, Worker
from app.db.tenancy import TenantRow
from app.ids import new_id

OF_NOBODY = {"tenants", "workers", "alembic_version"}
SHARED = {Tenant, Worker}


@pytest.fixture
def two_tenants(any_database: Database, add_model: Callable[..., str]) -> tuple[Database, Database]:
    """The database as `acme` and as `umbrella` see it; each has a model, and a job with a stage and an event."""
    with any_database.write() as session:
        session.add_all([Tenant(id="acme"), Tenant(id="umbrella")])
    views = []
    for name in ("acme", "umbrella"):
        view = any_database.for_tenant(name)
        job = Job(
            id=new_id("job"), model_id=add_model(tenant=name), model_name="m", spec={}, technique="t", queue="cpu",
            max_attempts=3,
        )  # fmt: skip
        with view.write() as session:
            job_moves.create_job(session, job, ["load"])
        views.append(view)
    return views[0], views[1]


def ids(database: Database) -> list[str]:
    with database.read() as session:
        return list(session.scalars(select(Job.id)).all())


def test_statements_reach_the_rows_of_their_own_tenant(two_tenants: tuple[Database, Database]) -> None:
    acme, umbrella = two_tenants
    (own,), (foreign,) = ids(acme), ids(umbrella)
    with acme.write() as session:
        assert session.get(Job, own) is not None
        assert session.get(Job, foreign) is None
        assert session.get(Job, foreign, with_for_update=True) is None
        assert session.execute(select(func.count()).select_from(Job)).scalar_one() == 1
        assert session.execute(select(func.count(JobEvent.number))).scalar_one() == 1
        events_of = select(JobEvent.job_id).where(JobEvent.number == 1)
        assert session.scalars(select(Model.tenant_id).where(Model.id.in_(select(Job.model_id)))).all() == [
            "acme"
        ]
        assert session.scalars(events_of).all() == [own]
        renamed = update(Job).values(model_name="mine").returning(Job.id)
        assert session.scalars(renamed).all() == [own]
        assert (
            session.scalars(
                update(Job).where(Job.id == foreign).values(model_name="").returning(Job.id)
            ).all()
            == []
        )
        assert session.scalars(delete(Job).where(Job.id.in_([own, foreign])).returning(Job.id)).all() == [own]
    assert (ids(acme), ids(umbrella)) == ([], [foreign])


def test_the_service_sees_all_and_must_say_whose_a_new_row_is(
    any_database: Database, two_tenants: tuple[Database, Database]
) -> None:
    assert len(ids(any_database)) == 2
    assert ids(two_tenants[0].for_service()) == ids(any_database)
    stage = {"job_id": ids(any_database)[0], "number": 7, "name": "x", "metrics": {}}
    with pytest.raises(StatementError, match="tenant"), any_database.write() as session:
        session.execute(insert(JobStage), [stage])


def test_every_table_is_a_tenants_or_known_not_to_be() -> None:
    mapped = {mapper.class_ for mapper in Base.registry.mappers}
    assert {cls for cls in mapped if not issubclass(cls, TenantRow)} == SHARED


def test_the_api_and_the_services_take_the_database_a_request_was_given() -> None:
    app = Path(__file__).parents[3] / "app"
    users = {
        str(file.relative_to(app))
        for directory in ("api", "services")
        for file in (app / directory).glob("*.py")
        if re.search(r"get_database\(\)|for_service\(\)", file.read_text())
    }
    assert users == {
        "api/dependencies.py",  # makes the tenant's view
        "api/authentication.py",  # does not know the tenant yet
        "api/event_watch.py",  # one query for the streams of all tenants, each of a job its caller may see
        "api/job_reads.py",  # a session for each tenant whose calls it answers
        "services/health.py",  # asks for no row of a tenant
        "services/jobs.py",  # after the commit: marks a job as unsent, drops blobs nobody refers to
    }


@pytest.fixture
def walls(
    request: pytest.FixtureRequest, two_tenants: tuple[Database, Database], any_database: Database
) -> tuple[Database, Database]:
    """The two tenants on PostgreSQL."""
    if any_database.engine.dialect.name != "postgresql":
        pytest.skip("SQLite has no row-level security")
    return two_tenants


def test_raw_sql_reaches_no_row_of_another_tenant(
    walls: tuple[Database, Database], any_database: Database
) -> None:
    acme, umbrella = walls
    for table in ("models", "jobs", "job_stages", "job_events"):
        counts = []
        for view in (acme, umbrella, any_database):
            with view.read() as session:
                counts.append(session.execute(text(f"SELECT count(*) FROM {table}")).scalar_one())
        assert counts == [1, 1, 2], table
        with acme.write() as session:
            changed = session.execute(
                text(f"UPDATE {table} SET tenant_id = 'acme' WHERE tenant_id = 'umbrella'")
            )
            assert changed.rowcount == 0, table  # type: ignore[attr-defined]
            assert session.execute(text(f"DELETE FROM {table} WHERE tenant_id = 'umbrella'")).rowcount == 0  # type: ignore[attr-defined]
    assert len(ids(umbrella)) == 1


@pytest.mark.parametrize(
    "statement",
    [
        'INSERT INTO models SELECT * FROM (SELECT (json_populate_record(m, \'{"tenant_id": "umbrella", "id": "mdl_x"}\')).* FROM models m) x',
        "UPDATE jobs SET tenant_id = 'umbrella'",
        "INSERT INTO tenants (id, created_at) VALUES ('new', 0)",
        "UPDATE tenants SET created_at = 0",
        "UPDATE tenants SET id = 'umbrella'",
        "DELETE FROM workers",
        "UPDATE worker_time SET held_until = started_at",
        "SELECT * FROM alembic_version",
        "CREATE TABLE mine (id int)",
    ],
)
def test_raw_sql_can_neither_give_rows_away_nor_touch_what_is_shared(
    walls: tuple[Database, Database], statement: str
) -> None:
    with (
        pytest.raises(ProgrammingError, match=r"row-level security|permission denied"),
        walls[0].write() as session,
    ):
        session.execute(text(statement))


def test_a_connection_goes_back_to_the_pool_without_its_tenant(
    walls: tuple[Database, Database], any_database: Database
) -> None:
    acme, umbrella = walls
    for _ in range(3):
        with pytest.raises(ProgrammingError), acme.read() as session:
            session.execute(text("SELECT * FROM nowhere"))
        assert len(ids(any_database)) == 2
        assert len(ids(umbrella)) == 1
        with any_database.read() as session:
            who = session.execute(
                text("SELECT current_user, current_setting('modelpress.tenant', true)")
            ).one()
            assert who[0] != "modelpress_tenant"
            assert not who[1]


def test_every_table_has_the_second_wall(walls: tuple[Database, Database], any_database: Database) -> None:
    with any_database.read() as session:
        tables = session.execute(
            text(
                "SELECT relname, relrowsecurity FROM pg_class WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace"
            )
        ).all()
        policies = set(session.scalars(text("SELECT tablename FROM pg_policies")).all())
    assert {name for name, secured in tables if not secured} == OF_NOBODY - {"tenants"}
    assert policies == {name for name, secured in tables if secured}
