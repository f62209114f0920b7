"""How much arithmetic training takes, counted from shapes: a cost that is the same on every device."""

import torch
from omegaconf import DictConfig
from torch.utils.flop_counter import FlopCounterMode

from cifar_tl.build import build_augment, build_schedule
from cifar_tl.callbacks.freezing import freeze, training_modules, unfreeze
from cifar_tl.data.decode import SIZE
from cifar_tl.model.backbone import Backbone
from cifar_tl.schedule import STAGES


def training_flops(cfg: DictConfig, images: int) -> float:
    """Return the floating-point operations of the backbone on the training images, in all epochs.

    The head's, the optimizer's and those of augmentation and validation are left out. Where features can be cached,
    they are computed once per view, as a single process does.

    Args:
        cfg: A recipe, as composed from conf/train.yaml.
        images: Number of training images.
    """
    views = build_augment(cfg)(0).views
    total = 0.0
    for phase in build_schedule(cfg).phases:
        passes = phase.end - phase.start
        if not phase.stages and views:
            passes = min(passes, views)
        total += passes * images * flops_per_image(phase.upscale or cfg.model.upscale, phase.stages)
    return total


def flops_per_image(upscale: int = 1, stages: tuple[str, ...] = STAGES) -> float:
    """Return the floating-point operations of the backbone per image of 32x32, 2 per multiply-add.

    Args:
        upscale: Factor by which the model enlarges the image.
        stages: Those that train, which is what the backward pass is for; none: the forward pass alone.
    """
    with torch.device("meta"), FlopCounterMode(display=False) as counter:  # shapes without numbers
        backbone = Backbone(upscale)
        freeze(backbone)
        unfreeze(training_modules(backbone, stages), batchnorm="frozen")
        features = backbone(torch.zeros(1, 3, SIZE, SIZE))
        if stages:
            features.sum().backward()
    return float(counter.get_total_flops())
