"""Optimizers over named parameter groups."""

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from cifar_tl.errors import UserError, check_choice, check_number
from cifar_tl.model.muon import Muon

OPTIMIZERS = ("adam", "adamw", "sgd", "muon")
MUON_ITERATIONS = 5
"""Newton-Schulz iterations of Muon."""
MUON_BLOCK = 128
"""Rows of the blocks that Muon orthogonalizes: whole kernels cost seven times as many operations, for nothing that
the proxy shows (conf/experiment/NOTES.md, "Muon in blocks")."""
COUPLED_DECAY = 1e-3
"""Most weight decay for `adam` and `sgd`, to which torch gives it as a part of the gradient (see `check_optimizer`)."""


def parameter_groups(head: nn.Module, backbone: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return the groups `head`, `head_no_decay`, `backbone` and `backbone_no_decay`, frozen parameters included.

    Weight decay is for weight matrices and kernels; biases and normalization have one dimension and none of it. A
    group's `module` says whose learning rate it follows.
    """
    groups = []
    for name, module in (("head", head), ("backbone", backbone)):
        matrices = [p for p in module.parameters() if p.ndim > 1]
        vectors = [p for p in module.parameters() if p.ndim <= 1]
        groups += [
            {"name": name, "module": name, "params": matrices, "weight_decay": weight_decay},
            {"name": f"{name}_no_decay", "module": name, "params": vectors, "weight_decay": 0.0},
        ]
    return groups


def check_optimizer(name: str, weight_decay: float) -> None:
    """Refuse an unknown optimizer, and a weight decay that would drown its gradients.

    That of `adamw` and `muon` is decoupled: it shrinks weights beside their step. `adam` and `sgd` add `weight_decay`
    times the weight to the gradient (L2). Kernels at `model.filter_rms` are large and their gradients small, so that
    0.05 outweighs these.

    Raises:
        UserError: Either.
    """
    coupled = check_choice("finetune.optimizer", name, OPTIMIZERS) in ("adam", "sgd")
    if check_number("finetune.weight_decay", weight_decay, 0) > COUPLED_DECAY and coupled:
        raise UserError(
            f"finetune.weight_decay={weight_decay:g} is not allowed with finetune.optimizer={name}, which adds it to "
            f"the gradient, where it outweighs the rest: give at most {COUPLED_DECAY:g}, or finetune.optimizer=adamw."
        )


def build_optimizer(name: str, groups: list[dict[str, Any]], momentum: float, adam_eps: float = 1e-8) -> Optimizer:
    """Build an optimizer whose learning rates are 0 until their owner, BackboneUnfreeze, sets them.

    Args:
        name: One of OPTIMIZERS. `muon` is Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) for the
            backbone's kernels, flattened to matrices, and AdamW for all else; its steps are as long as AdamW's at the
            same rate (Liu et al. 2025, arXiv:2502.16982, section 2.2).
        groups: From `parameter_groups`.
        momentum: Nesterov's, for `sgd` and for the kernels under `muon`.
        adam_eps: Added to the denominator by `adam` and `adamw`.

    Raises:
        UserError: An unknown name, or a momentum that is not in [0, 1).
    """
    match check_choice("finetune.optimizer", name, OPTIMIZERS):
        case "adam":
            return _clippable(torch.optim.Adam(groups, lr=0.0, eps=adam_eps, fused=True))
        case "adamw":
            return _clippable(torch.optim.AdamW(groups, lr=0.0, eps=adam_eps, fused=True))
        case "muon":
            momentum = check_number("finetune.momentum", momentum, 0, below=1)
            groups = [g | {"muon": g["name"] == "backbone"} for g in groups]
            return Muon(groups, momentum, MUON_ITERATIONS, MUON_BLOCK)
        case "sgd":
            momentum = check_number("finetune.momentum", momentum, 0, below=1)
            # not fused: that fails where stages join, some parameters having momentum and others none yet
            return torch.optim.SGD(groups, lr=0.0, momentum=momentum, nesterov=momentum > 0, foreach=True)
    raise NotImplementedError(f"{name} is one of OPTIMIZERS and has no case here")


def _clippable(optimizer: Optimizer) -> Optimizer:
    """Leave unscaling to the GradScaler: Lightning refuses to clip gradients that a fused optimizer unscales."""
    optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]  # torch sets it where fused is given
    return optimizer


def restore_options(optimizer: Optimizer, fresh: Optimizer) -> None:
    """Give an optimizer whose state was loaded the options of a new one, weight decay and momentum for two.

    Loading brings back the options of the run as it was started; those of the command line are to count.
    """
    for group, new in zip(optimizer.param_groups, fresh.param_groups, strict=True):
        group.update({name: value for name, value in new.items() if name not in ("params", "lr")})


@torch.no_grad()
def match_parameters(optimizer: Optimizer) -> None:
    """Give every state of an optimizer that was loaded the device and the strides of its parameter.

    Fused optimizers go through the memory of both side by side. States that were saved on a GPU, where kernels are
    channels_last, would update the wrong weights of a contiguous parameter on the CPU, without a word. They count steps
    on the parameter's device, where neither torch nor Lightning brings the count of an optimizer of one's own.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if not isinstance(value, torch.Tensor):
                continue
            if value.ndim == 0:
                state[name] = value.to(parameter.device)
            elif value.shape == parameter.shape and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def optimizer_text(name: str, unfrozen: bool) -> str:
    """Return what trains while the backbone is frozen, or once it is unfrozen, formatted for the console."""
    if name != "muon":
        return name
    return "muon for kernels, adamw for the rest" if unfrozen else "adamw"
