"""MobileNetV2 in int8 (`quantize.onnx`, qdq) against its original and against onnxruntime's own static quantization.

Usage: .venv/bin/python benchmarks/image_int8.py --assets DIRECTORY [--images 500] [--ranges minmax] [--keep NAME]

DIRECTORY holds `mobilenet_v2_imagenet.safetensors` (torchvision's), `nets.py` (the network in plain torch),
`imagenet20.npz` (20 labelled ImageNet images) and `cifar10_test.npz`. Both are calibrated on the first 64 of the CIFAR
images, resized; accuracy is measured on the ImageNet ones, agreement with the original on the next `--images` CIFAR ones
too: they are no images of its classes, but natural ones. Latency is onnxruntime's, float and int8 graphs in turns.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnxruntime
import torch
from figures import Figures
from mobilenet_v2 import convert
from numpy.typing import NDArray

from app.intake.read_images import read_images
from app.intake.read_model import read_model
from app.spec.facts import ModelFacts
from app.spec.quantize_onnx import QuantizeOnnx
from workers.engine.architectures.loading import architecture_of, load_model
from workers.engine.architectures.norm_folding import fold_batch_norms
from workers.engine.export.onnx import open_session, publish_graph, save_graph
from workers.engine.export.onnx_images import PIXELS, export_image_graph
from workers.engine.images.geometry import fitted
from workers.engine.images.image_set import ImageSet
from workers.engine.images.pixels import pixel_values
from workers.engine.technique import StepContext, run_step

THREADS = 1
CALIBRATION_IMAGES = 64
ROUNDS = 40
SHAPE = (3, 224, 224)
Logits = NDArray[np.float32]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--assets", type=Path, required=True)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--ranges", choices=("minmax", "mse"), default="minmax")
    parser.add_argument("--keep", help="name of a file in results/ to keep the figures in")
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    figures = Figures(arguments.keep, ranges=arguments.ranges, images=str(arguments.images))
    with tempfile.TemporaryDirectory(prefix="mp-images-") as scratch:
        measure(figures, arguments.assets, Path(scratch), images=arguments.images, ranges=arguments.ranges)
    figures.exit()


@dataclass(frozen=True)
class Pixels:
    """What the models are given."""

    calibration: NDArray[np.float32]
    labelled: NDArray[np.float32]
    labels: NDArray[np.int64]
    others: NDArray[np.float32]


def measure(figures: Figures, assets: Path, scratch: Path, *, images: int, ranges: str) -> None:
    # The ImageNet images have the size the network takes: enlarged and cut, they would lose their borders.
    edge = {"shortest_edge": SHAPE[1]}
    model = convert(assets / "mobilenet_v2_imagenet.safetensors", scratch / "model", size=edge)
    facts = read_model({file.name: file for file in model.iterdir()}).facts
    sets = {name: dataset(assets / f"{name}.npz", scratch / name) for name in ("imagenet20", "cifar10_test")}
    pixels = prepared(facts, sets, images)
    check_logits(figures, assets, model, pixels)

    began = time.perf_counter()
    ours = quantized_by_us(model, facts, sets["cifar10_test"], scratch / "ours", ranges)
    figures.add("our step", time.perf_counter() - began, "s", compared_with="nothing")
    graph = float_graph(model, scratch / "float")
    theirs = quantized_by_onnxruntime(graph, pixels.calibration, scratch / "theirs")
    sessions = {
        "float32": open_session(graph, threads=THREADS),
        "int8": open_session(ours, threads=THREADS),
        "onnxruntime": open_session(theirs, threads=THREADS),
    }
    state_sizes(figures, model, graph, ours, theirs)
    state_quality(figures, sessions, pixels)
    state_latency(figures, sessions, pixels.labelled)
    joined = integer_share(ours, scratch / "optimized.onnx")
    figures.add(
        "convolutions and products in integers",
        joined,
        "share",
        compared_with="all",
        floor="1",
        ok=joined == 1,
    )


def dataset(source: Path, target: Path) -> ImageSet:
    """The dataset as the service keeps it."""
    found = read_images(source, source.name, "npz", max_bytes=2**32)
    with target.open("wb") as file:
        file.writelines(found.chunks())
    return ImageSet(target)


def prepared(facts: ModelFacts, sets: dict[str, ImageSet], images: int) -> Pixels:
    def pixels(name: str, count: int) -> NDArray[np.float32]:
        assert facts.preprocessing is not None
        chunks = [fitted(chunk, facts.preprocessing) for chunk in sets[name].chunks(count)]
        return pixel_values(np.concatenate(chunks), facts.preprocessing)

    cifar = pixels("cifar10_test", CALIBRATION_IMAGES + images)
    labels = sets["imagenet20"].labels(20)
    assert labels is not None
    return Pixels(cifar[:CALIBRATION_IMAGES], pixels("imagenet20", 20), labels, cifar[CALIBRATION_IMAGES:])


def check_logits(figures: Figures, assets: Path, model: Path, pixels: Pixels) -> None:
    """The converted model must be the network that the weights are of."""
    spec = importlib.util.spec_from_file_location("nets", assets / "nets.py")
    assert spec is not None
    assert spec.loader is not None
    nets: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(nets)
    from safetensors.torch import load_file

    plain = nets.MobileNetV2().eval()
    plain.load_state_dict(load_file(assets / "mobilenet_v2_imagenet.safetensors"), strict=False)
    values = torch.from_numpy(pixels.labelled)
    with torch.inference_mode():
        difference = float((plain(values) - load_model(model)(values)[0]).abs().max())
    figures.add(
        "largest difference of logits", difference, "logits", compared_with="plain torch", floor="< 1e-3",
        ok=difference < 1e-3,
    )  # fmt: skip


def quantized_by_us(model: Path, facts: ModelFacts, images: ImageSet, target: Path, ranges: Any) -> Path:
    target.mkdir()
    context = StepContext(
        source=model, target=target, original=model, facts=facts, calibration_images=images.path, threads=THREADS
    )  # fmt: skip
    step = QuantizeOnnx(method="qdq", calibration_images=CALIBRATION_IMAGES, ranges=ranges)
    outcome = run_step(step, context)
    print(outcome.metrics, flush=True)
    return target


def float_graph(model: Path, target: Path) -> Path:
    loaded = load_model(model)
    fold_batch_norms(loaded)
    save_graph(export_image_graph(loaded, architecture_of(model), SHAPE), target.with_suffix(".parts"))
    target.mkdir()
    publish_graph(target.with_suffix(".parts"), target)
    return target


def quantized_by_onnxruntime(graph: Path, calibration: NDArray[np.float32], target: Path) -> Path:
    """The same folded graph, by the settings its documentation recommends for convolutions."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.images = iter(calibration[:, None])

        def get_next(self) -> dict[str, Any] | None:
            image = next(self.images, None)
            return None if image is None else {PIXELS: image}

    target.mkdir()
    # Its symbolic inference of shapes stumbles over lists of integers in Constant nodes.
    quant_pre_process(str(graph / "model.onnx"), str(target / "prepared.onnx"), skip_symbolic_shape=True)
    quantize_static(
        str(target / "prepared.onnx"), str(target / "model.onnx"), Reader(), quant_format=QuantFormat.QDQ,
        per_channel=True, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip
    (target / "prepared.onnx").unlink()
    return target


def state_sizes(figures: Figures, model: Path, graph: Path, ours: Path, theirs: Path) -> None:
    size = {
        name: (d / "model.onnx").stat().st_size
        for name, d in (("float", graph), ("ours", ours), ("theirs", theirs))
    }
    weights = (model / "model.safetensors").stat().st_size
    figures.add(
        "int8 file over the original's weights",
        size["ours"] / weights,
        "ratio",
        compared_with=f"{weights} bytes",
    )
    figures.add(
        "int8 file over the float graph",
        size["ours"] / size["float"],
        "ratio",
        compared_with=f"{size['float']} bytes",
    )
    figures.add_against_peer(
        "int8 file", size["ours"], "bytes", peer="onnxruntime quantize_static", peer_version=onnxruntime.__version__,
        peer_value=size["theirs"],
    )  # fmt: skip


def state_quality(figures: Figures, sessions: dict[str, Any], pixels: Pixels) -> None:
    labelled = {name: logits(session, pixels.labelled) for name, session in sessions.items()}
    right = {name: int((found.argmax(1) == pixels.labels).sum()) for name, found in labelled.items()}
    figures.add("right of 20 ImageNet images, float32", right["float32"], "images", compared_with="labels")
    peer = {"peer": "onnxruntime quantize_static", "peer_version": onnxruntime.__version__}
    figures.add_against_peer(
        "right of 20 ImageNet images, int8", right["int8"], "images", peer_value=right["onnxruntime"], **peer
    )
    for what, values in (("ImageNet", pixels.labelled), ("CIFAR", pixels.others)):
        found = {name: logits(session, values) for name, session in sessions.items()}
        for measure_of, unit, name in (
            (agreement, "share", "top-1 agreement"),
            (divergence, "nats", "mean KL"),
        ):
            ours, theirs = (measure_of(found["float32"], found[side]) for side in ("int8", "onnxruntime"))
            figures.add_against_peer(
                f"{name} with float32, {len(values)} {what} images", ours, unit, peer_value=theirs, **peer
            )


def state_latency(figures: Figures, sessions: dict[str, Any], images: NDArray[np.float32]) -> None:
    for batch in (1, 8):
        times: dict[str, list[float]] = {name: [] for name in sessions}
        for _ in range(ROUNDS):
            for name, session in sessions.items():
                began = time.perf_counter()
                session.run(None, {PIXELS: images[:batch]})
                times[name].append((time.perf_counter() - began) * 1e3)
        middle = {name: median(samples[5:]) for name, samples in times.items()}
        figures.add(
            f"latency of int8, batch {batch}",
            middle["int8"],
            "ms",
            compared_with=f"float32: {middle['float32']:.2f} ms",
        )
        figures.add(
            f"latency over float32's, batch {batch}",
            middle["int8"] / middle["float32"],
            "ratio",
            compared_with="float32",
        )
        figures.add_against_peer(
            f"latency, batch {batch}", middle["int8"], "ms", peer="onnxruntime quantize_static",
            peer_version=onnxruntime.__version__, peer_value=middle["onnxruntime"],
        )  # fmt: skip


def integer_share(directory: Path, optimized: Path) -> float:
    """Of the operators that multiply weights in the graph that onnxruntime really runs."""
    import onnx

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(optimized)
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(directory / "model.onnx"), options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(str(optimized)).graph.node]
    integer = sum(kinds.count(kind) for kind in ("QLinearConv", "QGemm", "MatMulIntegerToFloat"))
    return integer / (integer + sum(kinds.count(kind) for kind in ("Conv", "FusedConv", "Gemm", "MatMul")))


def logits(session: Any, values: NDArray[np.float32]) -> Logits:
    def batches() -> Iterator[Logits]:
        for start in range(0, len(values), 8):
            yield session.run(None, {PIXELS: values[start : start + 8]})[0]

    return np.concatenate(list(batches()))


def agreement(before: Logits, after: Logits) -> float:
    return float((before.argmax(1) == after.argmax(1)).mean())


def divergence(before: Logits, after: Logits) -> float:
    p, q = (torch.log_softmax(torch.from_numpy(found).double(), 1) for found in (before, after))
    return float((p.exp() * (p - q)).sum(1).mean())


if __name__ == "__main__":
    main()
