"""Batches straight from arrays on the device, without worker processes; LazyImages are decoded by workers."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torchvision.transforms import v2

from cifar_tl.data.augment import MIX, Augment, Draws
from cifar_tl.data.batch import Batch, one_hot
from cifar_tl.data.lazy import LazyImages
from cifar_tl.data.splits import make_generator

SHUFFLE = 0
"""Purpose of the random generator."""


class ArrayLoader:
    """An iterable over batches: normalized images, or features of the images where those are cached.

    Shuffling, augmentation and mixing are functions of (seed, epoch): an epoch can be made again exactly, in a resumed
    run, too.

    Args:
        images: (examples, 3, height, width), uint8, on `device` from the first use on; or read anew in every epoch.
        targets: (examples,), int64.
        batch_size: Examples per batch; the last batch has what is left. While training in one process, a single one
            that is left joins the batch before: BatchNorm cannot train on the one pixel that layer4 has of it.
        mean: Per channel, of images in [0, 1].
        std: Per channel, of images in [0, 1].
        classes: How many there are.
        one_hot_targets: Give targets as rows of floats instead of class indices.
        augment: For training: the augmentation of an epoch. None leaves order and images as they are.
        features: Says, when an epoch starts, what to give instead of images: (views, examples, length), view 1 being
            that of the mirror image; or None to give images.
        teacher: For training: says, when an epoch starts, what to give as a third part of batches, the row of each
            image or its mirror image, mixed as images are: (views, examples, length); or None to give two parts.
        seed: Of the run.
        epoch: Says which epoch it is when an iteration starts.
        device: Where batches are made.
        rank: This process, of `world_size` that share the examples; while training, fewer examples than processes that
            are left over at the end of an epoch are left out, where one process would have a batch of them.
        world_size: Processes.
    """

    def __init__(
        self,
        images: Tensor | LazyImages,
        targets: Tensor,
        batch_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        classes: int = 10,
        one_hot_targets: bool = False,
        augment: Callable[[int], Augment] | None = None,
        features: Callable[[], Tensor | None] = lambda: None,
        teacher: Callable[[], Tensor | None] = lambda: None,
        seed: int = 0,
        epoch: Callable[[], int] = lambda: 0,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.images = images.to(device) if isinstance(images, Tensor) else images
        self.targets = targets.to(device)
        self.batch_size = batch_size
        # (x - 255 mean) / (255 std) as one multiplication and one addition
        std_tensor = torch.tensor(std, device=device).view(3, 1, 1)
        mean_tensor = torch.tensor(mean, device=device).view(3, 1, 1)
        self.scale = 1 / (255 * std_tensor)
        self.offset = -mean_tensor / std_tensor
        self.blank = 255 * mean_tensor  # 0 after normalization
        self.classes = classes
        self.one_hot_targets = one_hot_targets
        self.augment = augment
        self.features = features
        self.teacher = teacher
        self.seed = seed
        self.epoch = epoch
        self.device = torch.device(device)
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        return len(self._batch_sizes())

    def _batch_sizes(self) -> list[int]:
        whole, left = divmod(self._share(), self.batch_size)
        sizes = [self.batch_size] * whole
        if left == 1 and whole and self.augment is not None and self.world_size == 1:
            sizes[-1] += 1
        elif left:
            sizes.append(left)
        return sizes

    def _share(self) -> int:
        """Return the examples of this process; equal for all while training, where every step is taken together."""
        if self.augment is not None:
            return len(self.targets) // self.world_size
        return len(range(self.rank, len(self.targets), self.world_size))

    def __iter__(self) -> Iterator[Batch]:
        epoch, features = self.epoch(), self.features()
        examples = len(self.targets)
        augment, draws = None, Draws()
        order = torch.arange(examples)
        if self.augment is not None:
            order = torch.randperm(examples, generator=make_generator(self.seed, epoch, SHUFFLE))
        order = order[self.rank :: self.world_size][: self._share()]
        if self.augment is not None:
            augment = self.augment(epoch)
            draws = augment.draw(order, examples, self.seed, epoch)

        # to the device once per epoch, not once per step: a copy from the host's memory makes the host wait
        sizes = self._batch_sizes()
        there = {name: torch.split(values.to(self.device), sizes) for name, values in draws.items()}
        batches = torch.split(order.to(self.device), sizes)
        mix = _mix(augment, self.classes) if augment is not None and features is None else None
        teacher = self.teacher() if augment is not None and features is None else None
        rows_of_teacher = teacher.flatten(0, 1) if teacher is not None else None
        pixels = self._pixels(torch.split(order, sizes), batches) if features is None else None
        rows_of_views = features.flatten(0, 1) if features is not None else None
        for step, indices in enumerate(batches):
            rows = {name: values[step] for name, values in there.items()}
            targets = self.targets[indices]
            in_views = indices + rows["mirrored"].long() * examples if "mirrored" in rows else indices
            if rows_of_views is not None:
                inputs = rows_of_views.index_select(0, in_views)
            else:
                assert pixels is not None
                inputs = next(pixels)
                inputs = augment.apply(inputs, rows, self.blank) if augment is not None else inputs.float()
                inputs = inputs.mul_(self.scale).add_(self.offset)
            taught = [] if rows_of_teacher is None else [rows_of_teacher.index_select(0, in_views)]
            if mix is not None:
                assert augment is not None
                seed = make_generator(self.seed, epoch, MIX, step).initial_seed()
                if taught:
                    # which image has which share in which: what labels become if each image is a class of its own
                    images = torch.arange(len(inputs), device=self.device)
                    _, shares = _apply(_mix(augment, len(images)), seed, inputs[:, :1], images)
                    taught = [shares @ taught[0].float()]
                inputs, targets = _apply(mix, seed, inputs, targets)
            elif self.one_hot_targets:
                targets = one_hot(targets, self.classes)
            yield inputs, targets, *taught

    def _pixels(self, on_host: Sequence[Tensor], batches: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield the images of each batch of indices: files are read by those on the host, tensors indexed by others."""
        images = self.images
        if isinstance(images, LazyImages):
            read = images.read(on_host, pin=torch.device(self.device).type == "cuda")
            return (batch.to(self.device, non_blocking=True) for batch in read)
        return (images[indices] for indices in batches)


def _mix(augment: Augment, classes: int) -> v2.Transform | None:
    """Return what mixes images and targets of a batch; its draws come from torch's generator."""
    choices: list[v2.Transform] = []
    if augment.mixup:
        choices.append(v2.MixUp(alpha=float(augment.mixup), num_classes=classes))
    if augment.cutmix:
        choices.append(v2.CutMix(alpha=float(augment.cutmix), num_classes=classes))
    return v2.RandomChoice(choices) if choices else None


def _apply(mix: v2.Transform, seed: int, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return images and targets mixed as a seed has them mixed."""
    with torch.random.fork_rng([]):  # not torch.manual_seed, which would seed the GPU's, too
        torch.default_generator.manual_seed(seed)
        return mix(images, targets)  # type: ignore[no-any-return]
