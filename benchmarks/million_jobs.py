"""Lists and claims with 1,000,000 jobs in the table, against the same with 1,000, on a real PostgreSQL.

Usage: .venv/bin/python benchmarks/million_jobs.py [--jobs 1000000] [--keep]

Fills a server of its own with jobs of one tenant (of a thousand models and ten teams, one in a hundred queued, at most
10,000, and a few running), then times the service's own statements, each call in a session of its own as a request has it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

from figures import Figures
from sqlalchemy import text
from sqlalchemy.orm import Session

from app.access import DEFAULT_TENANT
from app.db import job_claims, job_queries, job_turns, quota_queries
from app.db.engine import Database

sys.path.append(str(Path(__file__).parents[1] / "tests"))

FEW = 1000
MAX_RATIO = 3.0
REPEATS = 60
SUMS = ("count_stored_bytes",)
"""Those that add up all rows of a tenant: asked when bytes come, not when a job is looked for."""

_JOBS = """
INSERT INTO jobs (id, tenant_id, model_id, model_name, spec, technique, labels, queue, priority, status, stage, attempt,
                  max_attempts, fence, cancel_requested, progress, event_count, warnings, created_at, queued_at, dispatched_at)
SELECT 'job_' || lpad(n::text, 12, '0'), 'default', 'mdl_' || n % 1000, 'm', '{"steps": []}', 'quantize.rtn',
       json_build_object('team', (n % 10)::text), 'cpu', 1,
       CASE WHEN n % 5000 = 0 THEN 'running' WHEN n % 100 = 1 THEN 'queued' WHEN n % 50 = 2 THEN 'failed' ELSE 'succeeded' END,
       0, 1, 3, 1, false, 0, 3, '[]', n, n, n
FROM generate_series(1, :jobs) AS n
"""
_LABELS = "INSERT INTO job_labels SELECT tenant_id, 'team', labels ->> 'team', id FROM jobs"
_ARTIFACTS = """
INSERT INTO artifacts (id, tenant_id, job_id, kind, path, media_type, sha256, bytes, created_at)
SELECT replace(id, 'job', 'art'), tenant_id, id, 'model', 'm', 'm', md5(id), 1000, created_at FROM jobs WHERE status = 'succeeded'
"""
_LEASES = "UPDATE jobs SET lease_owner = 'w', lease_until = 1e12 WHERE status = 'running'"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=1_000_000)
    parser.add_argument("--keep", action="store_true", help="keep the figures under results/")
    args = parser.parse_args()
    figures = Figures("million_jobs" if args.keep else None)
    few, many = measure(FEW), measure(args.jobs)
    for name, milliseconds in many.items():
        ratio = milliseconds / few[name]
        bar = None if name in SUMS else f"<= {MAX_RATIO}"
        figures.add(
            name, ratio, "ratio", floor=bar, ok=bar is None or ratio <= MAX_RATIO,
            compared_with=f"{FEW} jobs: p50 {few[name]:.2f} ms; {args.jobs} jobs: {milliseconds:.2f} ms",
        )  # fmt: skip
    figures.exit()


def measure(jobs: int) -> dict[str, float]:
    """Median milliseconds of each statement on a table of so many jobs."""
    from servers import migrate, own_postgres

    with own_postgres() as server:
        url = str(server.get_uri()).replace("postgresql://", "postgresql+psycopg://", 1)
        migrate(url)
        database = Database(url)
        fill(database, jobs)
        tenant = database.for_tenant(DEFAULT_TENANT)
        newest = f"job_{jobs:012d}"
        found = {name: timed(tenant.read, call) for name, call in reads(newest, jobs).items()}
        found["claim_next"] = timed(database.write, lambda session: claim(session, newest))
        database.engine.dispose()
    return found


def fill(database: Database, jobs: int) -> None:
    with database.write() as session:
        session.execute(text(_JOBS), {"jobs": jobs})
        session.execute(text(_LABELS))
        session.execute(text(_LEASES))
        session.execute(text(_ARTIFACTS))
    with database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("VACUUM ANALYZE"))


def reads(newest: str, jobs: int) -> dict[str, Callable[[Session], object]]:
    def page(**narrowed: object) -> Callable[[Session], object]:
        wanted = {"status": None, "model_id": None, "labels": {}, "after": None, "limit": 21} | narrowed
        return lambda session: job_queries.list_jobs(session, **wanted)  # type: ignore[arg-type]

    middle = f"job_{jobs // 2:012d}"
    return {
        "get_job": lambda session: job_queries.get_job(session, newest),
        "list_newest": page(),
        "list_from_the_middle": page(after=middle),
        "list_by_status": page(status="failed", after=middle),
        "list_by_model": page(model_id="mdl_7"),
        "list_by_label": page(labels={"team": "7"}),
        "list_by_label_nobody_has": page(labels={"team": "none"}),
        "list_by_status_and_label": page(status="failed", labels={"team": "2"}),
        "list_by_two_labels_nobody_has": page(labels={"team": "7", "other": "none"}),
        "count_queued": lambda session: quota_queries.count_jobs(session, "queued"),
        "count_stored_bytes": quota_queries.count_stored_bytes,
        "count_events_of_200": lambda session: job_queries.count_events(
            session, [f"job_{jobs - n:012d}" for n in range(200)]
        ),
    }


def claim(session: Session, hint: str) -> None:
    """Take a job and give it back, so that the next call finds the same."""
    taken = job_turns.claim_next(session, hint, owner="w", lease_seconds=60)
    if taken is None:
        raise RuntimeError("there was no job to take")
    job_claims.release(session, taken)


def timed(session_of: Callable[[], object], call: Callable[[Session], object]) -> float:
    taken = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        with session_of() as session:  # type: ignore[attr-defined]
            call(session)
        taken.append(1000 * (time.perf_counter() - started))
    return statistics.median(taken)


if __name__ == "__main__":
    main()
