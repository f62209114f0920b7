"""Freezing and unfreezing as plain functions, which change modules in place and need no Trainer."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from cifar_tl.schedule import STAGES

BATCHNORM_POLICIES = ("frozen", "train", "adapt")
"""What BatchNorm does in stages that train. Its weight and bias train under every policy.

frozen: normalizes with the statistics it came with, which stay as they are.
train: normalizes with each batch's statistics and tracks them, as PyTorch does by default.
adapt: normalizes with its running statistics, which move towards each batch's. No gradient flows through them, so
    nothing keeps weights from growing: training can diverge at rates that suit the other two.
"""

ADAPT_MOMENTUM = 0.01


def stage_modules(backbone: nn.Module, stage: str) -> list[nn.Module]:
    """Return the modules of a torchvision ResNet's stage: `stem` is conv1 and bn1, the others are themselves."""
    names = ("conv1", "bn1") if stage == "stem" else (stage,)
    return [backbone.get_submodule(name) for name in names]


def training_modules(backbone: nn.Module, stages: Sequence[str]) -> list[nn.Module]:
    """Return the modules of a backbone that train: all of it for all STAGES, whatever kind of backbone it is."""
    if len(stages) == len(STAGES):
        return [backbone]
    return [module for stage in stages for module in stage_modules(backbone, stage)]


def batchnorms(modules: Iterable[nn.Module]) -> Iterator[_BatchNorm]:
    """Yield every BatchNorm layer in the modules."""
    for module in modules:
        yield from (m for m in module.modules() if isinstance(m, _BatchNorm))


def parameters_to_keep(module: nn.Module, part: str, trains: bool) -> set[str]:
    """Return the names of parameters that stay fixed: they come without gradients, and others of the part have them.

    A part without any gradients was frozen as a whole, as many backbones are: it is unfrozen if it is to train.

    Args:
        module: What the names are relative to.
        part: The name of one of its modules.
        trains: The part is to train.
    """
    parameters = dict(module.get_submodule(part).named_parameters(part, remove_duplicate=False))
    fixed = {name for name, parameter in parameters.items() if not parameter.requires_grad}
    return set() if trains and len(fixed) == len(parameters) else fixed


def freeze(module: nn.Module) -> None:
    """Stop a module from changing: no gradient, and eval mode, which alone keeps BatchNorm's statistics still."""
    module.requires_grad_(False)
    module.eval()  # requires_grad=False alone still updates BatchNorm's running statistics


def unfreeze(modules: Iterable[nn.Module], batchnorm: str, kept: Iterable[nn.Parameter] = ()) -> None:
    """Let modules train, with one of the BATCHNORM_POLICIES for their BatchNorm layers, but for parameters to keep."""
    modules, fixed = list(modules), set(map(id, kept))
    for module in modules:
        for parameter in module.parameters():
            if id(parameter) not in fixed:  # which may be integers, that have no gradients
                parameter.requires_grad_(True)
        module.train()
    if batchnorm != "train":
        for layer in batchnorms(modules):
            layer.eval()


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into eval mode, and every submodule back into its own mode afterwards."""
    training = {submodule: submodule.training for submodule in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for submodule, mode in training.items():
            submodule.training = mode


def adapt_statistics(modules: Iterable[nn.Module], momentum: float = ADAPT_MOMENTUM) -> list[RemovableHandle]:
    """Make BatchNorm layers in eval mode move their running statistics towards those of every batch they see.

    Statistics move before the batch is normalized with them, and only while gradients are enabled, so evaluation
    leaves them alone.

    Returns:
        One handle per layer; `handle.remove()` ends it.
    """

    def move(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if not torch.is_grad_enabled():
            return
        assert isinstance(layer, _BatchNorm)
        assert layer.running_mean is not None
        assert layer.running_var is not None
        with torch.no_grad():
            images = inputs[0].detach().float()
            variance, mean = torch.var_mean(images, dim=[0, *range(2, images.dim())])
            layer.running_mean.lerp_(mean, momentum)
            layer.running_var.lerp_(variance, momentum)

    return [layer.register_forward_pre_hook(move) for layer in batchnorms(modules)]
