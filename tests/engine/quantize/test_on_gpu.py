"""What is computed otherwise on a GPU gives what a CPU gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from technique_runs import Case, context_for, digests, run_case
from torch import Tensor

from app.spec.quantize import QuantizeCalibrated
from workers.engine.calibration import block_states
from workers.engine.calibration.input_moments import InputSite
from workers.engine.quantize.column_kernel import column_kernel
from workers.engine.quantize.column_sweep import round_in_order
from workers.engine.quantize.compensation import factorize
from workers.engine.quantize.grid import Grid
from workers.engine.quantize.layer_fit import LayerFit, fit_layer
from workers.engine.technique import run_step

pytestmark = pytest.mark.gpu

ROWS, COLUMNS = 300, 208


def _statistics() -> Tensor:
    inputs = torch.randn(1000, COLUMNS) @ torch.randn(COLUMNS, COLUMNS)
    return inputs.t() @ inputs / len(inputs)


def _moved(fit: LayerFit, device: str) -> LayerFit:
    held = None if fit.held is None else fit.held.to(device)
    return replace(
        fit, scale=fit.scale.to(device), zero=fit.zero.to(device), codes=fit.codes.to(device), held=held
    )


@pytest.mark.parametrize("previous", [False, True])
@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_kernel_rounds_columns_as_torch_does_one_by_one(
    *, symmetric: bool, pruned: bool, previous: bool
) -> None:
    torch.manual_seed(0)
    weight = torch.randn(ROWS, COLUMNS)
    factor = factorize(_statistics(), 0.05)
    fit = fit_layer(weight, Grid(4, symmetric), group_size=16, dtype=torch.float32)
    if pruned:
        fit = replace(fit, held=torch.rand_like(weight) < 0.5)
    before = weight + 0.01 * torch.randn_like(weight) if previous else None
    expected = round_in_order(weight, factor.coupling, factor.order, fit, previous=before)

    on_gpu = replace(factor, order=factor.order.cuda(), flipped=factor.flipped.cuda())
    assert column_kernel(fit.grid, torch.device("cuda")) is not None
    before = None if before is None else before.cuda()
    codes = round_in_order(weight.cuda(), on_gpu.coupling, on_gpu.order, _moved(fit, "cuda"), previous=before)
    # A tie that falls otherwise moves all that follows it in its row.
    assert (codes.cpu() != expected).any(1).float().mean() < 0.02


def test_moments_of_16_bit_inputs_are_exact() -> None:
    rows = (torch.randn(2048, 384) * 3).bfloat16()
    site = InputSite(["layer"])
    site.add(rows.cuda())
    expected = rows.double().t() @ rows.double() / len(rows)
    torch.testing.assert_close(site.second_moment().double().cpu(), expected, atol=1e-5, rtol=1e-5)


def test_layers_lose_as_much_as_on_a_cpu(
    tiny: Callable[[str], Path], tiny_text: Path, tmp_path: Path
) -> None:
    step = QuantizeCalibrated(group_size=32, calibration_tokens=1024)
    lost = [
        run_case(
            Case(step, "LlamaForCausalLM", "int4"),
            tiny("LlamaForCausalLM"),
            tmp_path / device,
            tiny_text,
            device=device,
        ).outcome.metrics["relative_output_error"]
        for device in ("cpu", "cuda")
    ]
    assert lost[1] == pytest.approx(lost[0], rel=0.02)


@pytest.mark.parametrize("solver", ["gptq", "signround"])
def test_a_stopped_step_goes_on_to_the_same_bytes(
    solver: str, tiny: Callable[[str], Path], tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_states, "_SECONDS_BETWEEN_COPIES", 0.0)
    settings = {"solver": solver, "tuning_steps": 3} if solver == "signround" else {}
    step = QuantizeCalibrated(group_size=32, calibration_tokens=1024, **settings)
    source = tiny("LlamaForCausalLM")

    def run(name: str, stop_at: float | None) -> Path:
        def progress(share: float, _message: str) -> None:
            if stop_at is not None and share > stop_at:
                raise KeyboardInterrupt

        target = tmp_path / name
        target.mkdir(exist_ok=True)
        context = context_for(step, source, target, tiny_text, device="cuda", progress=progress)
        run_step(step, replace(context, journal=tmp_path / f"{name}-journal"))
        return target

    whole = run("whole", None)
    with pytest.raises(KeyboardInterrupt):
        run("stopped", 0.6)
    assert [*(tmp_path / "stopped-journal").glob("block-*.json")]
    assert digests(run("stopped", None)) == digests(whole)
