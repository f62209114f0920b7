"""Transforms of a batch of images with parameters per image, as pure functions that run on any device."""

import math

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample, pad


def mirror_and_shift(images: Tensor, mirrored: Tensor | None, shift: Tensor | None, reach: int) -> Tensor:
    """Mirror and shift images by whole pixels: exact, nothing is interpolated.

    Args:
        images: (batch, channels, height, width), any type.
        mirrored: (batch,), bool: which to mirror left to right; None for none.
        shift: (batch, 2), int: pixels by which the content moves up and left, or right where it is mirrored, within
            +-reach; None for none.
        reach: The largest shift; less than height and width, since what comes in is a reflection.

    Returns:
        Images of the same shape and type.
    """
    batch, _, height, width = images.shape
    device = images.device
    rows = torch.arange(height, device=device).expand(batch, height)
    columns = torch.arange(width, device=device).expand(batch, width)
    if mirrored is not None:
        columns = torch.where(mirrored[:, None], width - 1 - columns, columns)
    if shift is not None:
        rows = rows + shift[:, :1] + reach
        columns = columns + shift[:, 1:] + reach
        # reflect needs a floating type on the CPU; 0..255 is exact in float32
        images = pad(images.float(), (reach,) * 4, mode="reflect").to(images.dtype)
    channels, tall, wide = images.shape[1:]
    # one flat gather per channel: several times as fast as indexing with three index tensors
    where = (rows[:, :, None] * wide + columns[:, None, :]).view(batch, 1, -1).expand(-1, channels, -1)
    return images.view(batch, channels, tall * wide).gather(2, where).view(batch, channels, height, width)


def warp(images: Tensor, angle: Tensor, zoom: Tensor, mirrored: Tensor | None, shift: Tensor | None) -> Tensor:
    """Mirror, rotate, scale and shift images in one bilinear interpolation; what comes in is a reflection.

    Args:
        images: (batch, channels, height, width), float; square, or angles would be distorted.
        angle: (batch,), degrees, counter-clockwise.
        zoom: (batch,), above 0; 2 shows the middle half, twice as large.
        mirrored: (batch,), bool, or None.
        shift: (batch, 2), pixels by which the content moves up and left, or right where it is mirrored; or None.

    Returns:
        Images of the same shape.
    """
    radians = angle * (math.pi / 180)
    cos, sin = radians.cos() / zoom, radians.sin() / zoom
    sign = torch.ones_like(cos) if mirrored is None else torch.where(mirrored, -1.0, 1.0)
    moved = torch.zeros(len(images), 2, device=images.device) if shift is None else shift.float()
    height, width = images.shape[2:]
    # from a pixel of the result to where it comes from, in units in which the image reaches from -1 to 1
    theta = torch.stack(
        [
            torch.stack([sign * cos, -sign * sin, 2 * moved[:, 1] / width], dim=1),
            torch.stack([sin, cos, 2 * moved[:, 0] / height], dim=1),
        ],
        dim=1,
    )
    grid = affine_grid(theta, list(images.shape), align_corners=False)
    return grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def jitter_color(images: Tensor, factors: Tensor) -> Tensor:
    """Change brightness, contrast and saturation, in this order, as torchvision's ColorJitter does one by one.

    Args:
        images: (batch, 3, height, width), float, 0..255.
        factors: (batch, 3): of brightness, contrast and saturation; 1 changes nothing.

    Returns:
        Images of the same shape, clamped to 0..255.
    """
    brightness, contrast, saturation = factors[:, :, None, None, None].unbind(1)
    images = (images * brightness).clamp(0, 255)
    images = torch.lerp(_grey(images).mean(dim=(2, 3), keepdim=True), images, contrast).clamp(0, 255)
    return torch.lerp(_grey(images), images, saturation).clamp(0, 255)


def _grey(images: Tensor) -> Tensor:
    red, green, blue = images.unbind(1)
    return (0.2989 * red + 0.587 * green + 0.114 * blue).unsqueeze(1)  # ITU-R 601, as in torchvision


def cut_out(images: Tensor, hole: Tensor, size: int, blank: Tensor) -> Tensor:
    """Blank one square per image, whose centre is anywhere in it, so that a part may lie outside.

    Args:
        images: (batch, channels, height, width).
        hole: (batch, 2), in [0, 1): the centre's row and column as a share of height and width.
        size: Pixels a side.
        blank: (channels, 1, 1), what the square is filled with.

    Returns:
        Images of the same shape.
    """
    height, width = images.shape[2:]

    def covered(share: Tensor, length: int) -> Tensor:
        start = (share * length).long() - size // 2
        pixels = torch.arange(length, device=images.device)
        return (pixels >= start[:, None]) & (pixels < start[:, None] + size)

    square = covered(hole[:, 0], height)[:, None, :, None] & covered(hole[:, 1], width)[:, None, None, :]
    return torch.where(square, blank, images)
