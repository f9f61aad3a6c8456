"""Entry point of a job's process: `python -m workers.job_process JOB_FILE PIPE`.

Reads a job file, runs the stages that are not committed yet, and reports on a pipe. It holds no credential and knows
no database; all it can do to the outside is write below the scratch directory and send events.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

_STARTED = time.perf_counter()


def main(job_file: str, pipe: str) -> None:
    """Run a job to its end; every error becomes a `failed` event, so the process itself ends with code 0."""
    # Before anything is imported that takes time: the supervisor learns at once that the process lives.
    os.write(int(pipe), b'{"type":"process","pid":%d}\n' % os.getpid())
    from workers.events import EngineReady, Event

    def emit(event: Event) -> None:
        os.write(int(pipe), event.model_dump_json().encode() + b"\n")

    import torch

    emit(EngineReady(seconds=time.perf_counter() - _STARTED, torch=torch.__version__))
    from workers.engine.pipeline import Job, run_job

    run_job(Job.read(Path(job_file)), emit)


if __name__ == "__main__":
    main(*sys.argv[1:])
