"""What a storm does to a deployment. Each fault takes the deployment and leaves it able to recover by itself."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from contextlib import suppress
from random import Random

import psutil
import psycopg
import redis
from deployment import Deployment

Fault = Callable[[Deployment, Random], None]

WORKERS = ("worker-1", "worker-2")
_LEAVE_SECONDS = 10


def kill_worker(deployment: Deployment, random: Random) -> None:
    """kill -9 of a worker; another takes its place."""
    name = random.choice(WORKERS)
    deployment.kill(name)
    deployment.start(name)


def kill_job_process(deployment: Deployment, random: Random) -> None:
    """kill -9 of a process in which a job runs."""
    running = [p for name in WORKERS for p in deployment.job_processes(name)]
    with suppress(psutil.NoSuchProcess, IndexError):
        random.choice(running).kill()


def restart_worker(deployment: Deployment, random: Random) -> None:
    """A rolling restart: SIGTERM, and it leaves in ten seconds."""
    name = random.choice(WORKERS)
    deployment.terminate(name, within_seconds=_LEAVE_SECONDS)
    deployment.start(name)


def skew_clock(deployment: Deployment, random: Random) -> None:
    """A worker whose clock is hours off takes the place of another."""
    name = random.choice(WORKERS)
    deployment.terminate(name, within_seconds=_LEAVE_SECONDS)
    deployment.start(name, skew_seconds=random.choice((-7200, 7200)))


def freeze_worker(deployment: Deployment, random: Random) -> None:
    """A worker sleeps past its lease, and wakes."""
    name = random.choice(WORKERS)
    deployment.signal(name, signal.SIGSTOP)
    time.sleep(7)
    deployment.signal(name, signal.SIGCONT)


def kill_api(deployment: Deployment, _: Random) -> None:
    """kill -9 of the API in the middle of whatever it answers."""
    deployment.kill("api")
    deployment.start("api")


def restart_api(deployment: Deployment, _: Random) -> None:
    """A rolling restart of the API."""
    deployment.terminate("api", within_seconds=30)
    deployment.start("api")


def kill_sweeper(deployment: Deployment, _: Random) -> None:
    """kill -9 of the sweeper."""
    deployment.kill("sweeper")
    deployment.start("sweeper")


def lose_broker(deployment: Deployment, random: Random) -> None:
    """kill -9 of the broker, which keeps nothing: every message is lost."""
    deployment.broker.kill()
    time.sleep(random.uniform(0, 3))
    deployment.broker.start()


def kill_database(deployment: Deployment, random: Random) -> None:
    """kill -9 of PostgreSQL, which recovers from its log."""
    postmaster = psutil.Process(deployment.postgres.get_pid())
    family = postmaster.children()
    postmaster.kill()
    psutil.wait_procs([postmaster, *family], timeout=10)
    time.sleep(random.uniform(0, 3))
    deployment.postgres.ensure_postgres_running()


def break_connections(deployment: Deployment, _: Random) -> None:
    """Every connection to the database and the broker breaks at once."""
    with psycopg.connect(deployment.postgres.get_uri(), autocommit=True) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
        )
    client = redis.Redis.from_url(deployment.broker.url)
    with suppress(redis.RedisError):
        client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    client.close()


def fill_disk(deployment: Deployment, _: Random) -> None:
    """No byte is free for a few seconds, for anyone but root's own file system."""
    filler = deployment.data / "filler"
    with filler.open("wb") as file, suppress(OSError):
        while True:
            file.write(bytes(2**20))
            file.flush()
    time.sleep(3)
    filler.unlink()


FAULTS: tuple[Fault, ...] = (
    kill_worker, kill_job_process, restart_worker, skew_clock, freeze_worker, kill_api, restart_api, kill_sweeper,
    lose_broker, kill_database, break_connections,
)  # fmt: skip
