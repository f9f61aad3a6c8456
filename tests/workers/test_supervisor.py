"""The supervisor with real processes, pipes, files and databases; only what the job's process does is scripted."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest
from bench import STAGES, Bench
from waiting import wait_until

from app.db import job_claims, job_moves, job_queries
from app.settings import Settings, get_settings
from app.storage import get_store
from workers import supervisor
from workers.scratch import Scratch

pytestmark = pytest.mark.timed

ALL = len(STAGES)
FINISHED = ("emit", {"type": "finished", "verdict": "accepted"})


def test_a_job_runs_to_its_end_and_its_files_are_published(bench: Bench) -> None:
    job_id = bench.submit()
    assert bench.supervisor(("stages", ALL), FINISHED).run(job_id) == "succeeded"
    job = bench.job(job_id)
    assert (job.status, job.verdict, job.stage, job.progress) == ("succeeded", "accepted", ALL, 1.0)
    with bench.database.read() as session:
        artifacts = job_queries.list_artifacts(session, job_id)
        stages = job_queries.list_stages(session, job_id)
    assert [(a.kind, a.path) for a in artifacts] == [
        ("model", "weights.bin"), ("report", "report.json"), ("report_html", "report.html"),
    ]  # fmt: skip
    exported = STAGES.index("export")
    assert get_store().path_of(artifacts[0].sha256).read_bytes() == b"weights of stage %d" % exported
    assert {stage.status for stage in stages} == {"done"}
    assert not (get_settings().scratch_dir / job_id).exists()


def test_second_delivery_does_nothing(bench: Bench) -> None:
    job_id = bench.submit()
    bench.supervisor(("stages", ALL), FINISHED).run(job_id)
    before = bench.events(job_id)
    assert bench.supervisor(("stages", ALL), FINISHED).run(job_id) == "not_claimed"
    assert bench.events(job_id) == before


def test_a_delivery_while_the_job_runs_does_nothing(bench: Bench) -> None:
    job_id = bench.submit()
    with bench.database.write() as session:
        assert job_claims.claim_job(session, job_id, owner="first", lease_seconds=60)
    assert bench.supervisor(("stages", ALL), FINISHED).run(job_id) == "not_claimed"
    assert bench.job(job_id).attempt == 1


def test_a_killed_process_is_tried_again_from_the_last_committed_stage(bench: Bench) -> None:
    job_id = bench.submit()
    marker = bench.directory / "died"
    script = [("stages", 2), ("once", str(marker)), ("stages", ALL), FINISHED]
    assert bench.supervisor(*script).run(job_id) == "queued"
    job = bench.job(job_id)
    assert (job.stage, job.error["code"]) == (2, "process_died")
    bench.due_now(job_id)
    assert bench.supervisor(*script).run(job_id) == "succeeded"
    with bench.database.read() as session:
        fences = [stage.metrics["fence"] for stage in job_queries.list_stages(session, job_id)]
    assert fences == [1, 1, *[2] * (ALL - 2)], "the first two stages must not have run twice"


def test_stages_whose_files_are_elsewhere_are_done_again_and_it_is_said(fast_bench: Bench) -> None:
    job_id = fast_bench.submit()
    script = [("stages", 2), ("once", str(fast_bench.directory / "died")), ("stages", ALL), FINISHED]
    fast_bench.supervisor(*script).run(job_id)
    for path in (get_settings().scratch_dir / job_id / "stages" / "01-1").iterdir():
        if path.is_file():
            path.unlink()
    fast_bench.due_now(job_id)
    assert fast_bench.supervisor(*script).run(job_id) == "succeeded"
    logs = [data["message"] for kind, data in fast_bench.events(job_id) if kind == "log"]
    assert any("stages 2 to 2 are done again" in message for message in logs)


def test_attempts_end(bench: Bench) -> None:
    job_id = bench.submit()
    for expected in ("queued", "queued", "failed"):
        bench.due_now(job_id)
        assert bench.supervisor(("die", signal.SIGKILL)).run(job_id) == expected
    job = bench.job(job_id)
    assert (job.status, job.attempt) == ("failed", 3)
    assert "was killed by the system" in job.error["detail"]


def test_an_error_of_the_engine_fails_the_job_at_once(bench: Bench) -> None:
    job_id = bench.submit()
    failed = {"type": "failed", "code": "unsupported", "detail": "no", "hint": "do this", "stage": "load"}
    assert bench.supervisor(("emit", failed)).run(job_id) == "failed"
    assert bench.job(job_id).error == {
        "code": "unsupported",
        "detail": "no",
        "hint": "do this",
        "stage": "load",
    }


def test_a_cancel_ends_the_whole_process_group_within_two_seconds(bench: Bench) -> None:
    job_id = bench.submit()
    pid_file = bench.directory / "pid"
    script = [("ignore_sigterm",), ("grandchild", str(pid_file)), ("sleep", 600)]
    supervisor = bench.supervisor(*script)
    outcome: list[str] = []
    thread = threading.Thread(target=lambda: outcome.append(supervisor.run(job_id)))
    thread.start()
    wait_until(lambda: pid_file.exists() and pid_file.read_text())
    grandchild = psutil.Process(int(pid_file.read_text()))
    with bench.database.write() as session:
        assert job_moves.request_cancel(session, job_id) == "cancelling"
    began = time.monotonic()
    thread.join(timeout=10)
    assert time.monotonic() - began < 2
    assert outcome == ["cancelled"]
    assert bench.job(job_id).status == "cancelled"
    assert _is_gone(grandchild)


def test_a_process_is_told_to_stop_training_and_ends_by_itself(bench: Bench) -> None:
    job_id = bench.submit()
    supervisor = bench.supervisor(("stages", 2), ("wait_for_stop",), ("stages", ALL), FINISHED)
    outcome: list[str] = []
    thread = threading.Thread(target=lambda: outcome.append(supervisor.run(job_id)))
    thread.start()
    wait_until(lambda: bench.job(job_id).stage == 2)
    with bench.database.write() as session:
        assert job_moves.request_best(session, job_id)
    thread.join(timeout=10)
    assert outcome == ["succeeded"]
    assert bench.job(job_id).status == "succeeded"


def test_a_queued_job_is_cancelled_at_once_and_never_claimed(bench: Bench) -> None:
    job_id = bench.submit()
    with bench.database.write() as session:
        assert job_moves.request_cancel(session, job_id) == "cancelled"
        assert job_moves.request_cancel(session, job_id) is None
    assert bench.supervisor(FINISHED).run(job_id) == "not_claimed"


def test_a_worker_that_lost_its_lease_changes_nothing(bench: Bench) -> None:
    """The old one wakes up with a result in its hands after another has taken the job and ended it."""
    job_id = bench.submit()
    held = bench.directory / "go"
    slow = bench.supervisor(("stages", 2), ("sleep", 1.5), ("stages", ALL), FINISHED)
    outcome: list[str] = []
    thread = threading.Thread(target=lambda: outcome.append(slow.run(job_id)))
    thread.start()
    wait_until(lambda: bench.job(job_id).stage == 2)
    _expire_lease(bench, job_id)
    assert bench.supervisor(("stages", ALL), FINISHED).run(job_id) == "succeeded"
    before = bench.events(job_id)
    thread.join(timeout=10)
    assert outcome == ["lost"]
    assert bench.events(job_id) == before
    assert [data["status"] for kind, data in before if kind == "status"].count("succeeded") == 1
    assert not held.exists()


def test_sweeping_takes_a_job_back_from_a_dead_worker(bench: Bench) -> None:
    job_id = bench.submit()
    with bench.database.write() as session:
        job_claims.claim_job(session, job_id, owner="dead", lease_seconds=-1)
    with bench.database.write() as session:
        assert [(s.job_id, s.status) for s in job_moves.sweep_lost(session)] == [(job_id, "queued")]
        assert job_moves.sweep_lost(session) == []
        assert job_moves.take_undispatched(session, stale_seconds=60) == [(job_id, "cpu")]
        assert job_moves.take_undispatched(session, stale_seconds=60) == []


def test_sweeping_ends_a_cancelled_job_of_a_dead_worker(bench: Bench) -> None:
    job_id = bench.submit()
    with bench.database.write() as session:
        job_claims.claim_job(session, job_id, owner="dead", lease_seconds=-1)
        job_moves.request_cancel(session, job_id)
    with bench.database.write() as session:
        assert [s.status for s in job_moves.sweep_lost(session)] == ["cancelled"]
    job = bench.job(job_id)
    assert job.status == "cancelled"
    assert job.ended_at is not None
    assert job.error is None


@pytest.mark.parametrize("ends_by", ["shutdown", "fault"])
def test_a_job_whose_cancel_was_not_seen_yet_is_cancelled_and_never_queued_again(
    bench: Bench, ends_by: str
) -> None:
    job_id = bench.submit()
    with bench.database.write() as session:
        claim = job_claims.claim_job(session, job_id, owner="leaving", lease_seconds=60)
        assert claim
        job_moves.request_cancel(session, job_id)
    with bench.database.write() as session:
        if ends_by == "shutdown":
            assert job_claims.release(session, claim) == "cancelled"
        else:
            error = {"code": "worker_io"}
            assert job_claims.give_back(session, claim, error, delay_seconds=1) == "cancelled"
    job = bench.job(job_id)
    assert job.status == "cancelled"
    assert job.ended_at is not None
    assert job.error is None
    assert bench.events(job_id)[-1][1] == {"status": "cancelled"}


def test_a_shutting_down_worker_gives_its_job_back_and_the_attempt_does_not_count(bench: Bench) -> None:
    job_id = bench.submit()
    began = time.monotonic()
    supervisor = bench.supervisor(
        ("stages", 1), ("sleep", 600), draining=lambda: time.monotonic() > began + 1
    )
    assert supervisor.run(job_id) == "queued"
    job = bench.job(job_id)
    assert (job.status, job.attempt, job.stage) == ("queued", 0, 1)


def test_memory_over_budget_ends_the_job_with_both_numbers(fast_bench: Bench) -> None:
    job_id = fast_bench.submit(memory_budget=256 * 2**20)
    outcome = fast_bench.supervisor(("allocate", 400 * 2**20), ("sleep", 600)).run(job_id)
    assert outcome == "failed"
    error = fast_bench.job(job_id).error
    assert error["code"] == "out_of_memory"
    assert "0.25 GiB" in error["detail"]


def test_a_job_that_fills_the_disk_is_ended_and_its_files_go(
    fast_bench: Bench, override_settings: Callable[..., Settings]
) -> None:
    job_id = fast_bench.submit()
    override_settings(min_free_disk_bytes=2**60)
    assert fast_bench.supervisor(("stages", 2), ("sleep", 600)).run(job_id) == "queued"
    assert fast_bench.job(job_id).error["code"] == "disk_full"
    assert not (get_settings().scratch_dir / job_id).exists()
    override_settings(min_free_disk_bytes=0)
    fast_bench.due_now(job_id)
    assert fast_bench.supervisor(("stages", ALL), FINISHED).run(job_id) == "succeeded"


def test_a_job_over_its_time_is_ended(fast_bench: Bench) -> None:
    job_id = fast_bench.submit(timeout_seconds=1)
    assert fast_bench.supervisor(("sleep", 600)).run(job_id) == "failed"
    assert fast_bench.job(job_id).error["code"] == "timeout"


@pytest.mark.parametrize(
    "line",
    [
        "not json\n",
        '{"type":"nonsense"}\n',
        '{"type":"stage_done","stage":0,"directory":"../../etc","metrics":{}}\n',
        '{"type":"stage_started","stage":99}\n',
        '{"type":"finished","verdict":"accepted"}\n',
    ],
)
def test_anything_but_an_event_on_the_pipe_fails_the_job(fast_bench: Bench, line: str) -> None:
    job_id = fast_bench.submit()
    assert fast_bench.supervisor(("raw", line), ("sleep", 600)).run(job_id) == "failed"
    assert fast_bench.job(job_id).error["code"] == "protocol"


def test_a_link_among_the_results_is_not_followed(fast_bench: Bench) -> None:
    """The worker may read what the job's process may not: its database, other tenants' models."""
    secret = fast_bench.directory / "secret"
    secret.write_text("secret")
    job_id = fast_bench.submit()
    script = [("stages", ALL), ("link_result", STAGES.index("export"), str(secret)), FINISHED]
    assert fast_bench.supervisor(*script).run(job_id) == "failed"
    assert fast_bench.job(job_id).error["code"] == "result_refused"
    assert all(get_store().path_of(blob.sha256).read_text() != "secret" for blob in get_store().iter_blobs())


@pytest.mark.parametrize(
    "flood",
    [("flood", 200), ("raw", '{"type":"progress","stage":0,"fraction":1,"message":"m"}\n' * 51)],
    ids=["logs", "finished progress"],
)
def test_a_flood_of_events_fails_the_job(
    fast_bench: Bench, flood: tuple[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "_MAX_EVENTS", 50)
    job_id = fast_bench.submit()
    assert fast_bench.supervisor(flood, ("sleep", 600)).run(job_id) == "failed"
    assert fast_bench.job(job_id).error["code"] == "protocol"
    assert len([kind for kind, _ in fast_bench.events(job_id) if kind == "log"]) <= 50


def test_a_flood_of_warnings_fails_the_job(fast_bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "_MAX_WARNINGS", 5)
    job_id = fast_bench.submit()
    warnings = [("emit", {"type": "warning", "message": str(number)}) for number in range(6)]
    assert fast_bench.supervisor(*warnings, ("sleep", 600)).run(job_id) == "failed"
    assert fast_bench.job(job_id).error["code"] == "protocol"
    assert len(fast_bench.job(job_id).warnings) == 5


def test_a_long_log_is_not_read_whole(fast_bench: Bench) -> None:
    scratch = Scratch(get_settings(), "job_x")
    scratch.directory.mkdir(parents=True)
    with scratch.log_file(1).open("wb") as log:
        log.truncate(2**40)
        log.seek(2**40)
        log.write(b"\nlast words")
    assert scratch.log_tail(1).endswith("last words")


def test_the_process_sees_no_credential(fast_bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cret")
    monkeypatch.setenv("DATABASE_URL", "")
    job_id = fast_bench.submit()
    seen = fast_bench.directory / "environment"
    fast_bench.supervisor(("environment", str(seen)), ("stages", ALL), FINISHED).run(job_id)
    text = seen.read_text()
    assert "s3cret" not in text
    assert "DATABASE_URL" not in text
    assert "REDIS_URL" not in text


def test_retry_goes_on_where_a_failed_job_stopped(bench: Bench) -> None:
    job_id = bench.submit()
    failed = {"type": "failed", "code": "x", "detail": "no"}
    assert bench.supervisor(("stages", 2), ("emit", failed)).run(job_id) == "failed"
    with bench.database.write() as session:
        assert job_moves.retry_job(session, job_id)
        assert not job_moves.retry_job(session, job_id)
    assert bench.supervisor(("stages", ALL), FINISHED).run(job_id) == "succeeded"
    assert bench.job(job_id).error is None


def test_a_deleted_input_fails_the_job_by_name(fast_bench: Bench) -> None:
    job_id = fast_bench.submit()
    blobs = list(get_store().iter_blobs())
    get_store().delete(blobs[0].sha256)
    assert fast_bench.supervisor(FINISHED).run(job_id) == "failed"
    assert fast_bench.job(job_id).error["code"] == "blob_missing"


def _expire_lease(bench: Bench, job_id: str) -> None:
    with bench.database.write() as session:
        job = job_queries.get_job(session, job_id)
        assert job is not None
        job.lease_until = 0.0


def _is_gone(process: psutil.Process) -> bool:
    # An orphan in a container without an init stays a zombie: dead all the same.
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
