"""Optimizers over named parameter groups."""

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from cifar_tl.errors import check_choice, check_number

OPTIMIZERS = ("adam", "adamw", "sgd")


def parameter_groups(head: nn.Module, backbone: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return the groups `head`, `head_no_decay`, `backbone` and `backbone_no_decay`, frozen parameters included.

    Weight decay is for weight matrices and kernels; biases and normalisation have one dimension and none of it. `part`
    in a group says whose learning rate it follows.
    """
    groups = []
    for part, module in (("head", head), ("backbone", backbone)):
        matrices = [p for p in module.parameters() if p.ndim > 1]
        vectors = [p for p in module.parameters() if p.ndim <= 1]
        groups += [
            {"name": part, "part": part, "params": matrices, "weight_decay": weight_decay},
            {"name": f"{part}_no_decay", "part": part, "params": vectors, "weight_decay": 0.0},
        ]
    return groups


def build_optimizer(name: str, groups: list[dict[str, Any]], momentum: float) -> Optimizer:
    """Build an optimizer whose learning rates are 0 until their owner, BackboneUnfreeze, sets them.

    Args:
        name: One of OPTIMIZERS; `sgd` uses Nesterov momentum.
        groups: From `parameter_groups`.
        momentum: For `sgd`.

    Raises:
        UserError: An unknown name.
    """
    match check_choice("finetune.optimizer", name, OPTIMIZERS):
        case "adam":
            return torch.optim.Adam(groups, lr=0.0, fused=True)
        case "adamw":
            return torch.optim.AdamW(groups, lr=0.0, fused=True)
        case _:
            momentum = check_number("finetune.momentum", momentum, 0, below=1)
            return torch.optim.SGD(groups, lr=0.0, momentum=momentum, nesterov=momentum > 0, fused=True)
