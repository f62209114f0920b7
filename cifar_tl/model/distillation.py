"""How alike two networks see the same images."""

import torch
from torch import Tensor

EPS = 1e-12


def cka(features: Tensor, others: Tensor) -> Tensor:
    """Return the linear centered kernel alignment of two networks' features of the same images.

    Kornblith et al. 2019, arXiv:1905.00414, section 3: 1 where one's features are the other's, turned, shifted or
    scaled as a whole; 0 where images that are alike to one network are so to the other by no more than chance. Computed
    in float32, under mixed precision, too.

    Args:
        features: (images, length).
        others: (images, another length).

    Returns:
        A scalar in 0..1; 0 of a single image, which is like nothing.
    """
    with torch.autocast(features.device.type, enabled=False):
        kernels = []
        for values in (features.float(), others.float()):
            centered = values - values.mean(dim=0)
            kernels.append(centered @ centered.T)
        first, second = kernels
        norms = (first.square().sum() * second.square().sum()).clamp(min=EPS).sqrt()
        return (first * second).sum() / norms
