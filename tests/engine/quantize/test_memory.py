"""Memory is a promise: in a process that cannot have more, what a plan allows is enough, and what is taken is near it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import facts_of, tiny_model

from app.spec.compression import CompressionSpec
from app.spec.plan import plan_job

pytestmark = pytest.mark.slow

# Of the system's accounting: thread stacks and heaps are counted by what they may grow to.
SPARE = 1.2
WORK = """
import json, resource, sys
from pathlib import Path
from tiny_models import facts_of
from app.spec.compression import CompressionSpec
from workers.engine.technique import StepContext, run_step

source, target, text, spec, planned, limit = (json.loads(word) for word in sys.argv[1:])
(step,) = CompressionSpec.model_validate(spec).steps
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
directory = Path(source)
run_step(step, StepContext(
    source=directory, target=Path(target), original=directory, facts=facts_of(directory), calibration_text=Path(text),
    threads=2, memory_budget=planned,
))
status = Path("/proc/self/status").read_text().splitlines()
print(json.dumps(1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))))
"""


def run_within(
    source: Path, target: Path, text: Path, spec: object, *, planned: int, limit: int
) -> subprocess.CompletedProcess[str]:
    """The work in a process whose private memory has a hard limit."""
    target.mkdir()
    arguments = [json.dumps(value) for value in (str(source), str(target), str(text), spec, planned, limit)]
    here = Path(__file__).parents[1]
    return subprocess.run(
        [sys.executable, "-c", WORK, *arguments],
        capture_output=True, text=True, check=False, env={"PYTHONPATH": f"{here}:{here.parents[1]}"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose widest input has statistics of 256 MiB, a hundred times its weights."""
    return tiny_model(
        "LlamaForCausalLM", tmp_path_factory.mktemp("wide"), intermediate_size=8192, num_hidden_layers=2
    )


def test_gptq_keeps_to_its_plan_under_a_hard_limit(wide: Path, tiny_text: Path, tmp_path: Path) -> None:
    spec = {"steps": [{"technique": "quantize.calibrated", "group_size": 64, "calibration_tokens": 512}]}
    stages = plan_job(CompressionSpec.model_validate(spec), facts_of(wide)).stages
    planned = next(stage.peak_memory_bytes for stage in stages if "calibrated" in stage.name)
    done = run_within(wide, tmp_path / "a", tiny_text, spec, planned=planned, limit=int(SPARE * planned))
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= 1.2 * planned
    # The limit does limit: a third less, about what a second matrix of that size takes, is not enough.
    failed = run_within(
        wide, tmp_path / "b", tiny_text, spec, planned=planned, limit=int(SPARE * planned * 2 / 3)
    )
    assert failed.returncode != 0
