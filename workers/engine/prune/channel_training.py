"""Fine-tuning of a network on images: by the outputs of the original, and by labels where there are some."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from app.errors import InvalidRequest
from app.spec.facts import ModelFacts
from app.spec.preprocessing import Preprocessing
from app.spec.prune_channels import PruneChannels
from workers.engine.distill.losses import soft_loss
from workers.engine.images.batches import save_images
from workers.engine.images.fitting import fitted_images
from workers.engine.images.image_set import ImageSet
from workers.engine.images.pixels import pixel_values
from workers.engine.onnx_network import Network

_HELD_OUT_IMAGES = 1024
"""More would cost time at every look without changing when to stop."""
_HELD_OUT_BATCH = 128


@dataclass(frozen=True)
class ImageBatch:
    """Images as the network takes them, (images, channels, height, width), float32, and their labels, (images,), int64."""

    images: Tensor
    labels: Tensor | None

    @property
    def amount(self) -> int:
        """Images."""
        return len(self.images)


class TrainingImages:
    """A dataset resized for a network once, in a file; the last images are held out."""

    def __init__(
        self,
        dataset: Path,
        file: Path,
        preprocessing: Preprocessing,
        step: PruneChannels,
        facts: ModelFacts | None = None,
    ) -> None:
        """Write `file` (.npy); `facts` say which class a label's name is.

        Raises InvalidRequest (`too_few_images`) where not one batch is left to train on.
        """
        images = ImageSet(dataset)
        height, width = preprocessing.size
        shape = (images.count, len(preprocessing.mean), height, width)
        save_images(file, fitted_images(images, images.count, preprocessing), shape)
        self._images: NDArray[np.uint8] = np.load(file, mmap_mode="r", allow_pickle=False)
        self.labels = images.labels(images.count, facts)
        self._preprocessing = preprocessing
        self._batch_size = step.batch_size
        self._trained = images.count - min(
            _HELD_OUT_IMAGES, max(1, round(step.held_out_fraction * images.count))
        )
        if self._trained < step.batch_size:
            raise InvalidRequest(
                f"{self._trained} images are left to train on, fewer than one batch of {step.batch_size}.",
                code="too_few_images",
                hint="Give a larger dataset, or a smaller batch_size.",
            )

    def first(self, count: int) -> ImageBatch:
        """The first images of those that are trained on."""
        return self._batch(np.arange(min(count, self._trained)))

    def held_out(self) -> Iterator[ImageBatch]:
        """Those that are never trained on."""
        for start in range(self._trained, len(self._images), _HELD_OUT_BATCH):
            yield self._batch(np.arange(start, min(start + _HELD_OUT_BATCH, len(self._images))))

    def batches(self, seed: int) -> Iterator[ImageBatch]:
        """Batches without end: every image once an epoch, in an order drawn from the seed; the rest of an epoch is left out."""
        draw = np.random.default_rng(seed)
        while True:
            order = draw.permutation(self._trained)
            for start in range(0, self._trained - self._batch_size + 1, self._batch_size):
                yield self._batch(np.sort(order[start : start + self._batch_size]))

    def _batch(self, indices: NDArray[np.int64]) -> ImageBatch:
        labels = None if self.labels is None else torch.from_numpy(self.labels[indices])
        return ImageBatch(torch.from_numpy(pixel_values(self._images[indices], self._preprocessing)), labels)


class ImageLessons:
    """(1 − w) · T² · KL(teacher ‖ student) + w · cross-entropy, w = 0 without labels (Hinton et al. 2015)."""

    unit = "images"

    def __init__(
        self, student: Network, teacher: Network, held_out: Iterator[ImageBatch], step: PruneChannels
    ) -> None:
        """The teacher is asked about the held-out images here, once."""
        self.student = student
        self._teacher = teacher.eval()
        self._step = step
        self._held_out = [(batch, self._taught(batch)) for batch in held_out]

    def parameters(self) -> dict[str, nn.Parameter]:
        """All of the student's."""
        return dict(self.student.named_parameters())

    def statistics(self) -> dict[str, Tensor]:
        """Of its batch norms."""
        return dict(self.student.named_buffers())

    def loss(self, batch: ImageBatch) -> Tensor:
        """Mean loss of one batch, batch norms in training."""
        self.student.train()
        return self._loss(batch, self._taught(batch))

    @torch.no_grad()
    def held_out_loss(self, tick: Callable[[], None]) -> float:
        """Mean over the held-out images, batch norms as they will be used."""
        self.student.eval()
        total = 0.0
        for batch, taught in self._held_out:
            total += batch.amount * float(self._loss(batch, taught))
            tick()
        return total / sum(batch.amount for batch, _ in self._held_out)

    @torch.no_grad()
    def _taught(self, batch: ImageBatch) -> Tensor:
        return self._teacher(batch.images)  # type: ignore[no-any-return]

    def _loss(self, batch: ImageBatch, taught: Tensor) -> Tensor:
        logits = self.student(batch.images)
        soft = soft_loss(logits, taught, temperature=self._step.temperature)
        if batch.labels is None:
            return soft
        weight = self._step.hard_label_weight
        return (1 - weight) * soft + weight * functional.cross_entropy(logits, batch.labels)
