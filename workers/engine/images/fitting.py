"""The images of a dataset, of whatever kind, as a model takes them."""

from __future__ import annotations

from collections.abc import Iterator

from app.spec.preprocessing import Preprocessing
from workers.engine.images.geometry import fitted
from workers.engine.images.image_set import Images, ImageSet


def fitted_images(images: ImageSet, count: int, preprocessing: Preprocessing) -> Iterator[Images]:
    """The first `count` images of the size the model takes, some at a time: (images, channels, height, width), uint8.

    Raises InvalidRequest (`picture_broken`) for a picture file that cannot be decoded.
    """
    if images.are_files:
        # Pillow is loaded for those who have pictures.
        from workers.engine.images.pictures import fitted_pictures

        return fitted_pictures(images, count, preprocessing)
    return (fitted(chunk, preprocessing) for chunk in images.chunks(count))
