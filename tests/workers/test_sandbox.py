"""Each level of the sandbox, by a process that tries to get out of it; and what is said where a level is missing."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil
import pytest
from waiting import wait_until

from app.errors import Unavailable
from app.settings import SandboxLevel, Settings
from workers import sandbox, sandbox_levels
from workers.confinement import landlock, seccomp
from workers.confinement.access import job_access

INTRUDER = Path(__file__).parent / "intruder.py"
MARKER = "left-behind-by-the-intruder"
LIMITS = sandbox.Limits(threads=1, address_space_bytes=2**33, file_bytes=2**30, processor_seconds=60)
CALLS = (
    "ptrace", "process_vm_readv", "mount", "unshare", "setns", "chroot", "bpf", "io_uring_setup", "userfaultfd", "keyctl",
    "add_key", "perf_event_open", "open_by_handle_at", "memfd_create", "shmget", "init_module", "kexec_load",
)  # fmt: skip


@cache
def missing(level: SandboxLevel, directory: Path) -> str | None:
    return sandbox_levels.probe(level, directory)


@pytest.fixture(params=["namespaces", "landlock"])
def level(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SandboxLevel:
    """A level that hides files and the network."""
    why = missing(request.param, tmp_path_factory.getbasetemp())
    if why is not None:
        pytest.skip(f"NOT TESTED, this machine has no sandbox of level {request.param}: {why}")
    return request.param  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Prey:
    """What the intruder is after, and what listens for it."""

    directory: Path
    tcp: socket.socket
    unix: socket.socket

    @property
    def scratch(self) -> Path:
        return self.directory / "job"

    def run(self, level: SandboxLevel) -> set[str]:
        """Let the intruder loose; what it could do."""
        with (self.directory / "pipe").open("wb") as pipe:
            process = sandbox.spawn(
                [
                    sys.executable,
                    "-I",
                    "-S",
                    str(self.scratch / "intruder.py"),
                    str(self.scratch / "job.json"),
                ],
                sandbox.Sandbox(level=level, scratch=self.scratch, limits=LIMITS),
                pipe=pipe.fileno(),
                log=self.directory / "log",
            )
        code = sandbox.return_code(process, timeout_seconds=60)
        sandbox.kill_group(process, grace_seconds=0)
        # Where it could get at its inputs, there is no work left to be done.
        assert code == 0 or level == "process", (self.directory / "log").read_text()
        return set(json.loads((self.scratch / "stages" / "done.json").read_text()))

    def untouched(self) -> bool:
        """Nobody has called, and every file is as it was."""
        for listener in (self.tcp, self.unix):
            listener.setblocking(False)
            with pytest.raises(BlockingIOError):
                listener.accept()
        outside = self.directory / "outside"
        return (
            (outside / "secret").read_text() == "secret"
            and [path.name for path in outside.iterdir()] == ["secret"]
            and (self.directory / "blob").read_bytes() == b"weights"
        )


@pytest.fixture
def prey(tmp_path: Path) -> Iterator[Prey]:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_text("secret")
    (tmp_path / "job" / "inputs").mkdir(parents=True)
    # As the store does it: what the job reads is the blob itself.
    (tmp_path / "blob").write_bytes(b"weights")
    os.link(tmp_path / "blob", tmp_path / "job" / "inputs" / "weights")
    shutil.copy(INTRUDER, tmp_path / "job" / "intruder.py")
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as unix:
        unix.bind("\0" + str(tmp_path))
        unix.listen()
        column, _ = seccomp._ARCHITECTURES[os.uname().machine]
        facts = {
            "secret": str(tmp_path / "outside" / "secret"),
            "port": tcp.getsockname()[1],
            "unix": "\0" + str(tmp_path),
            "worker": os.getpid(),
            "disk": next(
                (str(path) for path in Path("/dev").iterdir() if path.is_block_device()), "/dev/kmsg"
            ),
            "system_calls": {name: seccomp._REFUSED[name][column] for name in CALLS},
            "clone": seccomp._CLONE[column],
            "marker": MARKER,
        }
        (tmp_path / "job" / "job.json").write_text(json.dumps(facts))
        yield Prey(tmp_path, tcp, unix)


def test_nothing_outside_is_touched_and_what_a_job_does_works(prey: Prey, level: SandboxLevel) -> None:
    allowed = {"signal the worker"} if level == "landlock" and landlock.abi() < 6 else set()
    assert prey.run(level) <= allowed
    assert prey.untouched()


def test_no_process_is_left_behind(prey: Prey, level: SandboxLevel) -> None:
    prey.run(level)
    wait_until(lambda: not left_behind(), seconds=5)


def test_without_a_sandbox_the_intruder_gets_nearly_everything(prey: Prey) -> None:
    """Else the tests above would pass for want of trying."""
    done = prey.run("process")
    Path("/dev/shm/planted-by-the-intruder").unlink(missing_ok=True)
    assert {
        "read a secret", "write a secret", "write to the weights through a hard link", "connect by TCP", "send by UDP",
        "connect to a unix socket", "signal the worker", "memfd_create",
    } <= done  # fmt: skip
    assert not (prey.directory / "outside" / "secret").exists()


@pytest.mark.parametrize("version", [1, 2, 3, 5])
def test_the_files_are_safe_under_older_kernels_rules(
    prey: Prey, version: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if landlock.abi() < version:
        pytest.skip(f"NOT TESTED: this kernel's Landlock has version {landlock.abi()}")
    monkeypatch.setattr(landlock, "abi", lambda: version)
    assert prey.run("landlock") <= {"signal the worker"}
    assert prey.untouched()


def test_limits_reach_the_process_and_it_dies_first(prey: Prey, level: SandboxLevel) -> None:
    (prey.scratch / "intruder.py").write_text(
        "import json, resource as r\nfrom pathlib import Path\n"
        "Path('stages/ended').touch()\n"
        "names = ('AS', 'FSIZE', 'NOFILE', 'NPROC', 'CPU', 'CORE')\n"
        "found = [r.getrlimit(getattr(r, 'RLIMIT_' + n))[1] for n in names]\n"
        "found.append(int(Path('/proc/self/oom_score_adj').read_text()))\n"
        "Path('stages/done.json').write_text(json.dumps([str(f) for f in found]))\n"
    )
    expected = [2**33, 2**30, LIMITS.open_files, LIMITS.processes, 60, 0, 1000]
    assert prey.run(level) == {str(value) for value in expected}


def test_a_killed_command_is_told_apart_from_one_that_failed(prey: Prey, level: SandboxLevel) -> None:
    def code(line: str) -> int:
        with (prey.directory / "pipe").open("wb") as pipe:
            process = sandbox.spawn(
                [sys.executable, "-I", "-S", "-c", line],
                sandbox.Sandbox(level=level, scratch=prey.scratch, limits=LIMITS),
                pipe=pipe.fileno(),
                log=prey.directory / "log",
            )
        return sandbox.return_code(process, timeout_seconds=60)

    assert code("import os; os.kill(os.getpid(), 9)") == -9
    assert code("raise SystemExit(3)") == 3


def test_gpu_nodes_are_open_to_gpu_jobs_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [Path("/dev/nvidia0"), Path("/dev/nvidiactl")]
    monkeypatch.setattr(Path, "glob", lambda _, pattern: nodes if pattern == "nvidia*" else [])
    assert job_access(tmp_path, gpu=True).devices == tuple(nodes)
    assert job_access(tmp_path, gpu=False).devices == ()


@pytest.fixture
def without_bubblewrap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")


def test_the_strongest_level_is_taken_and_what_is_missing_is_said(
    settings: Settings, without_bubblewrap: None
) -> None:
    found = sandbox_levels.strongest(settings)
    assert found.missing["namespaces"] == "bubblewrap is not installed"
    assert found.level == ("landlock" if landlock.abi() else "process")


def test_below_the_configured_minimum_nothing_runs(
    override_settings: Callable[..., Settings], without_bubblewrap: None
) -> None:
    with pytest.raises(
        Unavailable, match=r"MODELPRESS_SANDBOX=namespaces.*bubblewrap is not installed"
    ) as no:
        sandbox_levels.strongest(override_settings(sandbox="namespaces"))
    assert (no.value.code, "Install bubblewrap" in str(no.value.hint)) == ("no_sandbox", True)


def test_a_level_that_does_not_hold_is_not_believed(settings: Settings) -> None:
    assert sandbox_levels.probe("process", settings.scratch_dir) == "a file outside can be read"


def test_a_data_directory_where_jobs_may_read_is_noticed(level: SandboxLevel) -> None:
    """Everything below the interpreter's prefix is open to them, other tenants' models too if they are kept there."""
    with tempfile.TemporaryDirectory(dir=sys.prefix) as directory:
        assert sandbox_levels.probe(level, Path(directory)) == "a file outside can be read"


def left_behind() -> list[psutil.Process]:
    return [p for p in psutil.process_iter(["cmdline"]) if MARKER in (p.info["cmdline"] or [])]
