"""Test-time augmentation: the logits of an image as a weighted mean over views of it."""

from collections.abc import Callable, Mapping
from functools import reduce

import torch
from torch import Tensor

View = Callable[[Tensor], Tensor]
"""From images (batch, 3, height, width), of any type, to images of the same shape and type."""


def identity(images: Tensor) -> Tensor:
    """Return the images as they are."""
    return images


def mirrored(images: Tensor) -> Tensor:
    """Return the images mirrored left to right."""
    return images.flip(-1)


def shifted_in(images: Tensor) -> Tensor:
    """Shift the images by one pixel down and to the right; what comes in is a reflection."""
    index = torch.tensor([1, *range(images.shape[-1] - 1)], device=images.device)
    return images.index_select(-1, index).index_select(-2, index)


def shifted_out(images: Tensor) -> Tensor:
    """Shift the images by one pixel up and to the left; what comes in is a reflection."""
    size = images.shape[-1]
    index = torch.tensor([*range(1, size), size - 2], device=images.device)
    return images.index_select(-1, index).index_select(-2, index)


def after(second: View, first: View) -> View:
    """Return the view that applies two, one after the other."""
    return lambda images: second(first(images))


SINGLE: Mapping[View, float] = {identity: 1.0}

AUGMENTED: Mapping[str, Mapping[View, float]] = {
    "flip": {identity: 0.5, mirrored: 0.5},
    # the six views and their weights are those of KellerJordan/cifar10-airbench, infer_mirror_translate
    "flip_shift": {
        identity: 0.25,
        mirrored: 0.25,
        shifted_in: 0.125,
        shifted_out: 0.125,
        after(mirrored, shifted_in): 0.125,
        after(mirrored, shifted_out): 0.125,
    },
}
"""Views with their weights, which add up to 1."""


def mean_logits(network: Callable[[Tensor], Tensor], images: Tensor, views: Mapping[View, float]) -> Tensor:
    """Return the weighted mean of the logits of views, (batch, classes), float32.

    Args:
        network: From images to logits.
        images: (batch, 3, height, width), as the network takes them.
        views: With their weights.
    """
    return reduce(torch.add, (weight * network(view(images)).float() for view, weight in views.items()))
