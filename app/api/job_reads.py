"""Jobs as JSON for all who poll them: one look into the database for all calls that came during the one before."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection

from anyio.lowlevel import RunVar

from app.api.together import Together
from app.db.engine import get_database
from app.services import jobs
from app.threads import READS

Question = tuple[str, str]
"""A tenant, and the id of a job."""


def job_reads() -> Together[Question, bytes]:
    """That of the running event loop."""
    try:
        return _reads.get()
    except LookupError:
        reads = Together(_read, READS)
        _reads.set(reads)
        return reads


_reads: RunVar[Together[Question, bytes]] = RunVar("job_reads")


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
