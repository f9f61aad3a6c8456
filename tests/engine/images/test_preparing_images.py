"""Images on their way from a dataset to a model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_vision import SIDE, write_images

from app.spec.preprocessing import Preprocessing
from workers.engine.images.batches import ImageBatches, save_images
from workers.engine.images.geometry import fitted
from workers.engine.images.image_set import ImageSet
from workers.engine.images.pixels import pixel_values


def preprocessing(**changes: object) -> Preprocessing:
    known = {
        "resize": None, "resample": "bilinear", "crop": None, "scale": 1 / 255, "mean": (0.5, 0.4, 0.3), "std": (1.0, 0.5, 0.25),
    }  # fmt: skip
    return Preprocessing.model_validate(known | changes)


def test_pixels_are_scaled_channel_by_channel() -> None:
    images = np.zeros((1, 3, 1, 2), np.uint8)
    images[0, :, 0, 1] = 255
    values = pixel_values(images, preprocessing())
    assert values.dtype == np.float32
    assert np.allclose(values[0, :, 0, 0], [-0.5, -0.8, -1.2])
    assert np.allclose(values[0, :, 0, 1], [0.5, 1.2, 2.8])


def test_images_of_the_right_size_stay_as_they_are() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 8, 6), dtype=np.uint8)
    assert np.array_equal(fitted(images, preprocessing(resize=(8, 6))), images)
    assert np.array_equal(fitted(images, preprocessing()), images)
    assert np.array_equal(fitted(images, preprocessing(resize=6, crop=(6, 6))), images[:, :, 1:7])


@pytest.mark.parametrize("resample", ["bilinear", "bicubic"])
def test_the_shorter_edge_is_resized_and_the_centre_is_cut(resample: str) -> None:
    # A ramp from left to right keeps its middle where the middle is.
    ramp = np.broadcast_to(np.arange(0, 120, 2, dtype=np.uint8), (1, 3, 40, 60)).copy()
    found = fitted(ramp, preprocessing(resize=20, resample=resample, crop=(20, 20)))
    assert found.shape == (1, 3, 20, 20)
    assert np.abs(found[0, 0, 10].astype(float) - np.linspace(21, 97, 20)).max() <= 1


def test_downsampling_looks_at_every_pixel() -> None:
    checks = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    found = fitted(np.broadcast_to(checks, (1, 3, 64, 64)).copy(), preprocessing(resize=(8, 8)))
    assert np.abs(found.astype(int) - 128).max() <= 2


def test_both_layouts_give_the_same_images(tmp_path: Path) -> None:
    first = write_images(tmp_path / "nhwc", images=70)
    images = load_file(first)["images"].permute(0, 3, 1, 2).contiguous()
    save_file({"images": images}, tmp_path / "nchw", metadata={"layout": "NCHW"})
    both = [np.concatenate(list(ImageSet(path).chunks(66))) for path in (first, tmp_path / "nchw")]
    assert np.array_equal(both[0], images[ImageSet(first).order[:66]].numpy())
    assert np.array_equal(*both)
    assert sum(len(chunk) for chunk in ImageSet(first).chunks(1000)) == 70
    assert ImageSet(tmp_path / "nchw").labels(3) is None
    assert len(ImageSet(first).labels(3)) == 3


def test_of_a_set_sorted_by_class_the_first_few_are_of_all_classes(tmp_path: Path) -> None:
    classes = torch.arange(10).repeat_interleave(20)
    images = classes.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 2, 2, 3).contiguous()
    save_file({"images": images, "labels": classes}, tmp_path / "sorted", metadata={"layout": "NHWC"})
    found = ImageSet(tmp_path / "sorted")
    labels = found.labels(50)
    assert labels is not None
    assert set(labels) == set(range(10))
    assert np.array_equal(np.concatenate(list(found.chunks(50)))[:, 0, 0, 0], labels)
    assert sorted(found.order) == list(range(200))


def test_batches_are_read_as_they_were_written(tmp_path: Path) -> None:
    images = torch.randint(0, 256, (19, 3, SIDE, SIDE), dtype=torch.uint8).numpy()
    save_images(tmp_path / "a.npy", [images[:7], images[7:]], images.shape)
    batches = ImageBatches(tmp_path / "a.npy")
    assert [len(batch) for batch in batches] == [8, 8, 3]
    assert np.array_equal(np.concatenate(list(batches)), images)
    assert np.array_equal(batches[2], images[16:])
