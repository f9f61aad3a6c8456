"""A job's process that does what a script says: a real process on a real pipe, whose timing a test decides.

Usage: scripted_job.py SCRIPT JOB_FILE PIPE. The script is a JSON list of actions, carried out in order.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

script, job_file, pipe = sys.argv[1], sys.argv[2], int(sys.argv[3])
job = json.loads(Path(job_file).read_text())
stages = Path(job["stages"])


def emit(**event: object) -> None:
    os.write(pipe, json.dumps(event).encode() + b"\n")


def finish_stage(number: int) -> None:
    """Leave what the real process leaves: files, then stage.json, then the event."""
    directory = stages / f"{number:02d}-{job['fence']}"
    (directory / "model").mkdir(parents=True)
    (directory / "model" / "weights.bin").write_bytes(b"weights of stage %d" % number)
    for name in ("report.json", "report.html"):
        (directory / name).write_text("{}")
    (directory / "stage.json").write_text("{}")
    emit(type="stage_started", stage=number, name="?")
    emit(type="progress", stage=number, fraction=1.0, message="done")
    emit(type="stage_done", stage=number, directory=directory.name, metrics={"fence": job["fence"]})


done = len(job["committed"])
for action, *arguments in json.loads(Path(script).read_text()):
    if action == "stages":
        while done < arguments[0]:
            finish_stage(done)
            done += 1
    elif action == "emit":
        emit(**arguments[0])
    elif action == "flood":
        for _ in range(arguments[0]):
            emit(type="log", level="info", message="more")
    elif action == "raw":
        os.write(pipe, arguments[0].encode())
    elif action == "link_result":
        # What the export stage left becomes a link to somewhere else.
        weights = stages / f"{arguments[0]:02d}-{job['fence']}" / "model" / "weights.bin"
        weights.unlink()
        weights.symlink_to(arguments[1])
    elif action == "wait_for_stop":
        while not Path(job["stop_file"]).exists():
            time.sleep(0.05)
    elif action == "sleep":
        time.sleep(arguments[0])
    elif action == "environment":
        Path(arguments[0]).write_text(json.dumps(dict(os.environ)))
    elif action == "grandchild":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        Path(arguments[0]).write_text(str(child.pid))
    elif action == "allocate":
        kept = bytearray(arguments[0])
        kept[::4096] = b"x" * len(kept[::4096])
    elif action == "ignore_sigterm":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    elif action == "die":
        os.kill(os.getpid(), arguments[0])
    elif action == "once":
        # The first attempt to come here dies; later ones go on.
        marker = Path(arguments[0])
        if not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
