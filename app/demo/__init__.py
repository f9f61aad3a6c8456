"""The demo: real models through the public API of a service of its own, and a table of what was gained and lost."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from app.client import Client, Json
from app.demo.jobs import FIRST, NOTES, SECOND, DemoJob
from app.demo.models import fetch_minilm, fetch_smollm2, write_training_text
from app.demo.service import running_service
from app.spec.report import Report
from app.terminal import JobBars, Outcome, console, outcome_table, save_result, upload_dataset, upload_model

_REPORTS = {"report": ".json", "report_html": ".html"}


def run_demo(directory: Path) -> None:
    """Run every kind of job once; results and reports are left in `directory`, everything else is stopped and removed.

    Raises ClientError when something does not work; a job that fails stands in the table as failed.
    """
    began = time.monotonic()
    for made_before in ("results", "reports", "service"):
        shutil.rmtree(directory / made_before, ignore_errors=True)
    with _signals_unwind():
        sources = {
            "smollm2": fetch_smollm2(directory / "models"),
            "minilm": fetch_minilm(directory / "models"),
        }
        text = write_training_text(directory / "models" / "training.txt")
        with running_service(directory) as url, Client(url) as client:
            up = time.monotonic()
            console.print(f"Modelpress answers at {url}; its log is {directory / 'service.log'}.")
            models = {name: upload_model(client, path)["id"] for name, path in sources.items()}
            first = _run(client, FIRST, models, directory)
            console.print(outcome_table(first))
            console.print(f"These two took {time.monotonic() - up:.0f} s from the service being up.\n")
            models["training text"] = upload_dataset(client, text)["id"]
            outcomes = [*first, *_run(client, SECOND, models, directory)]
    console.print(outcome_table(outcomes))
    _explain(outcomes, directory, seconds=time.monotonic() - began)


def _run(client: Client, jobs: Sequence[DemoJob], ids: dict[str, str], directory: Path) -> list[Outcome]:
    """Submit the jobs, follow them to their ends, and fetch what they left once nothing runs that it could disturb."""
    posted = [client.post("/v1/jobs", job.request(ids)) for job in jobs]
    with JobBars() as bars:
        rows = [bars.add(job.label) for job in jobs]
        ended = [bars.follow(client, job, row) for job, row in zip(posted, rows, strict=True)]
    return [_fetch(client, job, end, directory) for job, end in zip(jobs, ended, strict=True)]


def _fetch(client: Client, job: DemoJob, ended: Json, directory: Path) -> Outcome:
    if ended["status"] != "succeeded":
        return Outcome(job.label, ended, None)
    save_result(client, ended, directory / "results" / job.directory, label=job.label)
    for artifact in ended["artifacts"]:
        ending = _REPORTS.get(artifact["kind"])
        if ending:
            client.download(artifact, directory / "reports" / f"{job.directory}{ending}")
    return Outcome(job.label, ended, Report.model_validate(client.get(ended["urls"]["report"])))


def _explain(outcomes: Sequence[Outcome], directory: Path, *, seconds: float) -> None:
    for note in NOTES:
        console.print(f"• {note}", highlight=False)
    console.print(f"\nReports to open in a browser: {(directory / 'reports').absolute()}", highlight=False)
    console.print(f"Compressed models: {(directory / 'results').absolute()}", highlight=False)
    failed = sum(outcome.report is None for outcome in outcomes)
    ending = f", {failed} of them FAILED" if failed else ""
    console.print(f"{len(outcomes)} jobs in {seconds:.0f} s{ending}. Everything that was started is stopped.")
    if failed:
        raise SystemExit(1)


@contextmanager
def _signals_unwind() -> Iterator[None]:
    """Make SIGTERM and a closed terminal exceptions, so that what was started is stopped as on Ctrl-C."""

    def leave(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    wanted = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, leave) for number in wanted]
    try:
        yield
    finally:
        for number, handler in zip(wanted, before, strict=True):
            signal.signal(number, handler)
