"""What tests of the supervisor work with: a queued job, and a supervisor whose job process follows a script."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from app.access import DEFAULT_TENANT
from app.db import job_moves, job_queries, model_queries
from app.db.engine import Database
from app.db.tables import Job, Model, ModelFile
from app.ids import new_id
from app.settings import get_settings
from app.spec.recipes import RECIPES
from app.storage import get_store
from workers.supervisor import Supervisor

SCRIPTED_JOB = Path(__file__).parent / "scripted_job.py"
STAGES = RECIPES["int8"].spec.stage_names()


@dataclass(frozen=True)
class Bench:
    """What a test of the supervisor works with."""

    database: Database
    directory: Path

    def supervisor(self, *script: tuple[Any, ...], **changes: Any) -> Supervisor:
        """A supervisor whose job process carries out a script. `changes` are fields of the supervisor."""
        path = self.directory / f"script-{len(list(self.directory.glob('script-*')))}.json"
        path.write_text(json.dumps(script))
        made = Supervisor(
            get_settings(),
            self.database,
            get_store(),
            # Scripts and what they leave are outside of the job's directory.
            "process",
            job_command=(sys.executable, "-I", str(SCRIPTED_JOB), str(path)),
        )
        return replace(made, **changes)

    def submit(self, tenant: str = DEFAULT_TENANT, **resources: Any) -> str:
        """Queue a job on a model of one small file."""
        spec = RECIPES["int8"].spec.model_dump(mode="json")
        spec["resources"] |= resources
        with self.database.for_tenant(tenant).write() as session:
            blob = get_store().put_stream([b"a model"])
            model_id = new_id("mdl")
            model = Model(
                id=model_id, name="m", format="safetensors", architecture="A", family="encoder", parameters=1,
                dtype="F32", bytes=7, sha256=blob.sha256, facts={}, source="upload",
            )  # fmt: skip
            model_queries.add_model(
                session,
                model,
                [ModelFile(model_id=model_id, path="model.safetensors", sha256=blob.sha256, bytes=7)],
            )
            job = Job(
                id=new_id("job"), model_id=model_id, model_name="m", spec=spec, technique="quantize.weights",
                queue="cpu", max_attempts=3,
            )  # fmt: skip
            job_moves.create_job(session, job, STAGES)
        return job.id

    def due_now(self, job_id: str) -> None:
        """Let a job that was given back be claimed at once."""
        with self.database.write() as session:
            session.get_one(Job, job_id).run_after = None

    def job(self, job_id: str) -> Job:
        """The job as it is now."""
        with self.database.read() as session:
            return session.get_one(Job, job_id)

    def events(self, job_id: str) -> list[tuple[str, dict[str, Any]]]:
        """The job's events as they are now."""
        with self.database.read() as session:
            found = job_queries.list_events(session, job_id, after=0, limit=1000)
            assert [event.number for event in found] == list(range(1, len(found) + 1))
            return [(event.type, event.data) for event in found]
