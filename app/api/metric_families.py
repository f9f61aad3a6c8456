"""What Prometheus is told. Jobs are counted in the database, so that it does not matter which process answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_LATEST as CONTENT_TYPE
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily, HistogramMetricFamily, Metric
from sqlalchemy.orm import Session

from app.db import import_queries, metric_queries, worker_queries, worker_time
from app.db.metric_queries import Durations

__all__ = ["CONTENT_TYPE", "exposition"]

_STATUSES = ("queued", "running", "succeeded", "failed", "cancelled")
_RUNNING_BOUNDS = (1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 4 * 3600.0, 24 * 3600.0)
_QUEUED_BOUNDS = (0.1, 0.5, 1.0, 5.0, 30.0, 120.0, 600.0, 3600.0)

_process = CollectorRegistry()
ProcessCollector(registry=_process)


def exposition(session: Session) -> bytes:
    """All metrics in Prometheus' text format: those of the database, then those of this process."""
    jobs = CollectorRegistry()
    jobs.register(_DatabaseCollector(session))
    return bytes(generate_latest(jobs) + generate_latest(_process))


class _DatabaseCollector:
    """Reads the database within one scrape."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def describe(self) -> Iterable[Metric]:
        """Nothing: registering must not read the database a second time."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Every metric that the database knows."""
        yield self._jobs()
        yield _histogram(
            "modelpress_job_duration_seconds",
            "Seconds from a job's first start to its end",
            metric_queries.running_seconds(self._session, _RUNNING_BOUNDS),
            _RUNNING_BOUNDS,
        )
        yield _histogram(
            "modelpress_job_queued_seconds",
            "Seconds a job waited for a worker, for jobs that have ended",
            metric_queries.queued_seconds(self._session, _QUEUED_BOUNDS),
            _QUEUED_BOUNDS,
        )
        yield self._bytes()
        yield self._worker_seconds()
        yield from self._uploads()
        yield self._imports()
        yield self._workers()

    def _jobs(self) -> Metric:
        jobs = GaugeMetricFamily("modelpress_jobs", "Jobs by queue and status", labels=("queue", "status"))
        counts = {(q, s): n for q, s, n in metric_queries.jobs_by_queue(self._session)}
        for queue in sorted({"cpu", "gpu"} | {queue for queue, _ in counts}):
            for status in _STATUSES:
                jobs.add_metric((queue, status), counts.get((queue, status), 0))
        return jobs

    def _bytes(self) -> Metric:
        stored = GaugeMetricFamily(
            "modelpress_stored_bytes", "Bytes kept, by what they are", labels=("kind",)
        )
        for kind, count in metric_queries.stored_bytes(self._session).items():
            stored.add_metric((kind,), count)
        return stored

    def _worker_seconds(self) -> Metric:
        used, _ = worker_time.used_this_month(self._session)
        about = "Seconds for which workers held jobs since the month began (UTC)"
        return GaugeMetricFamily("modelpress_worker_seconds_this_month", about, value=used)

    def _uploads(self) -> Iterator[Metric]:
        counts = GaugeMetricFamily("modelpress_uploads", "Uploads not yet used up", labels=("status",))
        sizes = GaugeMetricFamily("modelpress_upload_bytes", "Bytes announced by them", labels=("status",))
        found = {status: (n, size) for status, n, size in metric_queries.uploads_by_status(self._session)}
        for status in ("open", "importing", "completed", "failed"):
            number, size = found.get(status, (0, 0))
            counts.add_metric((status,), number)
            sizes.add_metric((status,), size)
        yield counts
        yield sizes

    def _imports(self) -> Metric:
        imports = GaugeMetricFamily(
            "modelpress_imports", "Imports by URL that have not ended", labels=("state",)
        )
        for state, number in import_queries.count_by_state(self._session).items():
            imports.add_metric((state,), number)
        return imports

    def _workers(self) -> Metric:
        workers = GaugeMetricFamily("modelpress_workers", "Workers seen lately, by queue", labels=("queue",))
        queues = [q for w in worker_queries.list_fresh(self._session) for q in w.queues.split(",")]
        for queue in sorted({"cpu", "gpu", *queues}):
            workers.add_metric((queue,), queues.count(queue))
        return workers


def _histogram(name: str, about: str, durations: Sequence[Durations], bounds: Sequence[float]) -> Metric:
    family = HistogramMetricFamily(name, about, labels=("technique", "outcome"))
    for d in durations:
        buckets = [(str(bound), float(count)) for bound, count in zip(bounds, d.below, strict=True)]
        family.add_metric(
            (d.technique, d.outcome), buckets=[*buckets, ("+Inf", float(d.count))], sum_value=d.total_seconds
        )
    return family
