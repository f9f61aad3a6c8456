from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from tiny_models import changed, facts_of, write_text

from app.spec.compatibility import check_spec
from app.spec.compression import CompressionSpec
from app.spec.prune_training import CubicSchedule, PruneTraining
from workers.engine.prune.training import prune_training
from workers.engine.technique import StepContext, StepOutcome

LISTED = {"shape": "list", "points": [[2, 0.3], [4, 0.6]]}
QUICK: dict[str, Any] = {
    "max_steps": 8, "evaluate_every": 4, "batch_size": 4, "sequence_length": 32, "learning_rate": 2e-3,
    "method": {"name": "magnitude", "schedule": LISTED},
}  # fmt: skip
MOVEMENT = {"name": "movement", "schedule": LISTED, "scope": "global"}
L0 = {"name": "l0", "penalty": 100, "gate_learning_rate": 2.0}
Tiny = Callable[[str], Path]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("training") / "text.txt", documents=120)


def _run(source: Path, target: Path, text: Path, spec: dict[str, Any], **extra: Any) -> StepOutcome:
    target.mkdir(parents=True)
    context = StepContext(
        **{"source": source, "target": target, "original": source, "facts": facts_of(source)}
        | {"training_text": text}
        | extra
    )
    return prune_training(PruneTraining(**(QUICK | spec)), context)


def _steps(**spec: Any) -> CompressionSpec:
    return CompressionSpec(steps=(PruneTraining(**(QUICK | spec)),))


def test_cubic_schedule_is_zhu_and_guptas() -> None:
    points = CubicSchedule(sparsity=0.8, begin=10, end=60, every=10).points_within(100)
    assert [step for step, _ in points] == [20, 30, 40, 50, 60]
    # Equation 1 of the paper, from nothing to 0.8.
    assert [sparsity for _, sparsity in points] == pytest.approx(
        [0.8 + (0 - 0.8) * (1 - (step - 10) / 50) ** 3 for step, _ in points]
    )
    assert CubicSchedule().points_within(200)[-1] == (120, 0.5)
    assert CubicSchedule().points_within(1) == ((1, 0.5),)


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ({"method": {"schedule": {"shape": "list", "points": [[4, 0.5], [2, 0.6]]}}}, "ascend"),
        ({"method": {"schedule": {"shape": "list", "points": [[9, 0.5]]}}}, "after max_steps"),
        ({"method": {"schedule": {"shape": "cubic", "begin": 5, "end": 5}}}, "before end"),
        ({"method": {"name": "l0", "schedule": LISTED}}, "schedule"),
        (
            {"method": {"name": "movement", "schedule": {"shape": "list", "points": [[1, 0.5]]}}},
            "nothing has moved",
        ),
        ({"method": {"name": "movement"}, "max_steps": 1}, "nothing has moved"),
        ({"max_seconds": 5}, "max_seconds"),
    ],
)
def test_a_schedule_that_cannot_be_kept_is_refused(spec: dict[str, Any], why: str) -> None:
    method = {"method": {"name": "magnitude"} | spec.get("method", {})}
    with pytest.raises(ValidationError, match=why):
        PruneTraining(**(QUICK | spec | method))


def test_what_a_model_cannot_take_is_refused_at_submit(tiny: Tiny) -> None:
    mixture = facts_of(tiny("MixtralForCausalLM"))
    (fault,) = check_spec(_steps(ignore=["*.experts.0.*"]), mixture)
    assert (fault.pointer, "one tensor" in fault.detail) == ("/steps/0/ignore/0", True)
    (fault,) = check_spec(_steps(sequence_length=512), facts_of(tiny("BertModel")))
    assert fault.pointer == "/steps/0/sequence_length"
    steps = [_steps().steps[0], {"technique": "prune.width"}]
    with pytest.raises(ValidationError, match="would fill the zeros"):
        CompressionSpec(steps=steps)


@pytest.mark.parametrize("method", [QUICK["method"], L0], ids=["magnitude", "l0"])
def test_a_training_that_was_stopped_goes_on_to_the_same_losses_and_bytes(
    method: dict[str, Any], tiny: Tiny, text: Path, tmp_path: Path
) -> None:
    def stop(share: float, message: str) -> None:
        if message.startswith("step 7"):
            raise KeyboardInterrupt

    def stopped(spec: dict[str, Any], journal: Path) -> None:
        with pytest.raises(KeyboardInterrupt):
            _run(tiny("LlamaForCausalLM"), tmp_path / "stopped", text, spec, journal=journal, progress=stop)

    _check_resumed(method, stopped, tiny, text, tmp_path)


def test_a_killed_training_goes_on_to_the_same_losses_and_bytes(
    tiny: Tiny, text: Path, tmp_path: Path
) -> None:
    def killed(spec: dict[str, Any], journal: Path) -> None:
        target = tmp_path / "killed"
        target.mkdir()
        arguments = [PruneTraining(**(QUICK | spec)).model_dump_json()]
        process = subprocess.run(
            [
                sys.executable,
                "-c",
                _UNTIL_A_STEP,
                *arguments,
                tiny("LlamaForCausalLM"),
                target,
                text,
                journal,
            ],
            check=False,
            env=os.environ
            | {
                "PYTHONPATH": str(Path(__file__).parents[1]),
                "OMP_NUM_THREADS": str(torch.get_num_threads()),
            },
        )
        assert process.returncode == -signal.SIGKILL

    _check_resumed(MOVEMENT, killed, tiny, text, tmp_path)


def _check_resumed(
    method: dict[str, Any],
    begin: Callable[[dict[str, Any], Path], None],
    tiny: Tiny,
    text: Path,
    directory: Path,
) -> None:
    # By plain cross-entropy, so without a teacher.
    spec = {"method": method, "hard_label_weight": 1.0, "max_steps": 12}
    original, journal = tiny("LlamaForCausalLM"), directory / "journal"
    whole = _run(original, directory / "whole", text, spec)
    begin(spec, journal)
    said: list[str] = []
    resumed = _run(
        original, directory / "resumed", text, spec, journal=journal, progress=lambda share, what: said.append(what)
    )  # fmt: skip
    assert not any(what.startswith("step 1 ") for what in said)
    assert resumed.curves == whole.curves
    assert 0.01 < resumed.metrics["sparsity"] < 1
    files = [directory / name / "model.safetensors" for name in ("whole", "resumed")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert not journal.exists()


_UNTIL_A_STEP = """
import os, signal, sys
from pathlib import Path
from tiny_models import facts_of
from app.spec.prune_training import PruneTraining
from workers.engine.prune.training import prune_training
from workers.engine.technique import StepContext

spec, source, target, text, journal = sys.argv[1:]

def progress(share, message):
    if message.startswith("step 7"):
        os.kill(os.getpid(), signal.SIGKILL)

source = Path(source)
prune_training(PruneTraining.model_validate_json(spec), StepContext(
    source=source, target=Path(target), original=source, facts=facts_of(source), training_text=Path(text),
    journal=Path(journal), progress=progress,
))
"""


def test_the_best_state_is_one_of_the_final_sparsity(tiny: Tiny, text: Path, tmp_path: Path) -> None:
    # The original itself has no loss at all by its own outputs, and is not what was asked for.
    outcome = _run(tiny("LlamaForCausalLM"), tmp_path / "out", text, {"hard_label_weight": 0.0})
    assert outcome.metrics["held_out_loss_before"] == pytest.approx(0, abs=1e-3)
    assert outcome.metrics["held_out_loss_after"] > 0.01
    assert outcome.metrics["sparsity"] == pytest.approx(0.6, abs=1e-3)


def test_training_makes_up_for_what_goes(tiny: Tiny, text: Path, tmp_path: Path) -> None:
    spec = {"max_steps": 30, "evaluate_every": 5, "patience": 9}
    outcome = _run(tiny("BertModel"), tmp_path / "out", text, spec)
    losses = dict(outcome.curves["held_out_loss"])
    assert outcome.metrics["held_out_loss_after"] < 0.8 * losses[5.0]


def test_ignored_layers_and_zeros_of_an_earlier_step_are_as_they_were(
    tiny: Tiny, text: Path, tmp_path: Path
) -> None:
    def first_rows_to_zero(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if "proj" in name:
                tensor[:4] = 0

    source = changed(tiny("LlamaForCausalLM"), tmp_path / "source", first_rows_to_zero)
    spec = {"ignore": ["*.layers.0.*"], "method": MOVEMENT}
    outcome = _run(source, tmp_path / "out", text, spec, original=tiny("LlamaForCausalLM"))
    after = load_file(tmp_path / "out" / "model.safetensors")
    pruned = [layer.name for layer in outcome.layers if layer.action == "pruned"]
    assert pruned
    for layer in outcome.layers:
        assert (after[layer.name][:4] == 0).all()
        assert (layer.action == "pruned") == (".layers.0." not in layer.name)
        assert (after[layer.name][4:] != 0).all() == (".layers.0." in layer.name)


def test_gates_that_stay_open_are_warned_of(tiny: Tiny, text: Path, tmp_path: Path) -> None:
    method = {"name": "l0", "penalty": 1e-6, "gate_learning_rate": 1e-3}
    outcome = _run(tiny("LlamaForCausalLM"), tmp_path / "out", text, {"method": method})
    assert "larger penalty" in outcome.warnings[0]
