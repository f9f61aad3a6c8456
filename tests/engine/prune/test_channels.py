"""prune.channels on a tiny network and real files: every criterion, the training, the same bytes twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_networks import IMAGE, Plain, write_tiny
from tiny_vision import write_images

from app.errors import InvalidRequest
from app.intake.read_model import read_model
from app.spec.prune_channels import PruneChannels
from workers.engine.onnx_network import read_network
from workers.engine.prune.channel_criteria import CRITERIA
from workers.engine.prune.channel_groups import find_channels
from workers.engine.prune.channel_training import TrainingImages
from workers.engine.technique import StepContext, StepOutcome, run_step

SETTINGS: dict[str, Any] = {
    "calibration_images": 16, "batch_size": 8, "max_steps": 6, "evaluate_every": 3, "learning_rate": 1e-3,
}  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("source")
    write_tiny(Plain, directory / "model.onnx")
    size = {"height": IMAGE[1], "width": IMAGE[2]}
    said = {"image_processor_type": "ViTImageProcessor", "size": size, "image_std": [0.25] * 3}
    (directory / "preprocessor_config.json").write_text(json.dumps(said))
    return directory


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("data") / "images", images=64, side=16)


def run(
    source: Path, dataset: Path, target: Path, *, said: list[float] | None = None, **settings: Any
) -> StepOutcome:
    target.mkdir(parents=True)
    context = StepContext(
        source=source,
        target=target,
        original=source,
        facts=read_model({path.name: path for path in source.iterdir()}).facts,
        training_images=dataset,
        progress=lambda share, _: None if said is None else said.append(share),
    )
    return run_step(PruneChannels(**(SETTINGS | settings)), context)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_halves_the_multiplications(
    criterion: str, source: Path, dataset: Path, tmp_path: Path
) -> None:
    said: list[float] = []
    found = run(source, dataset, tmp_path / "target", said=said, criterion=criterion, max_steps=1)
    result = find_channels(read_network(tmp_path / "target" / "model.onnx"))
    assert found.metrics["macs_after"] == result.macs() <= 0.5 * float(found.metrics["macs_before"] or 0)
    assert said == sorted(said)
    assert said[-1] == 1.0


def test_the_same_seed_gives_the_same_bytes(source: Path, dataset: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        run(source, dataset, tmp_path / name)
    one, two = ((tmp_path / name / "model.onnx").read_bytes() for name in ("one", "two"))
    assert one == two


def test_training_lowers_the_held_out_loss_and_the_best_state_is_written(
    source: Path, dataset: Path, tmp_path: Path
) -> None:
    found = run(source, dataset, tmp_path / "target", max_steps=30, evaluate_every=10, hard_label_weight=0.0)
    before, best = (float(found.metrics[key] or 0) for key in ("held_out_loss_before", "held_out_loss"))
    assert best < before
    assert best == min(loss for _, loss in found.curves["held_out_loss"])


def test_images_without_labels_teach_the_outputs_of_the_original(
    source: Path, dataset: Path, tmp_path: Path
) -> None:
    unlabelled = tmp_path / "unlabelled"
    save_file({"images": load_file(dataset)["images"]}, unlabelled, metadata={"layout": "NHWC"})
    found = run(source, unlabelled, tmp_path / "target")
    assert found.metrics["training_steps"] == 6


def test_batches_hold_every_image_once_an_epoch_and_none_that_is_held_out(
    source: Path, dataset: Path, tmp_path: Path
) -> None:
    facts = read_model({path.name: path for path in source.iterdir()}).facts
    assert facts.preprocessing is not None
    step = PruneChannels(batch_size=10, held_out_fraction=0.2)
    images = TrainingImages(dataset, tmp_path / "images.npy", facts.preprocessing, step)
    batches = images.batches(seed=0)
    seen = torch.cat([next(batches).images for _ in range(5)]).flatten(1)
    held_out = torch.cat([batch.images for batch in images.held_out()]).flatten(1)
    assert len(seen.unique(dim=0)) == 50
    assert len(held_out) == 13
    assert len(torch.cat([seen, held_out]).unique(dim=0)) == 63


def test_too_few_images_are_refused(source: Path, dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="60 images are left to train on, fewer than one batch of 61"):
        run(source, dataset, tmp_path / "target", batch_size=61, held_out_fraction=0.06)
