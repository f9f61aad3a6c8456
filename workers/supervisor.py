"""Runs one job from claim to end: spawn its process, listen to it, keep the lease, commit stages, publish, or clean up.

Never imports torch. Once a write finds the lease lost, the process group is killed and nothing more is written.
"""

from __future__ import annotations

import os
import selectors
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog

from app.db import job_claims, job_turns
from app.db.engine import Database
from app.db.job_claims import Claim
from app.errors import JobFailed, ModelpressError, OutOfMemory, StorageFull, Unavailable
from app.settings import GIB, SandboxLevel, Settings
from app.storage import ArtifactStore
from workers import events, sandbox
from workers.attempt_spans import AttemptSpans
from workers.lease import CancelRequested, Lease, LeaseLost, write_patiently
from workers.publish import publish, store_files
from workers.scratch import Assignment, Scratch, read_assignment

# -I: neither the working directory nor PYTHONPATH can put a module in front of ours.
JOB_COMMAND = (sys.executable, "-I", "-m", "workers.job_process")
_POLL_SECONDS = 0.5
_PROGRESS_SECONDS = 1.0
_MAX_EVENT_BYTES = 1 << 20
_MAX_EVENTS = 20_000
_MAX_WARNINGS = 500
"""Of one attempt, progress aside, which is thinned out. Each is a row; a job on 200 layers sends some hundreds."""
_LEAVE_SECONDS = 30
"""A process that has closed its pipe has so long to end."""

_log = structlog.get_logger(__name__)


class _DiskFull(Unavailable):
    """The job is tried again, from its start: another may have filled the disk."""

    default_code = "disk_full"


class Draining(Exception):  # noqa: N818 - an outcome, not an error
    """This worker shuts down."""


@dataclass(frozen=True)
class Supervisor:
    """One worker's way of running jobs."""

    settings: Settings
    database: Database
    store: ArtifactStore
    sandbox_level: SandboxLevel
    device: str = "cpu"
    draining: Callable[[], bool] = lambda: False
    job_command: tuple[str, ...] = JOB_COMMAND
    """What runs a job; the job file and the number of the pipe are appended."""

    def run(self, job_id: str) -> str:
        """Run the job whose turn it is where `job_id` waits. Returns what became of it: a status, `queued`, `lost`, or
        `not_claimed`."""
        owner = f"{socket.gethostname()}:{os.getpid()}"
        seconds, memory = self.settings.lease_seconds, self.settings.worker_memory_bytes
        claim = write_patiently(
            self.database,
            lambda s: job_turns.claim_next(
                s, job_id, owner=owner, lease_seconds=seconds, memory_bytes=memory
            ),
        )
        if claim is None:
            return "not_claimed"
        with (
            AttemptSpans(claim, worker=owner) as spans,
            structlog.contextvars.bound_contextvars(
                job_id=claim.job_id, fence=claim.fence, **spans.log_fields()
            ),
        ):
            outcome = _Attempt(self, claim, spans).to_end()
            spans.describe({"job.outcome": outcome})
            _log.info("job_left", outcome=outcome, attempt=claim.attempt)
        return outcome


@dataclass
class _Watch:
    """What is known while the job's process runs."""

    stage_names: tuple[str, ...]
    directories: dict[int, str]
    deadline: float
    inside: sandbox.Sandbox
    budget: int
    next_progress: float = 0.0
    event_count: int = 0
    warning_count: int = 0
    began: tuple[float, float] | None = None
    """(time, overall progress) when this attempt first reported: the base of the ETA."""
    end: events.Finished | events.Failed | None = field(default=None)


class _Attempt:
    """One attempt at one job."""

    def __init__(self, supervisor: Supervisor, claim: Claim, spans: AttemptSpans) -> None:
        self.supervisor = supervisor
        self.spans = spans
        self.settings = supervisor.settings
        self.lease = Lease(supervisor.database, claim, lease_seconds=supervisor.settings.lease_seconds)
        self.scratch = Scratch(supervisor.settings, claim.job_id)
        self.next_look = 0.0
        self.next_beat = time.monotonic() + self.settings.heartbeat_seconds

    def to_end(self) -> str:
        """Do the job, and whatever happens leave its row in a state somebody will pick up."""
        try:
            return self._attempt()
        except LeaseLost:
            self.spans.fail("lease_lost")
            return "lost"
        except CancelRequested:
            return "cancelled" if self.lease.write(job_claims.end_cancelled) else "lost"
        except Draining:
            return self.lease.write(job_claims.release) or "lost"
        except ModelpressError as error:
            if isinstance(error, _DiskFull):
                self.scratch.remove()
            facts = {"code": error.code, "detail": error.detail, "hint": error.hint}
            return self._fail(facts, retryable=isinstance(error, Unavailable | StorageFull))
        except OSError as error:
            _log.exception("attempt_failed")
            return self._fail(
                {"code": "worker_io", "detail": f"The worker could not go on: {error}"}, retryable=True
            )

    def _attempt(self) -> str:
        with self.supervisor.database.read() as session:
            assignment = read_assignment(session, self.lease.claim.job_id)
        self.spans.describe(assignment.traits)
        committed = self._committed_stages(assignment)
        self.spans.begin_part("fetch inputs")
        store, fence = self.supervisor.store, self.lease.claim.fence
        self.scratch.fetch_inputs(assignment, store, fence, beat=self.keep)
        wanted = assignment.spec.resources.device
        device = self.supervisor.device if wanted == "auto" else wanted
        job_file = self.scratch.write_job_file(
            assignment,
            committed=committed,
            fence=self.lease.claim.fence,
            settings=self.settings,
            device=device,
        )
        self.scratch.let_train()
        now = time.monotonic()
        watch = _Watch(
            stage_names=assignment.spec.stage_names(),
            directories=dict(enumerate(committed)),
            deadline=now + assignment.spec.resources.timeout_seconds,
            inside=self._sandbox(assignment.spec.resources.timeout_seconds, gpu=device != "cpu"),
            budget=self.settings.memory_for(assignment.spec.resources.memory_budget),
        )
        end = self._supervise(job_file, watch)
        if isinstance(end, events.Failed):
            return self._fail(end.model_dump(exclude={"type", "retryable"}), retryable=end.retryable)
        return self._publish(watch, end)

    def _committed_stages(self, assignment: Assignment) -> tuple[str, ...]:
        """Directories of the stages that need not be run. Those whose files are on another machine must be."""
        directories = assignment.directories[: self.lease.claim.stage]
        here = self.scratch.finished_stages(directories)
        if here < len(directories):
            message = (
                f"stages {here + 1} to {len(directories)} are done again: their files are not on this worker"
            )
            self.lease.require(lambda s, claim: job_claims.rewind_stages(s, claim, here))
            self.lease.note("log", {"level": "warning", "message": message})
        return directories[:here]

    def _supervise(self, job_file: Path, watch: _Watch) -> events.Finished | events.Failed:
        """Spawn the job's process and listen until it ends. Raises what makes an end before that."""
        self.spans.begin_part("start process")
        receiver, sender = os.pipe()
        with os.fdopen(receiver, "rb", buffering=0) as pipe:
            try:
                process = sandbox.spawn(
                    [*self.supervisor.job_command, str(job_file), str(sender)],
                    watch.inside,
                    pipe=sender,
                    log=self.scratch.log_file(self.lease.claim.fence),
                )
            finally:
                os.close(sender)
            try:
                for line in self._lines(pipe.fileno(), process, watch):
                    self._handle(events.parse_event(line), watch)
                return_code = sandbox.return_code(process, timeout_seconds=_LEAVE_SECONDS)
            finally:
                sandbox.kill_group(process, grace_seconds=self.settings.kill_grace_seconds)
        return watch.end or self._death(return_code)

    def _sandbox(self, timeout_seconds: int, *, gpu: bool) -> sandbox.Sandbox:
        threads = self.settings.worker_threads
        limits = sandbox.Limits(
            threads=threads,
            # Address space is not memory: torch alone reserves several GiB. This stops runaways; the watch on
            # resident memory keeps the budget.
            address_space_bytes=None if gpu else 4 * self.settings.worker_memory_bytes + 32 * GIB,
            file_bytes=4 * self.settings.max_upload_bytes,
            processor_seconds=threads * (timeout_seconds + 60),
        )
        level, scratch = self.supervisor.sandbox_level, self.scratch.directory
        return sandbox.Sandbox(level=level, scratch=scratch, limits=limits, gpu=gpu)

    def _lines(self, descriptor: int, process: subprocess.Popen[bytes], watch: _Watch) -> Iterator[bytes]:
        """Lines from the pipe until it closes; between reads, keep the lease and look for reasons to stop."""
        pending = b""
        with selectors.DefaultSelector() as selector:
            selector.register(descriptor, selectors.EVENT_READ)
            while True:
                if selector.select(timeout=_POLL_SECONDS / 2):
                    chunk = os.read(descriptor, 1 << 16)
                    if not chunk:
                        return
                    *lines, pending = (pending + chunk).split(b"\n")
                    yield from lines
                    if len(pending) > _MAX_EVENT_BYTES:
                        raise JobFailed(
                            "The job's process sent an event of more than 1 MiB.", code="protocol"
                        )
                self._look_around(process, watch)

    def keep(self) -> bool:
        """Keep the lease and look for reasons to stop, as often as is needed: call it at will. True: it looked.

        Raises Draining, CancelRequested and LeaseLost.
        """
        now = time.monotonic()
        if now >= self.next_beat:
            self.next_beat = now + self.settings.heartbeat_seconds
            self.lease.beat()
        if now < self.next_look:
            return False
        self.next_look = now + _POLL_SECONDS
        if self.supervisor.draining():
            raise Draining
        if self.lease.check_requests():
            self.scratch.stop_training()
        return True

    def _look_around(self, process: subprocess.Popen[bytes], watch: _Watch) -> None:
        if self.keep():
            _check_memory(process.pid, watch.budget)
            self._check_disk()
        if time.monotonic() >= watch.deadline:
            raise JobFailed(
                "The job ran longer than its timeout.",
                code="timeout",
                hint="Raise resources.timeout_seconds.",
            )

    def _check_disk(self) -> None:
        """A job that fills the disk takes it from the database and from all other jobs, so its files go at once."""
        free = shutil.disk_usage(self.scratch.directory).free
        if free < self.settings.min_free_disk_bytes:
            raise _DiskFull(
                f"{free / GIB:.2f} GiB are left on the worker's disk, and "
                f"{self.settings.min_free_disk_bytes / GIB:.2f} GiB must stay free.",
                hint="Free space where MODELPRESS_DATA_DIR lies, or move it to a larger disk.",
            )

    def _handle(self, event: events.Event, watch: _Watch) -> None:
        """Write down one event of the job's process."""
        # What is written down at once: progress that has not ended is thinned.
        watch.event_count += not isinstance(event, events.Progress) or event.fraction >= 1
        if watch.event_count > _MAX_EVENTS:
            raise JobFailed(f"The job's process sent more than {_MAX_EVENTS} events.", code="protocol")
        _require_own_stages(event, watch)
        match event:
            case events.StageStarted():
                self.spans.begin_part(watch.stage_names[event.stage])
                self.lease.require(lambda s, claim: job_claims.start_stage(s, claim, event.stage))
            case events.StageDone():
                self.lease.require(
                    lambda s, claim: job_claims.commit_stage(
                        s, claim, event.stage, event.directory, event.metrics
                    )
                )
                self.spans.end_part()
                watch.directories[event.stage] = event.directory
            case events.Progress():
                self._progress(event, watch)
            case events.Warning():
                watch.warning_count += 1
                if watch.warning_count > _MAX_WARNINGS:
                    raise JobFailed(
                        f"The job's process warned more than {_MAX_WARNINGS} times.", code="protocol"
                    )
                self.lease.require(lambda s, claim: job_claims.add_warning(s, claim, event.message))
            case events.Finished() | events.Failed():
                watch.end = event
            case _:
                self.lease.note(event.type, event.model_dump(exclude={"type"}))

    def _progress(self, event: events.Progress, watch: _Watch) -> None:
        """Progress is for people: at most once a second, less often in long jobs, so that events stay few."""
        now = time.monotonic()
        overall = _overall(watch.stage_names, event)
        began, base = watch.began = watch.began or (now, overall)
        if now < watch.next_progress and event.fraction < 1:
            return
        watch.next_progress = now + max(_PROGRESS_SECONDS, (now - began) / 300)
        eta = (now - began) * (1 - overall) / (overall - base) if overall > base else None
        self.lease.require(
            lambda s, claim: job_claims.set_progress(
                s, claim, progress=overall, eta_seconds=eta, event=event.model_dump(exclude={"type"})
            )
        )

    def _publish(self, watch: _Watch, end: events.Finished) -> str:
        report = len(watch.stage_names) - 1
        export = watch.stage_names.index("export")
        store = self.supervisor.store
        self.spans.begin_part("publish")
        files = store_files(
            self.lease.claim.job_id,
            model=self.scratch.stages / watch.directories[export] / "model",
            report=self.scratch.stages / watch.directories[report],
            store=store,
            beat=self.keep,
        )
        done = self.lease.write(lambda s, claim: publish(s, claim, files, verdict=end.verdict, store=store))
        if not done:
            self.lease.beat()  # tells a cancel from a lost lease
            raise LeaseLost
        self.scratch.remove()
        return "succeeded"

    def _fail(self, error: dict[str, Any], *, retryable: bool) -> str:
        """End the job, or queue it again. Its files stay for a while, since somebody may retry it."""
        self.spans.fail(error["code"])
        if not retryable:
            return "failed" if self.lease.write(lambda s, claim: job_claims.fail(s, claim, error)) else "lost"
        delay = min(60.0, 2.0**self.lease.claim.attempt)
        status = self.lease.write(lambda s, claim: job_claims.give_back(s, claim, error, delay_seconds=delay))
        return status or "lost"

    def _death(self, return_code: int) -> events.Failed:
        """The job's process ended without a word."""
        tail = self.scratch.log_tail(self.lease.claim.fence)
        killed = return_code == -9
        cause = "was killed by the system" if killed else f"ended with code {return_code}"
        hint = "Often the machine is out of memory: use a larger worker, or lower resources.memory_budget."
        return events.Failed(
            code="process_died",
            detail=f"The job's process {cause}." + (f" Its last words: {tail}" if tail else ""),
            hint=hint if killed else None,
            retryable=True,
        )


def _check_memory(group: int, budget: int) -> None:
    used = sandbox.resident_bytes(group)
    if used > budget:
        raise OutOfMemory(
            f"The job's processes used {used / GIB:.2f} GiB, over the {budget / GIB:.2f} GiB they were given.",
            hint="Raise resources.memory_budget, or use a larger worker; POST /v1/plans predicts what is needed.",
        )


def _overall(names: tuple[str, ...], event: events.Progress) -> float:
    """Progress of the whole job, by what stages took on the models we measured."""
    fixed = {"load": 1.0, "baseline": 1.0, "export": 0.5, "verify": 5.0, "report": 0.5}
    weights = [fixed.get(name, 5.0) for name in names]
    return (sum(weights[: event.stage]) + weights[event.stage] * event.fraction) / sum(weights)


def _require_own_stages(event: events.Event, watch: _Watch) -> None:
    """Raise JobFailed for a stage that the job does not have or whose turn it is not, and for an end before that of all
    stages."""
    stages = range(len(watch.stage_names))
    if (
        isinstance(event, events.StageStarted | events.StageDone | events.Progress)
        and event.stage not in stages
    ):
        raise JobFailed("The job's process named a stage that its job does not have.", code="protocol")
    if isinstance(event, events.StageStarted | events.StageDone) and event.stage != len(watch.directories):
        raise JobFailed("The job's process took its stages out of order.", code="protocol")
    if isinstance(event, events.Finished) and len(watch.directories) < len(stages):
        raise JobFailed("The job's process ended before its stages had.", code="protocol")
