"""Half the multiplications of a real CNN for at most a point of accuracy: prune.channels on CIFAR-10.

    python benchmarks/prune_channels.py /path/to/cnn training|criteria [--steps 500] [--keep]

The network is PyPI's cifar-10-model 7.4.0 (six convolutions, three linear layers) as an ONNX file. `training`: the
default criterion and chance are trained alike, on the training images. `criteria`: all are compared before training. Accuracy is that of
onnxruntime on all 10,000 test images; latency is taken in turns, on one thread.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir
import onnxruntime
import torch
from figures import Figures
from safetensors.numpy import save_file
from safetensors.torch import load_file

from app.spec.preprocessing import Preprocessing
from app.spec.prune_channels import PruneChannels
from workers.engine.distill.snapshots import Snapshots
from workers.engine.export.onnx import export_program
from workers.engine.onnx_network import Network, read_network, write_network
from workers.engine.prune.channel_groups import find_channels
from workers.engine.prune.channel_training import TrainingImages
from workers.engine.prune.channels import fine_tune, prune

CRITERIA = ("taylor", "magnitude", "norm_scale", "mean_activation", "apoz", "random")
RAW_PIXELS = Preprocessing(
    resize=(32, 32), resample="bilinear", crop=None, scale=1.0, mean=(0.0,) * 3, std=(1.0,) * 3
)
_ROUNDS, _BATCH = 60, 32


class Measured:
    """A network as a file, in onnxruntime on one thread."""

    def __init__(self, path: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.input = self.session.get_inputs()[0].name
        self.bytes = path.stat().st_size

    def logits(self, images: np.ndarray) -> np.ndarray:
        pixels = images.transpose(0, 3, 1, 2).astype(np.float32)
        return self.session.run(None, {self.input: pixels})[0]

    def accuracy(self, images: np.ndarray, labels: np.ndarray) -> float:
        right = [
            self.logits(images[at : at + 250]).argmax(1) == labels[at : at + 250]
            for at in range(0, len(labels), 250)
        ]
        return float(np.concatenate(right).mean())

    def milliseconds(self, images: np.ndarray) -> float:
        started = time.perf_counter()
        self.logits(images)
        return (time.perf_counter() - started) * 1e3


def speedup(original: Measured, result: Measured, images: np.ndarray) -> float:
    """Median of the original's time over the result's, in turns."""
    ratios = [original.milliseconds(images) / result.milliseconds(images) for _ in range(_ROUNDS + 5)]
    return statistics.median(ratios[5:])


def export(assets: Path, path: Path) -> None:
    """The network as its author trained it."""
    spec = importlib.util.spec_from_file_location("nets", assets / "nets.py")
    nets = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(nets)
    module = nets.CifarVGG().eval()
    module.load_state_dict(load_file(assets / "cifar_vgg.safetensors"), strict=False)
    free = {"x": {0: torch.export.Dim.DYNAMIC}}
    graph = export_program(
        module, {"x": torch.zeros(2, 3, 32, 32)}, output="logits", free=free, architecture="CifarVGG"
    )
    onnx_ir.save(graph, path)


def save_dataset(assets: Path, path: Path) -> None:
    """The training images as the service keeps them."""
    with np.load(assets / "cifar10_train.npz") as arrays:
        tensors = {"images": arrays["x"], "labels": arrays["y"].astype(np.int64)}
    save_file(tensors, path, metadata={"layout": "NHWC"})


def pruned(original: Path, images: TrainingImages, step: PruneChannels) -> tuple[Network, float]:
    """A network cut down, and the share of the multiplications that is left."""
    network = read_network(original)
    channels = find_channels(network)
    counts = prune(
        network, channels, images.first(step.calibration_images), step, seed=0, tick=lambda _: None
    )
    return network, channels.macs(counts) / channels.macs()


def trained(network: Network, original: Path, images: TrainingImages, step: PruneChannels) -> float:
    """Fine-tune in place; return the seconds it took."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="mp-channels-") as states:
        fine_tune(
            network,
            read_network(original),
            images,
            step,
            seed=0,
            snapshots=Snapshots(Path(states)),
            progress=lambda *_: None,
        )
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("assets", type=Path)
    parser.add_argument("what", choices=("training", "criteria"))
    parser.add_argument("--steps", type=int, default=PruneChannels().max_steps)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--keep", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    settings = {"steps": str(arguments.steps), "threads": str(arguments.threads)}
    figures = Figures(f"prune_channels_{arguments.what}" if arguments.keep else None, **settings)
    with tempfile.TemporaryDirectory() as directory:
        setting = prepared(Path(directory), arguments.assets, figures)
        if arguments.what == "training":
            compare_trained(setting, arguments.steps, figures)
        else:
            compare_criteria(setting, figures)
    figures.exit()


@dataclass(frozen=True)
class Setting:
    """What both comparisons start from."""

    original: Path
    images: TrainingImages
    test: np.ndarray
    labels: np.ndarray
    before: Measured
    accuracy: float


def prepared(work: Path, assets: Path, figures: Figures) -> Setting:
    """Write the network and its datasets, and state what the original does."""
    original = work / "original.onnx"
    export(assets, original)
    save_dataset(assets, work / "training.safetensors")
    images = TrainingImages(work / "training.safetensors", work / "training.npy", RAW_PIXELS, PruneChannels())
    with np.load(assets / "cifar10_test.npz") as arrays:
        test, labels = arrays["x"], arrays["y"]
    before = Measured(original)
    accuracy = before.accuracy(test, labels)
    figures.add("original: accuracy", accuracy, "share of 10,000", compared_with="the labels")
    return Setting(original, images, test, labels, before, accuracy)


def compare_trained(setting: Setting, steps: int, figures: Figures) -> None:
    """The default criterion, held to the floors, and chance."""
    for criterion in ("taylor", "random"):
        step = PruneChannels(criterion=criterion, max_steps=steps)
        network, left = pruned(setting.original, setting.images, step)
        seconds = trained(network, setting.original, setting.images, step)
        result = setting.original.with_name("result.onnx")
        write_network(network, result)
        report(figures, criterion, setting, Measured(result), left=left, seconds=seconds)


def compare_criteria(setting: Setting, figures: Figures) -> None:
    """All criteria before training, with what stays making up for what goes, and without."""
    for repair in (True, False):
        for criterion in CRITERIA:
            step = PruneChannels(criterion=criterion, repair=repair)
            network, left = pruned(setting.original, setting.images, step)
            result = setting.original.with_name("untrained.onnx")
            write_network(network, result)
            figures.add(
                f"{criterion}, {'repaired' if repair else 'as cut'}, untrained: accuracy",
                Measured(result).accuracy(setting.test, setting.labels),
                "share of 10,000",
                compared_with=f"the original's {setting.accuracy:.4f}; {left:.3f} of the multiplications",
            )


def report(
    figures: Figures, criterion: str, setting: Setting, after: Measured, *, left: float, seconds: float
) -> None:
    """State what became of accuracy, multiplications, time and bytes; floors are those of the default criterion."""
    is_default, accuracy = criterion == PruneChannels().criterion, setting.accuracy
    result = after.accuracy(setting.test, setting.labels)
    faster = speedup(setting.before, after, setting.test[:_BATCH])
    rows = (
        ("multiplications left", left, "share", "<= 0.5", left <= 0.5),
        ("accuracy", result, "share of 10,000", ">= original - 0.01", result >= accuracy - 0.01),
        ("speed-up in onnxruntime, batch 32, one thread", faster, "times", ">= 1.5", faster >= 1.5),
        ("training", seconds, "s", "<= 1200", seconds <= 1200),
        ("file", after.bytes / setting.before.bytes, "share", None, True),
    )
    for name, value, unit, floor, ok in rows:
        figures.add(
            f"{criterion}, trained: {name}",
            value,
            unit,
            compared_with=f"the original ({accuracy:.4f} right)",
            floor=floor if is_default else None,
            ok=ok or not is_default,
        )


if __name__ == "__main__":
    main()
