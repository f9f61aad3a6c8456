"""The acceptance gate, over a whole job: a result that its technique ruined is rejected, a sound one is not."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import facts_of, tiny_model

from app.spec.compression import CompressionSpec
from app.spec.report import Report
from workers.engine.architectures.loading import load_model, load_tokenizer
from workers.engine.calibration.builtin import builtin_text
from workers.engine.pipeline import Job, run_job

LIMIT = 0.5


def with_an_outlier_in_its_head(directory: Path) -> Path:
    """A model that has learnt how often tokens come, and one huge weight in its head that meets zeros alone."""
    model = load_model(tiny_model("LlamaForCausalLM", directory))
    tokens = load_tokenizer(directory)(builtin_text("calibration").read_text()[:8000])["input_ids"]
    windows = torch.tensor(tokens[: len(tokens) // 64 * 64]).reshape(-1, 64)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(30):
        optimizer.zero_grad()
        model(windows, labels=windows).loss.backward()
        optimizer.step()
    tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    tensors["model.norm.weight"][0] = 0
    tensors["lm_head.weight"][7, 0] = 1000
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def run(model: Path, root: Path, **step: Any) -> Report:
    """Run a job through all of its stages."""
    shutil.copytree(model, root / "inputs" / "model")
    spec = CompressionSpec.model_validate(
        {
            "steps": [{"technique": "quantize.dynamic", **step}],
            "acceptance": {"max_perplexity_increase": LIMIT},
            "evaluation": {"tokens": 512, "sequence_length": 64, "latency_rounds": 3},
        }
    )
    job = Job(
        job_id="job_gate", model_name="tiny", model_sha256="", spec=spec, facts=facts_of(model), student_facts=None,
        inputs=root / "inputs", stages=root / "stages", stop_file=root / "stop", fence=1, committed=(), device="cpu", threads=1,
        memory_budget=8 * 2**30,
    )  # fmt: skip
    said: list[Any] = []
    run_job(job, said.append)
    assert said[-1].type == "finished", said[-1]
    return Report.model_validate_json((root / "stages" / "05-1" / "report.json").read_text())


@pytest.mark.slow
def test_a_job_whose_result_is_ruined_is_rejected_and_a_sound_one_accepted(tmp_path: Path) -> None:
    model = with_an_outlier_in_its_head(tmp_path / "model")
    assert load_file(model / "model.safetensors")["lm_head.weight"].max() == 1000
    sound = run(model, tmp_path / "sound")
    ruined = run(model, tmp_path / "ruined", include_head=True)
    (kept,), (missed,) = sound.limits, ruined.limits
    assert kept.ok
    assert kept.measured is not None
    assert abs(kept.measured) < 0.05
    assert missed.measured is not None
    assert missed.measured > LIMIT
    assert not missed.ok
    assert (sound.verdict, ruined.verdict) == ("accepted", "rejected")
