"""From POST to the first event of the job's process, on an idle worker, through the real service.

Usage: .venv/bin/python benchmarks/submit_latency.py [--jobs 20]
"""

from __future__ import annotations

import argparse
import io
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import httpx
from figures import Figures

sys.path.append(str(Path(__file__).parents[1] / "tests" / "engine"))

FLOOR_MS = 300


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=20)
    jobs = parser.parse_args().jobs
    with tempfile.TemporaryDirectory(prefix="mp-bench-") as scratch, service(Path(scratch)) as client:
        model = upload_tiny_model(client, Path(scratch))
        first, ready = zip(*(submit_once(client, model) for _ in range(jobs + 1)), strict=True)
    # The first job pays for what the worker imports once.
    first, ready = first[1:], ready[1:]
    figures = Figures()
    p50 = statistics.median(first)
    bar = f"<= {FLOOR_MS}"
    against = f"p95 {sorted(first)[int(0.95 * jobs)]:.0f} ms, max {max(first):.0f} ms, {jobs} jobs"
    figures.add("submit_to_first_event_p50", p50, "ms", compared_with=against, floor=bar, ok=p50 <= FLOOR_MS)
    figures.add(
        "submit_to_torch_ready_p50",
        statistics.median(ready),
        "ms",
        compared_with="the figure above: what importing torch adds",
    )
    figures.exit()


@contextmanager
def service(directory: Path) -> Iterator[httpx.Client]:
    """`modelpress serve` on a free port, until the block ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"MODELPRESS_DATA_DIR": str(directory / "data")}
    command = [sys.executable, "-m", "app.cli", "serve", "--port", str(port)]
    with (directory / "serve.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}/v1", timeout=30) as client:
            wait_for_worker(client, process)
            yield client
    finally:
        process.terminate()
        process.wait(timeout=30)


def wait_for_worker(client: httpx.Client, process: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        if process.poll() is not None:
            raise SystemExit("the service ended before it was up")
        try:
            if client.get("/workers").json():
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise SystemExit("no worker within 60 s")


def upload_tiny_model(client: httpx.Client, directory: Path) -> str:
    from tiny_models import tiny_model

    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for path in tiny_model("LlamaForCausalLM", directory / "tiny").iterdir():
            archive.write(path, path.name)
    answer = client.put("/models/content", params={"name": "tiny.zip"}, content=packed.getvalue())
    answer.raise_for_status()
    return str(answer.json()["id"])


def submit_once(client: httpx.Client, model: str) -> tuple[float, float]:
    """Submit a job to an idle worker; milliseconds to the process's first event, and to torch being imported."""
    posted = time.time()
    answer = client.post("/jobs", json={"model": model, "recipe": "int8"})
    answer.raise_for_status()
    job = answer.json()["id"]
    times: dict[str, float] = {}
    while "ready" not in times:
        for event in client.get(f"/jobs/{job}/events", params={"limit": 100}).json()["items"]:
            times.setdefault(event["type"], datetime.fromisoformat(event["created_at"]).timestamp())
        time.sleep(0.05)
    client.post(f"/jobs/{job}/cancel")
    while client.get(f"/jobs/{job}").json()["status"] not in ("succeeded", "failed", "cancelled"):
        time.sleep(0.05)
    # The supervisor polls for the cancel; give the pool's process time to take the next message.
    time.sleep(0.2)
    return 1000 * (times["process"] - posted), 1000 * (times["ready"] - posted)


if __name__ == "__main__":
    main()
