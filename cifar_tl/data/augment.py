"""Augmentation of whole batches with draws per image, on whatever device the images are on."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from cifar_tl.data import transforms
from cifar_tl.data.decode import SIZE
from cifar_tl.data.splits import make_generator
from cifar_tl.errors import check_choice, check_int, check_number

FLIPS = ("none", "random", "alternating")

FLIP, SHIFT, WARP, CUTOUT, COLOR, MIX = 10, 11, 12, 13, 14, 15
"""Purposes of the random generators: one kind of draw does not change when another is turned on."""

Draws = dict[str, Tensor]
"""Random draws, one row per image."""


@dataclass(frozen=True)
class Augment:
    """What happens to training images, each with its own draws, mixup and CutMix with a batch's.

    Draws are made on the CPU, for a whole epoch at once: the same on every device, and no step waits for them.

    Attributes:
        flip: `random` mirrors each image left to right with probability 1/2 in each epoch; `alternating` mirrors a
            random half in even epochs and the other half in odd ones (Jordan 2024, arXiv:2404.00498); or `none`.
        crop_padding: Shift each image by up to so many pixels in each direction; what comes in is its reflection.
        rotation: Rotate each by up to so many degrees.
        scale: Enlarge or shrink each by a factor within 1 - scale and 1 + scale.
        cutout: Blank a square of so many pixels a side in each (DeVries & Taylor 2017, arXiv:1708.04552).
        color_jitter: Multiply brightness, contrast and saturation of each by factors within 1 - x and 1 + x.
        mixup: Alpha of mixup (Zhang et al. 2017, arXiv:1710.09412); 0 is off.
        cutmix: Alpha of CutMix (Yun et al. 2019, arXiv:1905.04899); 0 is off. With both on, each batch gets either.
    """

    flip: str = "none"
    crop_padding: int = 0
    rotation: float = 0
    scale: float = 0
    cutout: int = 0
    color_jitter: float = 0
    mixup: float = 0
    cutmix: float = 0

    def __post_init__(self) -> None:
        check_choice("augment.flip", self.flip, FLIPS)
        check_int("augment.crop_padding", self.crop_padding, 0, SIZE - 1)  # reflected, which a whole image cannot be
        check_number("augment.rotation", self.rotation, 0)
        check_number("augment.scale", self.scale, 0, below=1)
        check_int("augment.cutout", self.cutout, 0, SIZE - 1)  # a larger one leaves nothing of some images
        check_number("augment.color_jitter", self.color_jitter, 0)
        check_number("augment.mixup", self.mixup, 0)
        check_number("augment.cutmix", self.cutmix, 0)

    @property
    def only_flips(self) -> "Augment":
        """The same flips, and nothing else."""
        return Augment(self.flip)

    @property
    def views(self) -> int:
        """How many different images can come of one: 1 (itself), 2 (and its mirror image), or 0 for without number."""
        if self != self.only_flips:
            return 0
        return 1 if self.flip == "none" else 2

    def draw(self, indices: Tensor, examples: int, seed: int, epoch: int) -> Draws:
        """Make an epoch's draws.

        Args:
            indices: (n,), which of the examples, in the order in which they will be met.
            examples: Examples of the training set. An image's draws do not depend on when it is met.
            seed: Of the run.
            epoch: From 0.

        Returns:
            Tensors with n rows, on the CPU.
        """
        draws: Draws = {}
        if self.flip == "random":
            draws["mirrored"] = torch.rand(examples, generator=make_generator(seed, epoch, FLIP)) < 0.5
        elif self.flip == "alternating":
            draws["mirrored"] = (torch.rand(examples, generator=make_generator(seed, 0, FLIP)) < 0.5) ^ bool(epoch % 2)
        if self.crop_padding:
            generator = make_generator(seed, epoch, SHIFT)
            span = 2 * self.crop_padding + 1
            draws["shift"] = torch.randint(0, span, (examples, 2), generator=generator) - self.crop_padding
        if self.rotation or self.scale:
            uniform = torch.rand(examples, 2, generator=make_generator(seed, epoch, WARP)) * 2 - 1
            draws["angle"], draws["zoom"] = uniform[:, 0] * self.rotation, 1 + uniform[:, 1] * self.scale
        if self.cutout:
            draws["hole"] = torch.rand(examples, 2, generator=make_generator(seed, epoch, CUTOUT))
        if self.color_jitter:
            uniform = torch.rand(examples, 3, generator=make_generator(seed, epoch, COLOR)) * 2 - 1
            draws["color"] = (1 + uniform * self.color_jitter).clamp(min=0)
        return {name: values[indices] for name, values in draws.items()}

    def apply(self, images: Tensor, draws: Mapping[str, Tensor], blank: Tensor) -> Tensor:
        """Augment a batch.

        Args:
            images: (batch, channels, height, width), uint8.
            draws: From `draw`, the rows of this batch, on the device of the images.
            blank: (channels, 1, 1), what a cutout leaves, in 0..255.

        Returns:
            Images of the same shape, float, in 0..255.
        """
        if "angle" in draws:
            images = transforms.warp(
                images.float(), draws["angle"], draws["zoom"], draws.get("mirrored"), draws.get("shift")
            )
        elif "mirrored" in draws or "shift" in draws:
            images = transforms.mirror_and_shift(images, draws.get("mirrored"), draws.get("shift"), self.crop_padding)
        images = images.float()
        if "color" in draws:
            images = transforms.jitter_color(images, draws["color"])
        if "hole" in draws:
            images = transforms.cut_out(images, draws["hole"], self.cutout, blank)
        return images
