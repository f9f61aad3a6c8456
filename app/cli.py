"""The command line: `modelpress serve | worker | sweeper | migrate | verify-store | keys | tenants | submit | status | download |
demo | healthy`."""

from __future__ import annotations

import json
import os
import sys
import urllib.error
import urllib.request
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from app import key_commands, tenant_commands
from app.client import TERMINAL, Client, ClientError, Json
from app.errors import ModelpressError
from app.settings import get_settings
from app.spec.report import Report
from app.terminal import (
    JobBars,
    Outcome,
    console,
    errors,
    import_model,
    outcome_table,
    save_result,
    upload_model,
)

cli = typer.Typer(
    help="Compress neural networks, and see what was gained and what was lost.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
cli.add_typer(key_commands.cli, name="keys")
cli.add_typer(tenant_commands.cli, name="tenants")

Url = Annotated[
    str, typer.Option("--url", envvar="MODELPRESS_URL", help="Where the service is.", show_default=True)
]
Key = Annotated[
    str,
    typer.Option("--key", envvar="MODELPRESS_API_KEY", help="API key; a service on this machine needs none."),
]
_LOCAL = "http://127.0.0.1:8000"


class Part(StrEnum):
    """What a health check looks at."""

    API = "api"
    WORKER = "worker"


@cli.command()
def serve(
    host: Annotated[str, typer.Option(help="Address to listen on.  [default: MODELPRESS_HOST]")] = "",
    port: Annotated[
        int, typer.Option(help="Port; 0 is any free one.  [default: MODELPRESS_PORT]", min=-1, max=65535)
    ] = -1,
    *,
    api_only: Annotated[
        bool, typer.Option("--api-only", help="No broker, worker or sweeper of its own: for deployments.")
    ] = False,
) -> None:
    """Run the service: the API and, unless --api-only, a broker, a worker and the sweeper."""
    from app import serving

    if sys.stderr.isatty():
        os.environ.setdefault("MODELPRESS_LOG_FORMAT", "console")
    settings = get_settings()
    try:
        serving.serve(
            host or settings.host,
            settings.port if port < 0 else port,
            api_only=api_only,
            announce=_announce,
        )
    except KeyboardInterrupt:
        console.print("Stopped.")


@cli.command()
def worker() -> None:
    """Run a worker for the queues in MODELPRESS_WORKER_QUEUES."""
    from app import serving

    serving.run_worker()


@cli.command()
def sweeper() -> None:
    """Take jobs back from dead workers and send lost messages again. Any number may run."""
    from app import serving

    serving.run_sweeper()


@cli.command()
def migrate() -> None:
    """Bring the database to the newest version. Safe to repeat."""
    from app.db.migrate import migrate as run_migrations

    run_migrations()


@cli.command("verify-store")
def verify_store(
    *,
    digests: Annotated[
        bool,
        typer.Option("--digests", help="Read every byte and compare its sha256, not only look for the file."),
    ] = False,
) -> None:
    """Check that the store has every file the database refers to: after a restore. Exits with 1 if not."""
    from app import serving

    faults, looked_at = 0, 0
    for fault in serving.find_store_faults(digests=digests):
        looked_at += 1
        if fault is not None:
            faults += 1
            wanted_by = ", ".join(fault.wanted_by)
            console.print(
                f"{fault.what}: {fault.sha256}, wanted by {wanted_by}", highlight=False, soft_wrap=True
            )
    if faults:
        _fail(
            f"{faults} of {looked_at} files are missing or damaged.",
            "Copy them from a backup into blobs/<first two digits>/<sha256>, or delete what wants them.",
        )
    console.print(f"{looked_at} files, all there" + (" and whole." if digests else "."), highlight=False)


@cli.command()
def healthy(part: Part) -> None:
    """Exit with 0 if the API on this machine is ready, or a worker of this host is there: for health checks."""
    if part is Part.WORKER:
        from app import serving

        serving.require_announced_worker()
        return
    url = f"http://127.0.0.1:{get_settings().port}/v1/health/ready"
    try:
        urllib.request.urlopen(url, timeout=4).close()
    except urllib.error.URLError as error:
        raise ClientError(f"{url}: {error}") from None


@cli.command()
def submit(
    model: Annotated[
        str, typer.Argument(help="A GGUF file, an archive or a directory; or the https:// URL of a file.")
    ],
    recipe: Annotated[str, typer.Option(help="Name of a recipe; GET /v1/recipes lists them.")] = "",
    spec: Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="A spec as JSON.")] = None,
    output: Annotated[Path | None, typer.Option(help="Where to put the result; implies --wait.")] = None,
    url: Url = _LOCAL,
    key: Key = "",
    *,
    wait: Annotated[bool, typer.Option("--wait", help="Follow the job until it ends.")] = False,
    use_cache: Annotated[
        bool, typer.Option("--cache/--no-cache", help="Whether the result of an earlier, equal job will do.")
    ] = True,
) -> None:
    """Upload a model, or have it imported, and start a job on it. An upload that was broken off goes on where it was."""
    wish = _wish(recipe, spec)
    with Client(url, key=key) as client:
        if model.startswith("https://"):
            uploaded = import_model(client, model)
        else:
            uploaded = upload_model(client, _existing(model))
        body = {"model": uploaded["id"], "name": uploaded["name"], "use_cache": use_cache, **wish}
        job = client.post("/v1/jobs", body)
        console.print(f"model {uploaded['id']}, job {job['id']}", highlight=False)
        if job["result_of"] is not None:
            console.print(f"{job['result_of']} did the same: this is its result.", highlight=False)
        if wait or output is not None:
            _finish(client, job, output)


@cli.command()
def status(
    job: Annotated[str, typer.Argument(help="Id of the job.")], url: Url = _LOCAL, key: Key = ""
) -> None:
    """Show a job, and what it gained and lost once it has ended."""
    with Client(url, key=key) as client:
        found = client.get(f"/v1/jobs/{job}")
        eta = "" if found["eta_seconds"] is None else f", {found['eta_seconds']:.0f} s left"
        line = f"{found['id']}  {found['status']}  {100 * found['progress']:.0f} %{eta}"
        console.print(line, highlight=False)
        if found["status"] in TERMINAL:
            _show(client, found)


@cli.command()
def download(
    job: Annotated[str, typer.Argument(help="Id of the job.")],
    directory: Annotated[Path, typer.Argument(file_okay=False, help="Where to put the result's files.")],
    url: Url = _LOCAL,
    key: Key = "",
) -> None:
    """Download a job's result, each file checked against its sha256."""
    with Client(url, key=key) as client:
        client.get(f"/v1/jobs/{job}/result")  # says why there is none, if there is none
        for path in save_result(client, client.get(f"/v1/jobs/{job}"), directory, label="download"):
            console.print(str(path), highlight=False)


@cli.command()
def demo(
    directory: Annotated[
        Path, typer.Option("--dir", file_okay=False, help="Where results and reports go.")
    ] = Path("modelpress-demo"),
) -> None:
    """Compress real models over HTTP, one job of each kind, and print what was gained and lost."""
    from app.demo import run_demo

    run_demo(directory)


def main() -> None:
    """Run a command; what goes wrong is said in words, with exit code 1."""
    try:
        cli()
    except ModelpressError as error:
        _fail(error.detail, *(f"{fault.pointer}: {fault.detail}" for fault in error.faults), error.hint)
    except ClientError as error:
        _fail(str(error))
    except ValidationError as error:
        faults = (f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
        _fail(f"{error.title} cannot be used as given:", *faults)


def _announce(url: str) -> None:
    console.print(f"Modelpress answers at {url}", highlight=False, soft_wrap=True)
    console.print(f"Try it out: {url}/docs     Ctrl-C stops it", highlight=False, soft_wrap=True)


def _wish(recipe: str, spec: Path | None) -> dict[str, Any]:
    if bool(recipe) == (spec is not None):
        raise ClientError('Say what to do: either --recipe NAME (for a start, "int8") or --spec FILE.')
    if spec is None:
        return {"recipe": recipe}
    try:
        return {"spec": json.loads(spec.read_bytes())}
    except ValueError as error:
        raise ClientError(f"{spec} is not JSON: {error}.") from None


def _existing(model: str) -> Path:
    path = Path(model)
    if not path.exists():
        raise ClientError(f"There is no file or directory {model}.")
    return path


def _finish(client: Client, job: Json, output: Path | None) -> None:
    with JobBars() as bars:
        ended = bars.follow(client, job, bars.add(job["name"] or job["id"]))
    if output is not None and ended["status"] == "succeeded":
        save_result(client, ended, output, label="download")
        console.print(f"The result is in {output}.", highlight=False)
    _show(client, ended)
    if ended["status"] != "succeeded":
        raise typer.Exit(1)


def _show(client: Client, job: Json) -> None:
    report = None
    if job["status"] == "succeeded":
        report = Report.model_validate(client.get(job["urls"]["report"]))
    console.print(outcome_table([Outcome(job["name"] or job["id"], job, report)]))


def _fail(*lines: str | None) -> None:
    for line in filter(None, lines):
        errors.print(line, highlight=False, markup=False, soft_wrap=True)
    sys.exit(1)


if __name__ == "__main__":
    main()
