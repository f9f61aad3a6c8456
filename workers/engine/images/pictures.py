"""Decode picture files of strangers, and bring each to the size a model takes, as transformers' image processors do.

Decoded are the formats that intake lets in and no others, of the size that intake looked at and no larger; a file cut short
is an error. The rest of the way is the usual one: turned as EXIF says, made RGB, resized by Pillow, cut from the centre.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageFile, ImageOps

from app.errors import InvalidRequest
from app.spec.image_set import MAX_PICTURE_PIXELS
from app.spec.preprocessing import Preprocessing
from workers.engine.images.geometry import cut, resized_size
from workers.engine.images.image_set import Images, ImageSet

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_MODES = {1: "L", 3: "RGB"}
_AT_ONCE = 64


def fitted_pictures(pictures: ImageSet, count: int, preprocessing: Preprocessing) -> Iterator[Images]:
    """The first `count` picture files as images of the size the model takes, some at a time.

    Raises InvalidRequest (`picture_broken`) that names the file which cannot be decoded, or is too small.
    """
    waiting: list[Images] = []
    for name, content in pictures.files(count):
        waiting.append(fitted_picture(content, preprocessing, name))
        if len(waiting) == _AT_ONCE:
            yield np.stack(waiting)
            waiting = []
    if waiting:
        yield np.stack(waiting)


def fitted_picture(content: bytes, preprocessing: Preprocessing, name: str) -> Images:
    """One picture file: (channels, height, width), uint8. Raises InvalidRequest (`picture_broken`)."""
    picture = _decoded(content, _MODES[len(preprocessing.mean)], name)
    wanted = resized_size((picture.height, picture.width), preprocessing.resize)
    if wanted != (picture.height, picture.width):
        picture = picture.resize(wanted[::-1], _RESAMPLING[preprocessing.resample])
    pixels = np.asarray(picture, dtype=np.uint8)
    image = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    if preprocessing.crop is None:
        return image
    if picture.height < preprocessing.crop[0] or picture.width < preprocessing.crop[1]:
        raise _broken(name, "it is smaller than what the model takes")
    return cut(image, preprocessing.crop)


def _decoded(content: bytes, mode: str, name: str) -> Image.Image:
    Image.MAX_IMAGE_PIXELS = MAX_PICTURE_PIXELS
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content), formats=_FORMATS) as picture:
                return ImageOps.exif_transpose(picture).convert(mode)
    except MemoryError:
        raise
    except Exception as error:
        # Decoders raise whatever a broken file makes them stumble over.
        raise _broken(name, f"{type(error).__name__}: {error}") from error


def _broken(name: str, why: str) -> InvalidRequest:
    return InvalidRequest(
        f"{name[:200]} of the dataset cannot be used: {why[:300]}.",
        code="picture_broken",
        hint="Save that picture again, or leave it out, and upload the archive anew.",
    )
