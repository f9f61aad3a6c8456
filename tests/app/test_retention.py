"""Results and the audit log are kept for as long as is said, and what is in use is never given up."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fastapi.testclient import TestClient
from job_support import claim, finish
from key_support import MakeKey, bearer
from sqlalchemy import func, insert, select, text, update
from waiting import wait_until

from app.db import model_queries, retention_queries
from app.db.engine import Database, db_now, get_database
from app.db.tables import Artifact, AuditEntry, Dataset, Job, ModelFile, Tenant
from app.ids import new_id
from app.services import jobs, retention
from app.services.jobs import Submission
from app.services.planning import Wish
from app.services.retention import expire, set_retention
from app.services.store_check import find_faults
from app.settings import Settings, get_settings
from app.storage import ArtifactStore, get_store
from app.storage.references import remove_orphans

AddModel = Callable[..., str]
DAY = 86_400
FILES = {
    "model.safetensors": ("model", b"weights"),
    "onnx/model.onnx": ("model", b"a graph"),
    "report.json": ("report", b"{}"),
}
Seen = dict[str, Any]


@pytest.fixture
def thirty_days(override_settings: Callable[..., Settings]) -> None:
    """A service that keeps results for thirty days and the audit log for ninety."""
    override_settings(artifact_retention_days=30, audit_retention_days=90)


@pytest.fixture
def finished(client: TestClient, add_model: AddModel) -> Callable[..., Seen]:
    """Call for a job that has succeeded with these files, so many days ago."""

    def run(files: dict[str, tuple[str, bytes]] = FILES, *, days_ago: float = 31, **headers: str) -> Seen:
        tenant = headers.pop("tenant", "default")
        body = {"model": add_model(tenant=tenant), "recipe": "int8", "use_cache": False}
        job = client.post("/v1/jobs", json=body, headers=headers).json()
        finish(get_database(), claim(get_database(), job["id"]), files)
        with get_database().write() as session:
            made_at = {"created_at": Artifact.created_at - days_ago * DAY}
            session.execute(update(Artifact).where(Artifact.job_id == job["id"]).values(made_at))
        return dict(client.get(job["urls"]["self"], headers=headers).json())

    return run


def content(job: Seen, path: str) -> str:
    return str(next(a["urls"]["content"] for a in job["artifacts"] if a["path"] == path))


def expired(database: Database) -> set[str]:
    with database.read() as session:
        return set(session.scalars(select(Artifact.path).where(Artifact.expired_at.is_not(None))).all())


def a_day_later(database: Database) -> None:
    with database.write() as session:
        session.execute(
            update(Artifact).where(Artifact.expired_at.is_not(None)).values(expired_at=db_now() - DAY - 1)
        )
    remove_orphans(database, get_store(), older_than_seconds=-1)


def test_an_old_result_goes_and_its_report_stays(
    thirty_days: None, database: Database, client: TestClient, finished: Callable[..., Seen]
) -> None:
    old, young = finished(), finished(days_ago=29)
    assert expire(database, get_settings()).artifacts == 2
    assert expire(database, get_settings()).artifacts == 0
    gone = client.get(content(old, "model.safetensors"))
    seen = client.get(old["urls"]["self"]).json()
    assert (gone.status_code, gone.json()["code"]) == (410, "artifact_expired")
    assert f"expired at {seen['expired_at'][:17]}" in gone.json()["detail"]
    assert "kept for 30 days" in gone.json()["detail"]
    assert old["id"] in gone.json()["hint"]
    assert client.head(content(old, "model.safetensors")).status_code == 410
    assert client.get(old["urls"]["download"]).status_code == 410
    assert client.get(old["urls"]["report"]).json() == {}
    assert client.get(old["urls"]["result"]).status_code == 200
    assert client.get(content(young, "model.safetensors")).content == b"weights"
    assert client.get(young["urls"]["download"]).status_code == 200


def test_a_job_says_when_its_result_goes_and_when_it_went(
    thirty_days: None, database: Database, client: TestClient, finished: Callable[..., Seen]
) -> None:
    job = finished(days_ago=31)
    (listed,) = client.get("/v1/jobs").json()["items"]
    assert (listed["expires_at"], listed["expired_at"]) == (job["expires_at"], None)
    assert job["artifacts"][0]["created_at"] < job["expires_at"] < job["ended_at"]
    expire(database, get_settings())
    (after,) = client.get("/v1/jobs").json()["items"]
    assert after["expires_at"] is None
    assert after["expired_at"] > job["ended_at"]
    assert {a["path"]: a["expired_at"] is not None for a in after["artifacts"]} == {
        "model.safetensors": True,
        "onnx/model.onnx": True,
        "report.json": False,
    }


def test_without_a_retention_all_is_kept_for_ever(
    database: Database, client: TestClient, finished: Callable[..., Seen]
) -> None:
    job = finished(days_ago=10_000)
    assert (job["expires_at"], job["expired_at"]) == (None, None)
    assert expire(database, get_settings()) == retention.Expired(artifacts=0, audit_entries=0)
    assert client.get(content(job, "model.safetensors")).status_code == 200


def test_bytes_stay_for_a_day_and_then_leave_the_store(
    thirty_days: None, any_store: ArtifactStore, finished: Callable[..., Seen]
) -> None:
    database = get_database()
    finished()
    expire(database, get_settings())
    remove_orphans(database, get_store(), older_than_seconds=-1)
    assert sorted(blob.bytes for blob in get_store().iter_blobs()) == [2, 7, 7]
    a_day_later(database)
    assert [blob.bytes for blob in get_store().iter_blobs()] == [2]
    faults = [fault for fault in find_faults(database, get_store(), digests=False) if fault]
    assert not [who for fault in faults for who in fault.wanted_by if who.startswith("job_")]


def test_expired_bytes_are_not_counted(
    thirty_days: None, database: Database, client: TestClient, finished: Callable[..., Seen]
) -> None:
    before = client.get("/v1/quota").json()["stored_bytes"]["used"]
    job = finished()
    model = client.get(f"/v1/models/{job['model']}").json()["bytes"]
    assert client.get("/v1/quota").json()["stored_bytes"]["used"] == before + model + 16
    expire(database, get_settings())
    assert client.get("/v1/quota").json()["stored_bytes"]["used"] == before + model + 2
    assert 'modelpress_stored_bytes{kind="artifact"} 2.0' in client.get("/metrics").text


@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_what_a_model_or_dataset_of_the_tenant_consists_of_stays(
    thirty_days: None, any_database: Database, finished: Callable[..., Seen], add_model: AddModel, kind: str
) -> None:
    job = finished()
    sha256 = next(a["sha256"] for a in job["artifacts"] if a["path"] == "model.safetensors")
    with any_database.for_tenant("default").write() as session:
        if kind == "model":
            session.add(ModelFile(model_id=job["model"], path="again", sha256=sha256, bytes=7))
        else:
            session.add(Dataset(id=new_id("dst"), name="d", format="npz", bytes=7, sha256=sha256))
    expire(any_database, get_settings())
    assert expired(any_database) == {"onnx/model.onnx"}


def test_what_another_tenant_has_keeps_nothing_and_tells_nothing(
    make_key: MakeKey,
    thirty_days: None,
    database: Database,
    client: TestClient,
    finished: Callable[..., Seen],
    add_model: AddModel,
) -> None:
    headers = bearer(make_key(tenant="acme"))
    job = finished(tenant="acme", **headers)
    sha256 = next(a["sha256"] for a in job["artifacts"] if a["path"] == "model.safetensors")
    with database.for_tenant("default").write() as session:
        session.add(ModelFile(model_id=add_model(), path="same", sha256=sha256, bytes=7))
    expire(database, get_settings())
    assert client.get(content(job, "model.safetensors"), headers=headers).status_code == 410
    a_day_later(database)
    assert get_store().exists(sha256)


def test_a_file_that_becomes_a_jobs_input_as_it_expires_is_kept(
    thirty_days: None, any_database: Database, client: TestClient, finished: Callable[..., Seen]
) -> None:
    job = finished()
    weights = next(a for a in job["artifacts"] if a["path"] == "model.safetensors")
    sweeper = threading.Thread(target=expire, args=(any_database, get_settings()))
    with any_database.for_tenant("default").write() as session:
        model_queries.hold_blobs(session)
        session.add(ModelFile(model_id=job["model"], path="w", sha256=weights["sha256"], bytes=7))
        session.flush()
        sweeper.start()
        if any_database.engine.dialect.name == "postgresql":
            wait_until(lambda: _somebody_waits_for_a_lock(any_database))
    sweeper.join()
    assert client.post("/v1/jobs", json={"model": job["model"], "recipe": "int8"}).status_code == 202
    assert expired(any_database) == {"onnx/model.onnx"}
    assert client.delete(f"/v1/models/{job['model']}").json()["code"] == "model_in_use"
    a_day_later(any_database)
    assert client.get(weights["urls"]["content"]).content == b"weights"


def test_a_result_that_expires_while_it_is_given_to_a_job_keeps_its_files(
    thirty_days: None, any_database: Database, client: TestClient, finished: Callable[..., Seen]
) -> None:
    earlier = finished()
    sweeper = threading.Thread(target=expire, args=(any_database, get_settings()))
    with any_database.for_tenant("default").write() as session:
        wish = Wish(earlier["model"], recipe="int8")
        job = jobs.submit_job(session, get_settings(), Submission(wish))
        sweeper.start()
        if any_database.engine.dialect.name == "postgresql":
            wait_until(lambda: _somebody_waits_for_a_lock(any_database))
    sweeper.join()
    assert job.result_of == earlier["id"]
    assert client.get(earlier["urls"]["download"]).status_code == 410
    a_day_later(any_database)
    for artifact in job.artifacts:
        assert client.get(artifact.urls.content).content == FILES[artifact.path][1]


def test_a_result_that_expires_before_it_is_given_to_a_job_is_made_anew(
    thirty_days: None, any_database: Database, client: TestClient, finished: Callable[..., Seen]
) -> None:
    body = {"model": finished()["model"], "recipe": "int8"}
    with ThreadPoolExecutor(1) as pool:
        with any_database.write() as session:
            model_queries.hold_blobs(session)
            retention_queries.expire_artifacts(session, "default", days=30, since=0.0, limit=9)
            submitting = pool.submit(client.post, "/v1/jobs", json=body)
            if any_database.engine.dialect.name == "postgresql":
                wait_until(lambda: _somebody_waits_for_a_lock(any_database))
        job = submitting.result().json()
    assert (job["status"], job["result_of"]) == ("queued", None)


def _somebody_waits_for_a_lock(database: Database) -> bool:
    waiting = text("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted")
    with database.read() as session:
        return bool(session.execute(waiting).scalar_one())


def test_a_tenants_own_retention_goes_before_the_services(
    make_key: MakeKey,
    thirty_days: None,
    database: Database,
    finished: Callable[..., Seen],
) -> None:
    seen = {}
    for tenant, days in (("short", 10), ("ever", 0), ("plain", None)):
        headers = bearer(make_key(tenant=tenant))
        with database.write() as session:
            set_retention(session, tenant, artifact_days=days, audit_days=None)
        for age in (11, 31):
            files = {f"{tenant}-{age}": ("model", b"x")}
            seen[tenant, age] = finished(files, days_ago=age, tenant=tenant, **headers)
    assert seen["ever", 11]["expires_at"] is None
    assert seen["short", 11]["expires_at"] < seen["plain", 11]["expires_at"]
    expire(database, get_settings())
    assert expired(database) == {"short-11", "short-31", "plain-31"}


def test_a_backlog_goes_in_batches_past_what_is_in_use(
    thirty_days: None, any_database: Database, finished: Callable[..., Seen], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "_ARTIFACTS_BATCH", 2)
    files = {f"{n}": ("model", f"{n}".encode()) for n in range(7)}
    job = finished(files)
    with any_database.for_tenant("default").write() as session:
        for artifact in job["artifacts"][:3]:
            session.add(
                ModelFile(model_id=job["model"], path=artifact["path"], sha256=artifact["sha256"], bytes=1)
            )
    assert expire(any_database, get_settings()).artifacts == 4
    assert expired(any_database) == {"3", "4", "5", "6"}


def test_what_is_due_is_found_by_index_among_many(
    thirty_days: None, any_database: Database, finished: Callable[..., Seen]
) -> None:
    job = finished()
    with any_database.write() as session:
        row = {"job_id": job["id"], "tenant_id": "default", "kind": "model", "media_type": "x", "bytes": 1}
        rows = [{**row, "id": f"art_{n}", "path": f"{n}", "sha256": f"{n}"} for n in range(3000)]
        session.execute(insert(Artifact), rows)
    with any_database.write() as session:
        postgresql = any_database.engine.dialect.name == "postgresql"
        if postgresql:
            session.execute(text("ANALYZE artifacts"))
        chosen = retention_queries.due_artifacts("default", days=30, since=0.0, limit=500)
        compiled = chosen.compile(any_database.engine, compile_kwargs={"literal_binds": True})
        explain = "EXPLAIN " if postgresql else "EXPLAIN QUERY PLAN "
        plan = "\n".join(str(row[-1]) for row in session.execute(text(explain + str(compiled))))
    assert "ix_artifacts_expiry" in plan, plan
    for sort in ("Sort", "TEMP B-TREE"):
        assert sort not in plan, plan


def test_old_entries_of_the_audit_log_go_in_batches(
    thirty_days: None, any_database: Database, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "_ENTRIES_BATCH", 2)
    with any_database.write() as session:
        session.add(Tenant(id="acme"))
        session.flush()
        set_retention(session, "acme", artifact_days=None, audit_days=0)
        for tenant in ("default", "acme"):
            for number, days_ago in enumerate((100, 95, 91, 89, 1)):
                entry = AuditEntry(
                    id=f"aud_{tenant}{number}", tenant_id=tenant, principal="p", call=f"{days_ago}"
                )
                entry.created_at = db_now() - days_ago * DAY
                session.add(entry)
                session.flush()
    assert expire(any_database, get_settings()).audit_entries == 3
    assert [entry["call"] for entry in client.get("/v1/audit").json()["items"]] == ["1", "89"]
    with any_database.read() as session:
        kept = select(func.count()).where(AuditEntry.tenant_id == "acme")
        assert session.execute(kept).scalar_one() == 5


def test_of_sweepers_at_once_each_file_is_marked_by_one(
    thirty_days: None, any_database: Database, finished: Callable[..., Seen]
) -> None:
    finished({f"{n}": ("model", b"x") for n in range(20)})
    counts: list[int] = []
    sweepers = [
        threading.Thread(target=lambda: counts.append(expire(any_database, get_settings()).artifacts))
        for _ in range(4)
    ]
    for sweeper in sweepers:
        sweeper.start()
    for sweeper in sweepers:
        sweeper.join()
    assert sum(counts) == 20
    with any_database.read() as session:
        assert session.execute(select(func.count()).select_from(Job)).scalar_one() == 1
