"""Jobs as JSON for all who poll them: one look into the database for all calls that came during the one before."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection

from app.api.together import Together
from app.db.engine import get_database
from app.services import jobs
from app.threads import READS, PerLoop

Question = tuple[str, str]
"""A tenant, and the id of a job."""


def _read(questions: Collection[Question]) -> dict[Question, bytes]:
    """Each tenant's jobs in a session of that tenant."""
    by_tenant: defaultdict[str, list[str]] = defaultdict(list)
    for tenant, job_id in questions:
        by_tenant[tenant].append(job_id)
    found = {}
    for tenant, job_ids in by_tenant.items():
        with get_database().for_tenant(tenant).read() as session:
            for view in jobs.read_jobs(session, job_ids):
                found[tenant, view.id] = view.model_dump_json(by_alias=True).encode()
    return found


job_reads = PerLoop("job_reads", lambda: Together(_read, READS))
