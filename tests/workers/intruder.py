"""Tries to get out of the sandbox in every way it knows, and writes down which of them did not fail.

Usage: intruder.py FACTS, a JSON file. Runs without anything but the standard library, in the scratch directory.
"""

import ctypes
import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

facts = json.loads(Path(sys.argv[1]).read_text())
secret, port, unix = Path(facts["secret"]), facts["port"], facts["unix"]
weights = Path("inputs/weights")
libc = ctypes.CDLL(None, use_errno=True)


def call(number: int, *arguments: int) -> None:
    if libc.syscall(number, *arguments) < 0:
        code = ctypes.get_errno()
        # EFAULT and EINVAL mean that the kernel has begun to look at the arguments.
        if code not in (errno.EFAULT, errno.EINVAL):
            raise OSError(code, os.strerror(code))


def write_through(link: str) -> None:
    with Path(link).open("r+b") as file:
        file.write(b"broken")


def linked_inputs() -> None:
    os.link(weights, "stages/link")
    write_through("stages/link")


def moved_inputs() -> None:
    weights.rename("stages/moved")


def symbolic_link() -> None:
    Path("stages/symlink").symlink_to(secret)
    Path("stages/symlink").read_text()


def connect(family: int, address: object, kind: int = socket.SOCK_STREAM) -> None:
    with socket.socket(family, kind) as end:
        end.settimeout(2)
        end.connect(address)
        end.send(b"stolen")


ATTEMPTS = {
    "read a secret": secret.read_text,
    "read it through a link": symbolic_link,
    "list the directory of secrets": lambda: list(secret.parent.iterdir()),
    "write a secret": lambda: secret.write_text("broken"),
    "truncate a secret": lambda: os.truncate(secret, 0),
    "delete a secret": secret.unlink,
    "make a file beside it": (secret.parent / "planted").touch,
    "write to the weights": lambda: write_through("inputs/weights"),
    "truncate the weights": lambda: os.truncate(weights, 0),
    "write to the weights through a hard link": linked_inputs,
    "move the weights": moved_inputs,
    "change its own job file": lambda: Path("job.json").write_text("{}"),
    "read the worker's environment": lambda: Path(f"/proc/{facts['worker']}/environ").read_bytes(),
    "write the worker's memory": lambda: Path(f"/proc/{facts['worker']}/mem").open("r+b").close(),
    "signal the worker": lambda: os.kill(facts["worker"], 0),
    "set a kernel parameter": lambda: Path("/proc/sys/kernel/core_pattern").open("r+b").close(),
    "open the disk": lambda: Path(facts["disk"]).open("rb").close(),
    "make a device": lambda: os.mknod("stages/disk", 0o060600, os.makedev(254, 0)),
    "write to /dev/shm": lambda: Path("/dev/shm/planted-by-the-intruder").write_text(""),
    "connect by TCP": lambda: connect(socket.AF_INET, ("127.0.0.1", port)),
    "send by UDP": lambda: connect(socket.AF_INET, ("127.0.0.1", port), socket.SOCK_DGRAM),
    "connect to a unix socket": lambda: connect(socket.AF_UNIX, unix),
    "talk to the kernel by netlink": lambda: socket.socket(16, socket.SOCK_RAW),
    "leave the session": os.setsid,
    "leave the process group": lambda: os.setpgid(0, 0),
    **{name: lambda n=number: call(n, 0, 0, 0, 0, 0) for name, number in facts["system_calls"].items()},
    "make a user namespace": lambda: call(facts["clone"], 0x10000000, 0, 0, 0, 0),
}  # fmt: skip


def main() -> None:
    done = {}
    for name, attempt in ATTEMPTS.items():
        try:
            attempt()
        except OSError:
            continue
        done[name] = "done"
    Path("stages/done.json").write_text(json.dumps(sorted(done)))


def work() -> None:
    """What a job does: all of it must go on working."""
    for directory in ("stages", "journal", "tmp"):
        path = Path(directory) / "deep" / "file"
        path.parent.mkdir()
        path.write_text("x")
        path.rename(path.with_name("renamed"))
        os.truncate(os.open(path.with_name("renamed"), os.O_RDWR), 0)
    if weights.read_bytes() != b"weights":
        raise SystemExit("the inputs cannot be read")
    Path("/proc/self/clear_refs").write_text("5")
    child = subprocess.Popen([sys.executable, "-I", "-S", "-c", "import time; time.sleep(600)"])
    child.kill()
    if child.wait() != -signal.SIGKILL:
        raise SystemExit("a child cannot be ended")
    one, other = socket.socketpair()
    thread = threading.Thread(target=lambda: one.send(b"x"))
    thread.start()
    if other.recv(1) != b"x":
        raise SystemExit("threads cannot talk")
    thread.join()
    os.urandom(4), Path("/dev/null").write_text("x")


def hide() -> None:
    """Leave a process behind that nobody waits for."""
    if os.fork() == 0:
        for leave in (os.setsid, lambda: os.setpgid(0, 0)):
            try:
                leave()
            except OSError:
                continue
        if os.fork() == 0:
            os.execv(
                sys.executable,
                [sys.executable, "-I", "-S", "-c", "import time; time.sleep(600)", facts["marker"]],
            )


main()
work()
hide()
