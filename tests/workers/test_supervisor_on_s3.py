"""A worker whose store is S3: inputs come over the network and results go back, with no disk in common with anybody."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from bench import STAGES, Bench
from s3_server import S3Server

from app.db import job_queries
from app.settings import Settings, get_settings
from app.storage import get_store

ALL = len(STAGES)
FINISHED = ("emit", {"type": "finished", "verdict": "accepted"})


@pytest.fixture
def s3_bench(s3_server: S3Server, use_s3: Callable[..., Settings], request: pytest.FixtureRequest) -> Bench:
    use_s3(s3_server)
    return request.getfixturevalue("fast_bench")


def test_a_job_that_moves_to_another_machine_starts_over_and_is_published(s3_bench: Bench) -> None:
    job_id = s3_bench.submit()
    script = [("stages", 2), ("once", str(s3_bench.directory / "died")), ("stages", ALL), FINISHED]
    assert s3_bench.supervisor(*script).run(job_id) == "queued"
    assert s3_bench.job(job_id).stage == 2
    here = get_settings()
    fetched = here.scratch_dir / job_id / "inputs" / "model" / "model.safetensors"
    assert fetched.read_bytes() == b"a model"

    s3_bench.due_now(job_id)
    there = here.model_copy(update={"data_dir": s3_bench.directory / "another-machine"})
    assert s3_bench.supervisor(*script, settings=there).run(job_id) == "succeeded"
    assert any(
        "stages 1 to 2 are done again" in data.get("message", "") for _, data in s3_bench.events(job_id)
    )
    with s3_bench.database.read() as session:
        weights = job_queries.list_artifacts(session, job_id)[0]
    with get_store().open(weights.sha256) as file:
        assert file.read() == b"weights of stage %d" % STAGES.index("export")
    assert not (there.scratch_dir / job_id).exists()


def test_a_worker_told_to_leave_does_not_finish_fetching_first(s3_bench: Bench) -> None:
    job_id = s3_bench.submit()
    assert s3_bench.supervisor(FINISHED, draining=lambda: True).run(job_id) == "queued"
    assert not (get_settings().scratch_dir / job_id / "inputs").exists()
    assert s3_bench.supervisor(("stages", ALL), FINISHED).run(job_id) == "succeeded"
