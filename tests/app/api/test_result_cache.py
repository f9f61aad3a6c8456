"""A job that an earlier one did already ends at once with its files, and with nobody else's."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fastapi.testclient import TestClient
from job_support import claim, finish
from key_support import MakeKey, bearer
from model_files import llama_files, zipped
from sqlalchemy import update

from app.access import DEFAULT_TENANT
from app.db import job_claims, job_moves
from app.db.engine import Database
from app.db.quota_queries import Limits
from app.db.tables import Dataset, Job, Model
from app.services import jobs
from app.services.jobs import Submission
from app.services.planning import Wish
from app.services.quotas import set_limits
from app.settings import get_settings
from app.storage import get_store

AddModel = Callable[..., str]
FILES = {
    "model.safetensors": ("model", b"w" * 3000),
    "report.json": ("report", b'{"version": 1}'),
    "report.html": ("report_html", b"<html>"),
}
CALIBRATED = [{"technique": "quantize.calibrated", "bits": 4}]


def submit(client: TestClient, model: str, **body: Any) -> dict[str, Any]:
    wish = {} if "spec" in body else {"recipe": "int8"}
    answer = client.post("/v1/jobs", json={"model": model, **wish, **body})
    assert answer.status_code == 202, answer.text
    return dict(answer.json())


def run(database: Database, job: dict[str, Any], *, verdict: str = "accepted") -> dict[str, Any]:
    """Have a worker end the job well."""
    finish(database, claim(database, job["id"]), FILES, verdict=verdict)
    return job


def change(database: Database, table: type[Any], row_id: str, **values: Any) -> None:
    with database.write() as session:
        session.execute(update(table).where(table.id == row_id).values(**values))


def test_the_same_job_again_has_the_earlier_result_at_once_and_says_whose(
    any_database: Database, client: TestClient, add_model: AddModel
) -> None:
    first = submit(client, add_model())
    taken = claim(any_database, first["id"])
    with any_database.write() as session:
        assert job_claims.start_stage(session, taken, 0)
        assert job_claims.commit_stage(session, taken, 0, "stages/00-1", {"seconds": 2.5})
        assert job_claims.add_warning(session, taken, "builtin_text: use your own")
    finish(any_database, taken, FILES, verdict="unmeasured")
    webhook = client.post("/v1/webhooks", json={"url": "https://93.184.215.14/"}).json()
    again = submit(client, add_model(), name="again", labels={"a": "b"})
    assert (again["status"], again["verdict"], again["result_of"]) == ("succeeded", "unmeasured", first["id"])
    assert (again["name"], again["labels"], again["progress"], again["attempt"]) == (
        "again",
        {"a": "b"},
        1,
        0,
    )
    assert (again["started_at"], again["durations"]["running"]) == (None, None)
    assert again["warnings"] == ["builtin_text: use your own"]
    assert {stage["status"] for stage in again["stages"]} == {"done"}
    assert again["stages"][0]["metrics"] == {"seconds": 2.5}
    earlier = client.get(first["urls"]["self"]).json()
    assert earlier["result_of"] is None
    same = [
        {(a["path"], a["kind"], a["sha256"], a["bytes"]) for a in job["artifacts"]}
        for job in (earlier, again)
    ]
    assert same[0] == same[1] != set()
    assert not {a["id"] for a in earlier["artifacts"]} & {a["id"] for a in again["artifacts"]}
    events = client.get(again["urls"]["events"]).json()["items"]
    assert [(e["number"], e["data"]) for e in events] == [
        (1, {"status": "queued"}),
        (2, {"status": "succeeded", "verdict": "unmeasured", "result_of": first["id"]}),
    ]
    assert client.get(again["urls"]["result"]).json()["result_of"] == first["id"]
    assert client.get(again["urls"]["report"]).json() == {"version": 1}
    told = client.get(webhook["urls"]["messages"]).json()["items"]
    assert [(m["type"], m["data"]["job"], m["data"]["result_of"]) for m in told] == [
        ("job.succeeded", again["id"], first["id"])
    ]
    with any_database.write() as session:
        assert job_moves.take_undispatched(session, stale_seconds=0) == []
        assert job_claims.claim_job(session, again["id"], owner="w", lease_seconds=60) is None


def test_data_counts_by_its_bytes_and_whatever_decides_the_result_counts(
    any_database: Database, client: TestClient, add_model: AddModel, add_dataset: Callable[..., str]
) -> None:
    model, data, same, other = add_model(), add_dataset(), add_dataset(), add_dataset()
    change(any_database, Dataset, other, sha256="2" * 64)

    def spec(dataset: str | None = data, **changes: Any) -> dict[str, Any]:
        return {"steps": CALIBRATED, "calibration": {"dataset": dataset}} | changes

    first = run(any_database, submit(client, model, spec=spec()))
    assert submit(client, model, spec=spec(same))["result_of"] == first["id"]
    different = [
        spec(other),
        spec(None),
        spec(seed=1),
        spec(acceptance={"max_kl": 1.0}),
        spec(steps=[CALIBRATED[0] | {"bits": 8}]),
    ]
    for changed in different:
        assert submit(client, model, spec=changed)["status"] == "queued", changed
    assert submit(client, model, spec=spec(), use_cache=False)["status"] == "queued"
    assert submit(client, add_model(parameters=7), spec=spec())["status"] == "queued"
    bytes_changed = add_model()
    change(any_database, Model, bytes_changed, sha256="3" * 64)
    assert submit(client, bytes_changed, spec=spec())["status"] == "queued"


def test_an_uploaded_student_counts_by_its_bytes(
    database: Database, client: TestClient, add_model: AddModel
) -> None:
    def spec(student: str) -> dict[str, Any]:
        source = {"source": "model", "model": student}
        return {"steps": [{"technique": "distill.logits", "sequence_length": 64, "student": source}]}

    teacher, student = add_model(), add_model()
    first = run(database, submit(client, teacher, spec=spec(student)))
    assert submit(client, teacher, spec=spec(add_model()))["result_of"] == first["id"]
    change(database, Model, student, sha256="3" * 64)
    assert submit(client, teacher, spec=spec(student))["status"] == "queued"


def test_what_is_no_whole_good_result_of_this_version_is_not_used_again(
    any_database: Database, client: TestClient, add_model: AddModel
) -> None:
    model = add_model()
    failed, cancelled, old = (submit(client, model) for _ in range(3))
    with any_database.write() as session:
        taken = job_claims.claim_job(session, failed["id"], owner="test", lease_seconds=60)
        assert taken is not None
        job_claims.fail(session, taken, {"code": "x", "detail": "y"})
    client.post(cancelled["urls"]["cancel"])
    run(any_database, submit(client, model), verdict="rejected")
    run(any_database, old)
    change(any_database, Job, old["id"], engine_version="0.0.1")
    stopped = submit(client, model, use_cache=False)
    taken = claim(any_database, stopped["id"])
    with any_database.write() as session:
        assert job_moves.request_best(session, stopped["id"])
    finish(any_database, taken, FILES)
    assert submit(client, model)["status"] == "queued"


def test_a_result_that_two_versions_worked_on_is_not_used_again(
    database: Database, client: TestClient, add_model: AddModel
) -> None:
    model = add_model()
    job = submit(client, model)
    taken = claim(database, job["id"])
    with database.write() as session:
        assert job_claims.start_stage(session, taken, 0)
        assert job_claims.commit_stage(session, taken, 0, "stages/00-1", {})
        job_claims.release(session, taken)
    change(database, Job, job["id"], engine_version="0.0.1")
    run(database, job)
    assert submit(client, model)["status"] == "queued"


def test_a_deleted_result_is_not_used_again_and_what_used_it_stays_whole(
    any_database: Database, client: TestClient, add_model: AddModel
) -> None:
    model = add_model()
    first = run(any_database, submit(client, model))
    second = submit(client, model)
    assert client.delete(first["urls"]["self"]).status_code == 204
    for artifact in second["artifacts"]:
        assert client.get(artifact["urls"]["content"]).content == FILES[artifact["path"]][1]
    third = submit(client, model)
    assert third["result_of"] == second["result_of"] == first["id"]
    for job in (second, third):
        assert client.delete(job["urls"]["self"]).status_code == 204
    assert not list(get_store().iter_blobs())
    assert submit(client, model)["status"] == "queued"


def test_another_tenant_runs_its_own(
    make_key: MakeKey, any_database: Database, client: TestClient, add_model: AddModel
) -> None:
    acme, umbrella = (bearer(make_key(tenant=name)) for name in ("acme", "umbrella"))

    def post(tenant: str, headers: dict[str, str]) -> dict[str, Any]:
        body = {"model": add_model(tenant=tenant), "recipe": "int8"}
        return dict(client.post("/v1/jobs", json=body, headers=headers).json())

    first = run(any_database, post("acme", acme))
    foreign = post("umbrella", umbrella)
    assert (foreign["status"], foreign["result_of"]) == ("queued", None)
    assert post("acme", acme)["result_of"] == first["id"]


def test_a_full_queue_does_not_hold_it_back_and_its_bytes_are_counted(
    any_database: Database, client: TestClient, add_model: AddModel
) -> None:
    model = add_model()
    run(any_database, submit(client, model))
    submit(client, model, use_cache=False)
    used = client.get("/v1/quota").json()["stored_bytes"]["used"]
    size = sum(len(content) for _, content in FILES.values())
    with any_database.write() as session:
        set_limits(session, "default", Limits(stored_bytes=used + size, queued_jobs=1))
    body = {"model": model, "recipe": "int8"}
    assert client.post("/v1/jobs", json=body | {"use_cache": False}).json()["code"] == "quota_queued_jobs"
    assert submit(client, model)["status"] == "succeeded"
    assert client.get("/v1/quota").json()["stored_bytes"]["used"] == used + size
    before = [job["id"] for job in client.get("/v1/jobs").json()["items"]]
    refused = client.post("/v1/jobs", json=body)
    assert (refused.status_code, refused.json()["code"]) == (403, "quota_stored_bytes")
    assert [job["id"] for job in client.get("/v1/jobs").json()["items"]] == before


def test_a_repeated_call_answers_with_the_job_it_made(
    database: Database, client: TestClient, add_model: AddModel
) -> None:
    body = {"model": add_model(), "recipe": "int8"}
    run(database, submit(client, body["model"]))
    answers = [client.post("/v1/jobs", json=body, headers={"Idempotency-Key": "k"}).json() for _ in "12"]
    assert answers[0] == answers[1]
    assert len(client.get("/v1/jobs").json()["items"]) == 2


def test_a_form_with_the_same_file_has_the_earlier_result_too(database: Database, client: TestClient) -> None:
    def compress(**fields: str) -> dict[str, Any]:
        file = {"file": ("tiny.zip", zipped(llama_files()))}
        return dict(client.post("/v1/compress", files=file, data={"recipe": "int8", **fields}).json())

    first = run(database, compress())
    assert compress(use_cache="")["result_of"] == first["id"]
    assert compress(use_cache="false")["status"] == "queued"


def test_a_result_that_is_deleted_while_it_is_given_keeps_its_files(
    any_database: Database, client: TestClient, add_model: AddModel
) -> None:
    model = add_model()
    first = run(any_database, submit(client, model))
    tenant = any_database.for_tenant(DEFAULT_TENANT)
    with ThreadPoolExecutor(1) as pool:
        with tenant.write() as session:
            wish = Wish(model, recipe="int8")
            job = jobs.submit_job(session, get_settings(), Submission(wish))
            deleting = pool.submit(client.delete, first["urls"]["self"])
            with pytest.raises(TimeoutError):
                deleting.result(timeout=0.5)
        assert deleting.result().status_code == 204
    assert (job.status, job.result_of) == ("succeeded", first["id"])
    for artifact in job.artifacts:
        assert client.get(artifact.urls.content).content == FILES[artifact.path][1]
