"""What the command line shows: progress bars for transfers and jobs, and the table of what was gained and lost."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from app.begun_uploads import BegunUploads
from app.client import Client, Json, OnBytes
from app.spec.report import Latency, Measurement, Report

console = Console()
errors = Console(stderr=True)
_ETA_SECONDS = 1.0


@dataclass(frozen=True)
class Outcome:
    """A job that has ended, and its report if it left one."""

    label: str
    job: Json
    report: Report | None


@contextmanager
def transfer_bar(label: str, total: int) -> Iterator[OnBytes]:
    """A bar for `total` bytes; what it yields is told of every piece."""
    with _transfers() as progress:
        task = progress.add_task(label, total=total)
        yield lambda count: progress.advance(task, count)


def _transfers() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    return Progress(*columns, console=console)


class JobBars:
    """One bar for each job, with its stage and the time it still needs. A context manager.

    Where there is no terminal to draw on, e.g. in a log, each stage gets a line when it begins.
    """

    def __init__(self) -> None:
        self._asked = 0.0
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[eta]}"),
            TextColumn("{task.fields[stage]}", markup=False),
            console=console,
        )

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def add(self, label: str) -> TaskID:
        """A bar for a job that waits."""
        return self._progress.add_task(label, total=1.0, start=False, stage="queued", eta="")

    def follow(self, client: Client, job: Json, bar: TaskID) -> Json:
        """Move the bar with the job's events until it has ended; returns the job as it ended."""
        for event in client.events(job):
            if event.type == "status" and event.data["status"] == "running":
                self._progress.start_task(bar)
            elif event.type == "stage" and event.data["status"] == "running":
                self._progress.update(bar, stage=event.data["name"])
                self._tell(bar, event.data["name"])
            elif event.type == "progress":
                self._progress.update(bar, completed=event.data["progress"], stage=event.data["message"])
                self._show_eta(client, job, bar)
        ended = client.get(job["urls"]["self"])
        self._progress.update(bar, completed=ended["progress"], stage=_ending(ended), eta="")
        self._progress.stop_task(bar)
        return ended

    def _tell(self, bar: TaskID, stage: str) -> None:
        if not console.is_terminal:
            console.print(f"{self._progress.tasks[bar].description}: {stage}", markup=False, highlight=False)

    def _show_eta(self, client: Client, job: Json, bar: TaskID) -> None:
        """Events carry no estimate, the job does; asked for rarely, since events come in bursts."""
        if time.monotonic() - self._asked < _ETA_SECONDS:
            return
        self._asked = time.monotonic()
        seconds = client.get(job["urls"]["self"])["eta_seconds"]
        self._progress.update(bar, eta="" if seconds is None else f"{seconds:.0f} s left")


def upload_model(client: Client, path: Path) -> Json:
    """Upload a file, or every visible file of a directory, and make a model of it. Goes on where a broken run stopped."""
    begun = BegunUploads(client.url)
    files = [path] if path.is_file() else _visible_files(path)
    with transfer_bar(f"upload {path.name}", sum(file.stat().st_size for file in files)) as on_bytes:
        uploads = {file: client.upload(file, begun=begun, on_bytes=on_bytes) for file in files}
    if path.is_file():
        source: Json = {"upload": uploads[path]}
    else:
        named = [(file.relative_to(path).as_posix(), upload) for file, upload in uploads.items()]
        source = {"files": [{"path": name, "upload": upload} for name, upload in named]}
    try:
        return client.post("/v1/models", {"name": path.resolve().name, **source})
    finally:
        begun.forget(*files)


def import_model(client: Client, url: str) -> Json:
    """Have the service fetch a file, and make a model of it."""
    with _transfers() as progress:
        bar = progress.add_task("import", total=None)

        def show(upload: Json) -> None:
            progress.update(bar, total=upload["size"], completed=upload["fetch"]["bytes"])

        upload = client.import_url(url, on_change=show)
    return client.post("/v1/models", {"upload": upload["id"]})


def _visible_files(root: Path) -> list[Path]:
    """Files below `root`, links followed, since caches of models are made of them; hidden ones are left out."""
    found = (path for path in root.rglob("*") if path.is_file() and path.stat().st_size)
    return sorted(p for p in found if not any(part.startswith(".") for part in p.relative_to(root).parts))


def upload_dataset(client: Client, path: Path) -> Json:
    """Upload a file of text and make a dataset of it."""
    with transfer_bar(f"upload {path.name}", path.stat().st_size) as on_bytes:
        upload = client.upload(path, on_bytes=on_bytes)
    return client.post("/v1/datasets", {"upload": upload, "name": path.name})


def save_result(client: Client, job: Json, directory: Path, *, label: str) -> list[Path]:
    """Download a job's model into `directory`, each file checked against its sha256."""
    files = [artifact for artifact in job["artifacts"] if artifact["kind"] == "model"]
    with transfer_bar(label, sum(artifact["bytes"] for artifact in files)) as on_bytes:
        for artifact in files:
            client.download(artifact, directory / artifact["path"], on_bytes=on_bytes)
    return [directory / artifact["path"] for artifact in files]


def outcome_table(outcomes: Sequence[Outcome]) -> Table:
    """Before, after and ratio of every job, with its verdict and what to beware of. Fits 80 columns."""
    table = Table(box=box.SIMPLE_HEAD, padding=0, show_lines=True)
    for name in ("job", ""):
        table.add_column(name)
    for name in ("size\nMB", "bits\nper\nweight", "quality", "latency\nms", "peak\nmemory\nMB"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict\nand flags", overflow="fold")
    for outcome in outcomes:
        # One word a line keeps the column narrow enough for the flags to stay whole beside it.
        label = outcome.label.replace(" ", "\n")
        if outcome.report is None:
            error = outcome.job["error"] or {}
            ending = f"{outcome.job['status']}\n{error.get('detail', '')}"
            table.add_row(label, "", "", "", "", "", "", ending)
        else:
            table.add_row(label, "before\nafter\nratio", *_cells(outcome.report))
    return table


def _cells(report: Report) -> tuple[str, ...]:
    before, after, compared = report.original, report.result, report.comparison
    flags = dict.fromkeys(flag.code for flag in report.flags)
    return (
        _three(_megabytes(before.bytes), _megabytes(after.bytes), after.bytes / before.bytes),
        _three(
            f"{before.bits_per_weight:.2f}",
            f"{after.bits_per_weight:.2f}",
            after.bits_per_weight / before.bits_per_weight,
        ),
        _quality(report),
        _latency(before, after, compared.latency_ratio) if compared else "–",
        _three(
            _megabytes(before.peak_memory_bytes),
            _megabytes(after.peak_memory_bytes),
            compared.peak_memory_ratio if compared else None,
        ),
        "\n".join([report.verdict, *flags]),
    )


def _quality(report: Report) -> str:
    compared = report.comparison
    if compared is None:
        return "–"
    if compared.perplexity_ratio is not None:
        before, after = report.original.quality["perplexity"], report.result.quality["perplexity"]
        return _three(f"ppl {before:.2f}", f"{after:.2f}", compared.perplexity_ratio)
    if compared.accuracy_change is not None:
        shares = (report.original.quality["top1_accuracy"], report.result.quality["top1_accuracy"])
        return "\n".join(["accuracy", *(f"{share:.1%}" for share in shares)])
    return f"cosine\n{_number(compared.cosine_mean)}\n≥ {_number(compared.cosine_min)}"


def _latency(before: Measurement, after: Measurement, ratio: float | None) -> str:
    """Medians of the first kind of run that both models have."""
    theirs: dict[str, Latency] = {latency.what: latency for latency in after.latency}
    for latency in before.latency:
        if latency.what in theirs:
            other = theirs[latency.what]
            return _three(f"{latency.median_ms:.1f}", f"{other.median_ms:.1f}", ratio)
    return "–"


def _three(before: str, after: str, ratio: float | None) -> str:
    return f"{before}\n{after}\n{'–' if ratio is None else f'×{ratio:.3f}'}"


def _megabytes(count: int | None) -> str:
    return "–" if count is None else f"{count / 1e6:.0f}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _ending(job: Json) -> str:
    if job["error"] and job["status"] != "succeeded":
        return f"{job['status']}: {job['error']['detail']}"
    return str(job["verdict"] or job["status"])
