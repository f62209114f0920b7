"""The dense head."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cifar_tl.errors import check_int, check_number


def dense_head(in_features: int, widths: Sequence[int], num_classes: int, dropout: float) -> nn.Sequential:
    """Build Linear-ReLU layers and a last Linear, which gives logits.

    Args:
        in_features: Length of a backbone feature, 2,048 for ResNet-50.
        widths: Units of each hidden layer; may be empty for a linear head.
        num_classes: Classes.
        dropout: Probability of dropping a hidden unit while training, in [0, 1).

    Raises:
        UserError: A width below 1 or a dropout outside [0, 1).
    """
    check_number("model.dropout", dropout, 0, below=1)
    layers: list[nn.Module] = []
    for index, width in enumerate(widths):
        layers += [nn.Linear(in_features, check_int(f"model.head[{index}]", width, 1)), nn.ReLU()]
        if dropout > 0:
            layers.append(nn.Dropout(dropout))
        in_features = width
    return nn.Sequential(*layers, nn.Linear(in_features, num_classes))


def logits_of(head: nn.Module, features: Tensor) -> Tensor:
    """Apply a head, in float32 under mixed precision, too.

    Logits of bfloat16 have eight bits: among 10,000 images a few have two best ones, and the order of classes decides.

    Args:
        head: From features to logits.
        features: (batch, length).

    Returns:
        (batch, classes).
    """
    device = features.device.type
    if not torch.is_autocast_enabled(device):
        return head(features)  # type: ignore[no-any-return]
    with torch.autocast(device, enabled=False):
        return head(features.float())  # type: ignore[no-any-return]
