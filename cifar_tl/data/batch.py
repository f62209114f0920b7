"""What a batch is, for the data, the model and the callbacks alike."""

import torch
from torch import Tensor
from torchvision.models import ResNet50_Weights

Batch = tuple[Tensor, ...]
"""Images (batch, 3, height, width), float, normalized, or their features (batch, 2048); targets (batch,) class indices,
or (batch, classes) with rows that sum to 1; while training with distillation, the teacher's features of the images,
(batch, 2048)."""

IMAGENET_MEAN: tuple[float, ...] = tuple(ResNet50_Weights.IMAGENET1K_V1.transforms().mean)
IMAGENET_STD: tuple[float, ...] = tuple(ResNet50_Weights.IMAGENET1K_V1.transforms().std)
"""Per channel, of images in [0, 1]: what every ImageNet ResNet-50 of torchvision was trained with."""


def class_indices(targets: Tensor) -> Tensor:
    """Return class indices, (batch,), of targets given as indices or one-hot."""
    return targets.argmax(dim=1) if targets.ndim == 2 else targets


def one_hot(targets: Tensor, num_classes: int) -> Tensor:
    """Return class indices (batch,) as float one-hot rows, (batch, num_classes)."""
    return torch.nn.functional.one_hot(targets, num_classes).float()
