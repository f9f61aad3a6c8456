"""The tasks a worker carries out: two or three lines each."""

from __future__ import annotations

from app.db.engine import get_database
from app.queue import RUN_JOB
from app.settings import get_settings
from app.storage import get_store
from workers import hardware
from workers.celery_app import app, draining, sandbox_level
from workers.supervisor import Supervisor


@app.task(name=RUN_JOB)  # type: ignore[untyped-decorator]
def run_job(job_id: str) -> None:
    """Run a job, if nobody else does."""
    device = "cuda" if hardware.gpus() else "cpu"
    supervisor = Supervisor(
        get_settings(), get_database(), get_store(), sandbox_level(), device=device, draining=draining
    )
    supervisor.run(job_id)
