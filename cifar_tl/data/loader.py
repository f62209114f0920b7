"""Batches straight from arrays in memory: no worker processes, no per-image work."""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from cifar_tl.data.augment import Augment
from cifar_tl.data.splits import stream
from cifar_tl.model.module import Batch, one_hot

SHUFFLE, AUGMENT = 0, 1
"""Purposes of the random streams of an epoch."""


class ArrayLoader:
    """An iterable over normalised batches of images held as one uint8 array.

    Shuffling and augmentation are functions of (seed, epoch): an epoch can be made again exactly, in a resumed run too.

    Args:
        images: (examples, 3, height, width), uint8.
        targets: (examples,), int64.
        batch_size: Examples per batch; the last batch has what is left.
        mean: Per channel, of images in [0, 1].
        std: Per channel, of images in [0, 1].
        num_classes: For one-hot targets; None gives class indices.
        augment: For training; None leaves order and images as they are.
        seed: Of the run.
        epoch: Says which epoch it is when an iteration starts.
        rank: This process, of `world_size` that share the examples.
        world_size: Processes.
    """

    def __init__(
        self,
        images: Tensor,
        targets: Tensor,
        batch_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        num_classes: int | None = None,
        augment: Augment | None = None,
        seed: int = 0,
        epoch: Callable[[], int] = lambda: 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.images = images
        self.targets = targets
        self.batch_size = batch_size
        # (x / 255 - mean) / std as one multiplication and one addition
        std_tensor = torch.tensor(std).view(1, 3, 1, 1)
        self.scale = 1 / (255 * std_tensor)
        self.offset = -torch.tensor(mean).view(1, 3, 1, 1) / std_tensor
        self.num_classes = num_classes
        self.augment = augment
        self.seed = seed
        self.epoch = epoch
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        return math.ceil(self._share() / self.batch_size)

    def _share(self) -> int:
        """Return the examples of this process; equal for all while training, where every step is taken together."""
        if self.augment is not None:
            return len(self.targets) // self.world_size
        return len(range(self.rank, len(self.targets), self.world_size))

    def __iter__(self) -> Iterator[Batch]:
        epoch = self.epoch()
        if self.augment is not None:
            order = torch.randperm(len(self.targets), generator=stream(self.seed, epoch, SHUFFLE))
        else:
            order = torch.arange(len(self.targets))
        order = order[self.rank :: self.world_size][: self._share()]
        draws = stream(self.seed, epoch, AUGMENT, self.rank)
        for indices in torch.split(order, self.batch_size):
            images = self.images[indices]
            if self.augment is not None:
                images = self.augment(images, draws)
            targets = self.targets[indices]
            yield (
                images.float().mul_(self.scale).add_(self.offset),
                one_hot(targets, self.num_classes) if self.num_classes else targets,
            )
