"""Callbacks; BackboneUnfreeze and FreezeGuard work in any project whose module has a `backbone` and a `head`."""

from cifar_tl.callbacks.backbone_unfreeze import BackboneUnfreeze
from cifar_tl.callbacks.freeze_guard import FreezeGuard, FreezeViolationError

__all__ = ["BackboneUnfreeze", "FreezeGuard", "FreezeViolationError"]
