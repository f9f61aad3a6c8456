"""prune.channels: remove whole channels of a convolutional network, and fine-tune what is left.

Idea: channels that only go together are found by following them through the graph (`channel_groups.py`); a criterion says
what each is worth, and one ranking over the network, by worth for cost, is cut where the target is met
(`channel_budget.py`); the layers that read what goes are refitted by least squares and batch norms estimated anew
(`channel_cut.py`); then the smaller network learns from the original and from labels (`channel_training.py`).
Papers: Molchanov et al. 2017 and 2019; Fang et al. 2023, "DepGraph"; He et al. 2017, "Channel Pruning for Accelerating Very
Deep Neural Networks"; Hinton et al. 2015.
Left out: pruning in several rounds with training in between, channels of grouped convolutions, and augmented images.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from app.spec.prune_channels import PruneChannels
from app.spec.report import LayerOutcome
from workers.engine.checkpoint.side_files import copy_side_files
from workers.engine.distill.record import Training
from workers.engine.distill.snapshots import Snapshots
from workers.engine.distill.training import train
from workers.engine.export.onnx import MODEL_FILE
from workers.engine.onnx_network import Network, read_network, write_network
from workers.engine.onnx_network.reading import check_same
from workers.engine.prune.channel_budget import Target, choose
from workers.engine.prune.channel_criteria import CRITERIA
from workers.engine.prune.channel_cut import cut, estimate_norms, repair
from workers.engine.prune.channel_groups import find_channels
from workers.engine.prune.channel_layout import Channels
from workers.engine.prune.channel_statistics import loss_changes, observe, statistics_of
from workers.engine.prune.channel_training import ImageBatch, ImageLessons, TrainingImages
from workers.engine.technique import Progress, StepContext, StepOutcome, implements

_CHECKED, _OBSERVED, _TRAINED = 0.02, 0.1, 0.98
_COMPARES_BETWEEN_SPACES = frozenset({"taylor"})
Tick = Callable[[float], None]


@implements(PruneChannels)
def prune_channels(step: PruneChannels, context: StepContext) -> StepOutcome:
    """Write `context.target` with a smaller network of the same inputs and outputs.

    Raises UnsupportedForModel for a graph that cannot be read or has no channels that may go, InvalidRequest where the target
    is out of reach or the images are too few.
    """
    preprocessing = context.facts.preprocessing
    if context.training_images is None or preprocessing is None:
        raise ValueError("prune.channels needs training images and a model that takes them")
    path = context.source / MODEL_FILE
    network, teacher = read_network(path), read_network(context.original / MODEL_FILE)
    check_same(network, path, threads=context.threads)
    with TemporaryDirectory(dir=context.target.parent, prefix="images-") as work:
        images = TrainingImages(
            context.training_images, Path(work) / "images.npy", preprocessing, step, context.facts
        )
        context.progress(_CHECKED, "reading the network")
        before = find_channels(network)
        counts = prune(
            network,
            before,
            images.first(step.calibration_images),
            step,
            seed=context.seed,
            tick=_ticks(context),
        )
        training = fine_tune(
            network,
            teacher,
            images,
            step,
            seed=context.seed,
            snapshots=Snapshots(Path(work)),
            progress=lambda share, what: context.progress(_OBSERVED + (_TRAINED - _OBSERVED) * share, what),
            is_stopped=context.stop_training,
        )
    write_network(network.eval(), context.target / MODEL_FILE)
    check_same(network, context.target / MODEL_FILE, threads=context.threads)
    copy_side_files(context.source, context.target)
    context.progress(1.0, "done")
    return _outcome(network, before, counts, training)


def prune(
    network: Network, channels: Channels, images: ImageBatch, step: PruneChannels, *, seed: int, tick: Tick
) -> dict[int, int]:
    """Cut a network down to the step's target, in place; return how many channels each space keeps.

    `images` are those that the criterion and the repair look at. `tick` is called with a share from 0 to 1.
    """
    seen = observe(network, channels, images.images, lambda share: tick(0.5 * share))
    changes = None
    if step.criterion == "taylor":
        labels = _labels(network, images)
        changes = loss_changes(
            network, channels, images.images, labels, lambda share: tick(0.5 + 0.5 * share)
        )
    generator = torch.Generator().manual_seed(seed)
    scores = {}
    for space in sorted(channels.free):
        found = CRITERIA[step.criterion](statistics_of(network, channels, space, seen, changes, generator))
        if found is not None:
            scores[space] = found
    target = Target(*step.target, step.floor, step.round_to)
    kept = choose(channels, scores, target, by_space=step.criterion not in _COMPARES_BETWEEN_SPACES)
    if step.repair:
        repair(network, channels, kept, seen)
    cut(network, channels, kept)
    if step.repair:
        estimate_norms(network, images.images)
    return {space: len(kept[space]) if space in kept else channels.sizes[space] for space in channels.free}


def fine_tune(  # noqa: PLR0913 - two networks, what they see, and how
    network: Network,
    teacher: Network,
    images: TrainingImages,
    step: PruneChannels,
    *,
    seed: int,
    snapshots: Snapshots,
    progress: Progress,
    is_stopped: Callable[[], bool],
) -> Training:
    """Train a network, in place, to give the teacher's outputs and the labels; the best state is left."""
    lessons = ImageLessons(network, teacher, images.held_out(), step)
    batches = images.batches(seed)
    return train(
        lessons, batches, step, zeros={}, snapshots=snapshots, progress=progress, is_stopped=is_stopped
    )


@torch.no_grad()
def _labels(network: Network, images: ImageBatch) -> Tensor:
    """Those of the images, or the classes that the network sees: its outputs as they are would have no gradient."""
    return network.eval()(images.images).argmax(1) if images.labels is None else images.labels


def _ticks(context: StepContext) -> Tick:
    return lambda share: context.progress(
        _CHECKED + (_OBSERVED - _CHECKED) * share, "looking at what channels do"
    )


def _outcome(network: Network, before: Channels, counts: dict[int, int], training: Training) -> StepOutcome:
    layers = []
    for layer in before.layers:
        weight = layer.call.weight or ""
        is_cut = any(
            counts.get(segment.space, before.sizes[segment.space]) < before.sizes[segment.space]
            for segment in (*(layer.reads or ()), *layer.writes)
        )
        layers.append(
            LayerOutcome(
                name=weight,
                action="pruned" if is_cut else "trained",
                parameters=network.array(weight).numel(),
            )
        )
    return StepOutcome(
        layers=tuple(layers),
        metrics={
            "macs_before": before.macs(),
            "macs_after": before.macs(counts),
            "channels_before": sum(before.sizes[space] for space in before.free),
            "channels_after": sum(counts.values()),
            "training_steps": training.steps,
            "stopped_by": training.stopped_by,
            "images_per_second": training.amount / training.seconds,
            "held_out_loss_before": training.held_out[0][1],
            "held_out_loss": training.best,
        },
        curves={"training_loss": tuple(training.losses), "held_out_loss": tuple(training.held_out)},
    )
