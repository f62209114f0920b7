"""Features of the frozen backbone, computed once instead of in every epoch."""

import hashlib
import inspect
import json
import logging
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from rich.progress import track
from torch import Tensor, nn

from cifar_tl.callbacks.freezing import batchnorms, evaluating
from cifar_tl.data.augment import Augment
from cifar_tl.data.datamodule import CIFAR10DataModule
from cifar_tl.errors import UserError, check_choice, first_line
from cifar_tl.files import check_intact, remove_partial_files, replacing
from cifar_tl.hardware import device_name, host_memory
from cifar_tl.model import backbone as backbone_code
from cifar_tl.model import cpu_kernels
from cifar_tl.model.backbone import FEATURES

log = logging.getLogger(__name__)

SPLITS = ("train", "val")
ABANDONED_S = 3600
"""Age in seconds from which on a half-written file of features is a killed run's."""
VIEW_NAMES = ("no views", "the image", "the image and its mirror image")


@dataclass(frozen=True)
class CacheDecision:
    """Whether the frozen phase runs on cached features.

    Attributes:
        views: Views of each training image that are cached; 0 for no cache.
        size: Bytes that the features take.
        text: What was decided and why, formatted for the console.
    """

    views: int
    size: int
    text: str


def decide(
    mode: str, frozen: int, augment: Augment, sizes: dict[str, int], itemsize: int, available: int, world_size: int
) -> CacheDecision:
    """Decide whether features are cached.

    Args:
        mode: `finetune.cache_features`: `auto`, `true` or `false`.
        frozen: Epochs that are frozen.
        augment: The augmentation of the frozen phase.
        sizes: Images of `train` and `val`.
        itemsize: Bytes of a feature's number.
        available: Bytes that the cache may take.
        world_size: Processes that train together.

    Raises:
        UserError: `true`, and it cannot be done.
    """
    check_choice("finetune.cache_features", mode, ("auto", "true", "false"))
    views = augment.views
    size = (views * sizes["train"] + sizes["val"]) * FEATURES * itemsize
    obstacle = ""
    if views == 0:
        obstacle = (
            "the frozen phase's augmentation makes a new image every time; "
            "finetune.frozen_augment=flip keeps the views that can be cached"
        )
    elif world_size > 1:
        obstacle = f"each of {world_size} processes would compute them all; use trainer.devices=1"
    elif size > available:
        obstacle = f"{gigabytes(size)} of features would not fit into the {gigabytes(available)} that they may take"
    if mode == "true" and obstacle and frozen:
        raise UserError(f"finetune.cache_features=true: features cannot be cached: {obstacle}.")
    if mode == "false":
        obstacle = "finetune.cache_features=false"
    elif not frozen:
        obstacle = "no epoch is frozen"
    elif mode == "auto" and not obstacle and views > frozen:
        obstacle = f"{frozen} frozen epoch does not pay for {views} views"
    if obstacle:
        return CacheDecision(0, 0, f"not cached: {obstacle}")
    instead = f", instead of in each of {frozen} epochs" if frozen > 1 else ""
    return CacheDecision(views, size, f"computed once for {VIEW_NAMES[views]}, {gigabytes(size)}{instead}")


def gigabytes(size: int) -> str:
    """Return a number of bytes as text, `0.78 GB`."""
    return f"{size / 1e9:.2f} GB"


def memory_for_features(device: torch.device) -> int:
    """Return how many bytes features may take: half of a GPU's free memory, or half of what the process may have."""
    free = int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else host_memory()
    return free // 2


class BackboneFeatures(L.Callback):
    """Compute features of images once, or read those that another run has kept; a base class.

    Features may be kept on disk, under a name derived from all that they depend on; every other run that would compute
    the same ones reads them.

    Args:
        datamodule: Whose images they are of.
        folder: Where to keep features; None keeps none.

    Attributes:
        views: Views of each training image: 2 has its mirror image, too; 0 computes nothing.
    """

    what = "features"
    splits: tuple[str, ...] = SPLITS
    """Whose features they are."""

    def __init__(self, datamodule: CIFAR10DataModule, folder: Path | None) -> None:
        self.datamodule = datamodule
        self.folder = folder
        self.views = 0

    def _get(self, trainer: L.Trainer, backbone: nn.Module) -> dict[str, Tensor]:
        start = time.perf_counter()
        device = trainer.strategy.root_device
        path = None
        if self.folder is not None and all(isinstance(self.datamodule.splits[s][0], Tensor) for s in self.splits):
            path = self.folder / f"{self._key(trainer, backbone)[:16]}.pt"
        kept = None if path is None else _read(path, self._shapes())
        if trainer.strategy.reduce_boolean_decision(kept is not None):  # of several processes, all have it or none
            assert kept is not None
            log.info("%s read from %s (%.1f s)", self.what, path, time.perf_counter() - start)
            return {name: values.to(device) for name, values in kept.items()}
        features = self._make(trainer, backbone)
        views, seconds = self._count(), time.perf_counter() - start
        log.info("%s of %s views computed (%.1f s, %.0f a second)", self.what, f"{views:,}", seconds, views / seconds)
        if path is not None and trainer.is_global_zero and _write(path, features):
            log.info("%s kept in %s for other runs", self.what, path)
        return features

    def _shapes(self) -> dict[str, tuple[int, int, int]]:
        """Return the shape of each tensor that is made."""
        sizes = self.datamodule.sizes
        return {"train": (self.views, sizes["train"], FEATURES), "val": (1, sizes["val"], FEATURES)}

    def _make(self, trainer: L.Trainer, backbone: nn.Module) -> dict[str, Tensor]:
        """Return the features of each split's images, (views, examples, length)."""
        return {split: self._compute(trainer, backbone, split, shape[0]) for split, shape in self._shapes().items()}

    def _count(self) -> int:
        """Return how many views' features are computed."""
        return sum(views * examples for views, examples, _ in self._shapes().values())

    def _compute(self, trainer: L.Trainer, backbone: nn.Module, split: str, views: int) -> Tensor:
        """Return the features of a split's images, (views, examples, length)."""
        features = torch.empty(0)
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            for view in range(views):
                loader = self.datamodule.images_in_order(split)
                batches: Iterable[Any] = loader
                if sys.stdout.isatty():
                    batches = track(loader, f"{self.what}, {split}, view {view + 1}", len(loader), transient=True)
                done = 0
                for images, _ in batches:
                    batch = backbone(images.flip(3) if view == 1 else images)
                    if not len(features):
                        features = batch.new_empty(views, self.datamodule.sizes[split], FEATURES)
                    features[view, done : done + len(batch)] = batch
                    done += len(batch)
        return features

    def _key(self, trainer: L.Trainer, backbone: nn.Module) -> str:
        """Return a hash of everything that the features depend on."""
        digest = hashlib.sha256()
        for name, tensor in backbone.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.cpu().contiguous().numpy().data)
        for split in self.splits:
            images, _ = self.datamodule.splits[split]
            assert isinstance(images, Tensor)
            digest.update(images.cpu().contiguous().numpy().data)
        for code in (backbone_code, cpu_kernels):
            digest.update(inspect.getsource(code).encode())
        digest.update(json.dumps(self._facts(trainer, backbone), sort_keys=True).encode())
        return digest.hexdigest()

    def _facts(self, trainer: L.Trainer, backbone: nn.Module) -> dict[str, Any]:
        return {
            "views": self.views,
            "mean": list(self.datamodule.mean),
            "std": list(self.datamodule.std),
            "layers": repr(backbone),
            "upscale": backbone.upscale,
            "eps": [m.eps for m in batchnorms([backbone])],  # in no state dict
            "precision": trainer.precision,
            "device": [trainer.strategy.root_device.type, device_name(trainer.strategy.root_device.type)],
            "compiled": backbone._compiled_call_impl is not None,
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "torch": torch.__version__,
        }


class FeatureCache(BackboneFeatures):
    """Give the frozen phase features instead of images, and images back at the unfreeze.

    The frozen backbone in eval mode gives the same features for the same image in every epoch; the head trains on them
    as it would on images, with the same order and the same flips.

    Args:
        datamodule: Its `features` are filled and emptied.
        unfreeze_at_epoch: First epoch that is not frozen.
        mode: `auto`, `true` or `false`, as `decide` takes it.
        folder: Where to keep features; None keeps none.

    Attributes:
        views: As `decide` decided.
    """

    def __init__(self, datamodule: CIFAR10DataModule, unfreeze_at_epoch: int, mode: str, folder: Path | None) -> None:
        super().__init__(datamodule, folder)
        self.unfreeze_at_epoch = unfreeze_at_epoch
        self.mode = mode

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Decide whether there will be a cache, and say so.

        Raises:
            UserError: `true`, and it cannot be done.
        """
        if stage != "fit":
            return
        data = self.datamodule
        available = memory_for_features(trainer.strategy.root_device)
        itemsize = 2 if trainer.precision.endswith("-mixed") else 4
        decision = decide(
            self.mode, self.unfreeze_at_epoch, data.augment(0), data.sizes, itemsize, available, trainer.world_size
        )
        self.views, data.caching = decision.views, decision.text
        if trainer.is_global_zero:
            log.info("features   %s", decision.text)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Make sure that frozen epochs, and only they, have features."""
        if trainer.current_epoch >= self.unfreeze_at_epoch:
            self.datamodule.features.clear()
        elif self.views and not self.datamodule.features:
            backbone = pl_module.get_submodule("backbone")
            with evaluating(backbone):
                self.datamodule.features.update(self._get(trainer, backbone))

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Free the memory."""
        self.datamodule.features.clear()


def _write(path: Path, features: dict[str, Tensor]) -> bool:
    """Keep features, if there is room; a run does not fail for a cache."""
    try:
        remove_partial_files(path.parent, ABANDONED_S)
        with replacing(path) as partial:
            torch.save({split: values.cpu() for split, values in features.items()}, partial)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError when the disk is full
        log.warning("features are not kept: %s cannot be written (%s)", path, first_line(error))
        return False
    return True


def _read(path: Path, shapes: dict[str, tuple[int, int, int]]) -> dict[str, Tensor] | None:
    """Return kept features, or None if there are none or the file is damaged."""
    if not path.is_file():
        return None
    try:
        # mapped: several jobs share the pages
        features = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        intact = {split: tuple(values.shape) for split, values in features.items()} == shapes
        check_intact(path)
    except Exception as error:  # torch.load raises about anything for a damaged file; a cache is made again
        intact, features = False, {}
        log.warning("%s is damaged (%s)", path, type(error).__name__)
    return features if intact else None
