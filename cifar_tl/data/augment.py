"""Augmentation of whole batches with draws per image, on whatever device the images are on."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from cifar_tl.errors import check_int


@dataclass(frozen=True)
class Augment:
    """Mirror half of the images and cut each out of its reflected surroundings.

    Attributes:
        flip: Mirror each image left to right with probability 1/2.
        crop_padding: Shift each image by up to so many pixels in each direction; what comes in is its reflection.
    """

    flip: bool
    crop_padding: int

    def __post_init__(self) -> None:
        check_int("augment.crop_padding", self.crop_padding, 0)

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Augment a batch.

        Args:
            images: (batch, channels, height, width), any type.
            generator: On the CPU: the same generator gives the same draws on every device.

        Returns:
            Images of the same shape and type.
        """
        if not self.flip and self.crop_padding == 0:
            return images
        batch, _, height, width = images.shape
        shifts = torch.randint(0, 2 * self.crop_padding + 1, (2, batch, 1), generator=generator).to(images.device)
        rows = torch.arange(height, device=images.device) + shifts[0]
        columns = torch.arange(width, device=images.device).expand(batch, width)
        if self.flip:
            mirrored = (torch.rand(batch, 1, generator=generator) < 0.5).to(images.device)
            columns = torch.where(mirrored, width - 1 - columns, columns)
        columns = columns + shifts[1]
        # reflect needs a floating type on the CPU; 0..255 is exact in float32
        padded = pad(images.float(), (self.crop_padding,) * 4, mode="reflect").to(images.dtype)
        which = torch.arange(batch, device=images.device)[:, None, None]
        # indexing around the channel axis puts it last
        return padded[which, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
