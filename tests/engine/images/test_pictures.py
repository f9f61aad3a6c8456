"""Picture files from an archive to what a model sees: the same as transformers' own image processors make of them."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from PIL import Image
from safetensors.torch import load_file
from tiny_models import facts_of
from tiny_vision import write_images

from app.errors import InvalidRequest
from app.intake.byte_stream import ByteStream
from app.intake.picture_header import PictureHeader, read_picture_header
from app.intake.read_dataset import read_dataset
from app.spec.base import Family
from app.spec.compression import Evaluation
from app.spec.facts import ModelFacts
from app.spec.image_set import MAX_PICTURE_PIXELS
from app.spec.preprocessing import Preprocessing, parse_preprocessing
from app.spec.prune_channels import PruneChannels
from workers.engine.images.calibration import calibration_pixels
from workers.engine.images.fitting import fitted_images
from workers.engine.images.image_set import ImageSet
from workers.engine.images.pictures import fitted_picture
from workers.engine.images.pixels import pixel_values
from workers.engine.measure.images import prepare_images
from workers.engine.prune.channel_training import TrainingImages
from workers.engine.technique import StepContext

PROCESSORS: dict[str, dict[str, Any]] = {
    "ViTImageProcessor": {"size": {"height": 32, "width": 24}},
    "DeiTImageProcessor": {"size": {"height": 40, "width": 40}, "crop_size": {"height": 32, "width": 31}},
    "ConvNextImageProcessor": {"size": {"shortest_edge": 33}, "crop_pct": 0.8},
    "MobileNetV2ImageProcessor": {"size": {"shortest_edge": 37}, "crop_size": {"height": 32, "width": 32}},
}


def scene(height: int, width: int, seed: int = 0, mode: str = "RGB") -> Image.Image:
    """A smooth picture with some noise on it."""
    rows, columns = np.mgrid[:height, :width]
    channels = [np.sin(rows / 9 + k) + np.cos(columns / 7 * (k + 1)) for k in range(3)]
    noise = np.random.default_rng(seed).normal(0, 0.1, (height, width, 3))
    pixels = np.clip(128 + 60 * (np.stack(channels, -1) + noise), 0, 255).astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


def saved(picture: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    target = io.BytesIO()
    picture.save(target, form, **options)
    return target.getvalue()


def turned(picture: Image.Image, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(picture, "JPEG", quality=95, exif=exif.tobytes())


def write_pictures(path: Path, files: dict[str, bytes]) -> ImageSet:
    """An archive of these files, as the service keeps it."""
    source = path.with_suffix(".zip")
    with zipfile.ZipFile(source, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    path.write_bytes(b"".join(read_dataset(source, source.name, max_bytes=2**24).chunks))
    return ImageSet(path)


def plain(size: tuple[int, int], channels: int = 3) -> Preprocessing:
    return Preprocessing(
        resize=size, resample="bilinear", crop=None, scale=1.0, mean=(0.0,) * channels, std=(1.0,) * channels
    )


@pytest.mark.parametrize("kind", PROCESSORS)
def test_pixels_are_those_of_transformers_own_processor(kind: str) -> None:
    backend = getattr(transformers, f"{kind}Pil", None) or getattr(transformers, kind)
    processor = backend(**PROCESSORS[kind])
    config = json.loads(processor.to_json_string()) | {"image_processor_type": kind}
    preprocessing = parse_preprocessing(config, model_type="vit", channels=3)
    for height, width in ((70, 90), (61, 45), (200, 57), (33, 33)):
        picture = scene(height, width, seed=height)
        ours = fitted_picture(saved(picture), preprocessing, "a.png")
        theirs = processor(picture, return_tensors="np")["pixel_values"]
        found = pixel_values(ours[None], preprocessing)
        assert found.shape == theirs.shape
        std = np.asarray(preprocessing.std)[:, None, None]
        assert np.abs((found - theirs) * std).max() <= 1.001 / 255, (height, width)


@pytest.mark.parametrize(("form", "mode"), [("JPEG", "RGB"), ("PNG", "RGBA"), ("PNG", "P"), ("PNG", "L"), ("WEBP", "RGB"), ("BMP", "RGB"), ("JPEG", "CMYK")])  # fmt: skip
def test_every_format_becomes_what_the_model_takes(form: str, mode: str) -> None:
    picture = scene(20, 30, mode=mode)
    found = fitted_picture(saved(picture, form), plain((20, 30)), "a")
    wanted = np.asarray(Image.open(io.BytesIO(saved(picture, form))).convert("RGB")).transpose(2, 0, 1)
    assert np.array_equal(found, wanted)
    assert fitted_picture(saved(picture, form), plain((20, 30), channels=1), "a").shape == (1, 20, 30)


@pytest.mark.parametrize(
    ("form", "mode", "options"),
    [
        ("JPEG", "RGB", {}),
        ("JPEG", "L", {"progressive": True, "exif": b"Exif\0\0" + bytes(30_000)}),
        ("PNG", "P", {}),
        ("WEBP", "RGB", {}),
        ("WEBP", "RGB", {"lossless": True}),
        ("WEBP", "RGBA", {"exif": b"Exif\0\0" + bytes(100)}),
        ("BMP", "RGB", {}),
    ],
)
def test_the_size_is_in_the_header_where_intake_looks(form: str, mode: str, options: dict[str, Any]) -> None:
    content = saved(scene(300, 70, mode=mode), form, **options)
    pieces = (content[at : at + 7] for at in range(0, len(content), 7))
    assert read_picture_header(ByteStream(pieces), "a") == PictureHeader(form, 300, 70)  # type: ignore[arg-type]


def test_pictures_are_turned_as_exif_says() -> None:
    lying = scene(20, 30)
    upright = fitted_picture(turned(lying, 6), plain((30, 20)), "a.jpg")
    stored = np.asarray(Image.open(io.BytesIO(turned(lying, 6))).convert("RGB"))
    assert np.array_equal(upright, np.rot90(stored, k=-1).transpose(2, 0, 1))


def test_sets_are_read_in_one_drawn_order_with_their_labels(tmp_path: Path) -> None:
    files = {f"set/{name}/{n}.png": saved(Image.new("RGB", (9 + n % 3, 8), (place, n, 0))) for place, name in enumerate("abc") for n in range(30)}  # fmt: skip
    pictures = write_pictures(tmp_path / "set", files)
    facts = ModelFacts(
        format="safetensors", architecture="ViTForImageClassification", family=Family.IMAGE_CLASSIFIER, parameters=1,
        dtype="F32", weight_bytes=1, hidden_size=1, num_blocks=1, vocab_size=0, max_positions=1, num_labels=4,
        label_names=("x", "C", "b", "A"), tensors=(),
    )  # fmt: skip
    chunks = list(fitted_images(pictures, 80, plain((4, 5))))
    assert [len(chunk) for chunk in chunks] == [64, 16]
    images, labels = np.concatenate(chunks), pictures.labels(80, facts)
    assert labels is not None
    assert images.shape == (80, 3, 4, 5)
    # The red of a picture says its folder, and a, b, c are the model's classes 3, 2, 1.
    assert (3 - images[:, 0, 0, 0]).tolist() == labels.tolist()
    assert set(labels[:12].tolist()) == {1, 2, 3}
    assert len({(image[0, 0, 0], image[1, 0, 0]) for image in images}) == 80
    assert pictures.count == 90
    assert len(set(pictures.fingerprints(90))) == 90


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    pictures = write_pictures(tmp_path / "set", {f"{n}.bmp": saved(scene(8, 8, n), "BMP") for n in range(3)})
    assert pictures.labels(3) is None
    assert next(fitted_images(pictures, 2, plain((8, 8)))).shape == (2, 3, 8, 8)


def test_what_cannot_be_decoded_is_named(tmp_path: Path) -> None:
    whole = saved(scene(64, 64), "JPEG")
    pictures = write_pictures(tmp_path / "set", {"x/good.jpg": whole, "y/cut.jpg": whole[: len(whole) // 2]})
    with pytest.raises(
        InvalidRequest, match=r"y/cut\.jpg of the dataset cannot be used: OSError: .*truncated"
    ):
        list(fitted_images(pictures, 2, plain((8, 8))))


def test_a_picture_larger_than_its_header_said_is_not_decoded() -> None:
    edge = int(MAX_PICTURE_PIXELS**0.5) + 8
    with pytest.raises(InvalidRequest, match="DecompressionBomb"):
        fitted_picture(saved(Image.new("1", (edge, edge))), plain((8, 8)), "a.png")


def test_formats_that_intake_refuses_are_not_decoded_either() -> None:
    with pytest.raises(InvalidRequest, match="UnidentifiedImageError"):
        fitted_picture(saved(scene(8, 8), "GIF"), plain((8, 8)), "a.gif")


def test_a_picture_too_small_to_be_cut_from_is_refused() -> None:
    preprocessing = plain((8, 8)).model_copy(update={"resize": None, "crop": (9, 8)})
    with pytest.raises(InvalidRequest, match="smaller than what the model takes"):
        fitted_picture(saved(scene(8, 8)), preprocessing, "a.png")


def test_measuring_calibrating_and_training_see_the_pictures_as_they_would_see_arrays(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    model = tiny("ResNetForImageClassification")
    facts = facts_of(model)
    assert facts.preprocessing is not None
    arrays = load_file(write_images(tmp_path / "arrays", images=12))
    images, labels = arrays["images"].numpy(), arrays["labels"].tolist()
    files = {f"{label}/{n}.png": saved(Image.fromarray(images[n])) for n, label in enumerate(labels)}
    pictures = write_pictures(tmp_path / "pictures", files)
    numbers = [int(Path(name).stem) for name, _ in pictures.files(12)]
    wanted, classes = images[numbers].transpose(0, 3, 1, 2), [labels[n] for n in numbers]

    prepared = prepare_images(
        facts,
        Evaluation(images=8),
        dataset=pictures.path,
        seen=[pictures.path],
        images_file=tmp_path / "evaluation.npy",
    )
    assert np.array_equal(np.load(tmp_path / "evaluation.npy"), wanted[:8])
    assert prepared.labels == tuple(classes[:8])
    assert prepared.images is not None
    assert prepared.images.overlap_share == 1.0

    context = StepContext(
        source=model, target=tmp_path, original=model, facts=facts, calibration_images=pictures.path
    )
    assert np.array_equal(calibration_pixels(context, 5), pixel_values(wanted[:5], facts.preprocessing))

    step = PruneChannels(batch_size=4)
    training = TrainingImages(pictures.path, tmp_path / "training.npy", facts.preprocessing, step, facts)
    batch = training.first(4)
    assert batch.labels is not None
    assert batch.labels.tolist() == classes[:4]
    assert np.array_equal(batch.images.numpy(), pixel_values(wanted[:4], facts.preprocessing))
