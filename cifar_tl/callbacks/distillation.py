"""Distillation: fine-tuning at 32x32 learns from what the pretrained backbone sees in the same images, enlarged."""

import inspect
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import lightning as L
from torch import Tensor, nn

from cifar_tl.callbacks.feature_cache import BackboneFeatures, gigabytes, memory_for_features
from cifar_tl.callbacks.freezing import evaluating
from cifar_tl.data.datamodule import CIFAR10DataModule
from cifar_tl.data.decode import SIZE
from cifar_tl.errors import UserError
from cifar_tl.model import distillation as distillation_code
from cifar_tl.model.backbone import FEATURES
from cifar_tl.model.distillation import ridge_regression, standardize
from cifar_tl.model.module import ResNet50Classifier

log = logging.getLogger(__name__)


class FeatureDistillation(BackboneFeatures):
    """Give the training batches of fine-tuning the teacher's features of their images.

    The teacher is the pretrained backbone itself, on the training images enlarged: filters of ImageNet see more in
    larger objects. Its features of each image and its mirror image are computed once, when fine-tuning starts, and a
    linear map is fitted to them from those of the images at their own size. From then on the loss has a term for how
    far the mapped features are from the teacher's (`ResNet50Classifier.distillation_loss`); the model itself goes on to
    see 32x32 pixels. Whatever else augmentation does to an image, the teacher's features are of the image as it is.

    Args:
        datamodule: Its `teacher` is filled and emptied.
        unfreeze_at_epoch: First epoch that is not frozen.
        upscale: Factor by which the teacher's images are enlarged.
        own_upscale: Factor by which fine-tuning enlarges its own, to begin with.
        pretrained: Returns the backbone as it was before fine-tuning, for a run that goes on after it has begun.
        folder: Where to keep features; None keeps none.
    """

    what = "teacher's features"
    splits = ("train",)

    def __init__(
        self,
        datamodule: CIFAR10DataModule,
        unfreeze_at_epoch: int,
        upscale: int,
        own_upscale: int,
        pretrained: Callable[[], nn.Module],
        folder: Path | None,
    ) -> None:
        super().__init__(datamodule, folder)
        self.unfreeze_at_epoch = unfreeze_at_epoch
        self.upscale = upscale
        self.own_upscale = own_upscale
        self.pretrained = pretrained

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find out which views there are.

        Raises:
            UserError: Their features would not fit into memory.
        """
        if stage != "fit":
            return
        data = self.datamodule
        self.views = data.augment(self.unfreeze_at_epoch).only_flips.views
        numbers = (self.views + 1) * data.sizes["train"] * FEATURES  # with those that the map is fitted to
        size = numbers * (2 if trainer.precision.endswith("-mixed") else 4)
        available = memory_for_features(trainer.strategy.root_device)
        if size > available:
            raise UserError(
                f"finetune.distill_upscale={self.upscale}: {gigabytes(size)} of the teacher's features would not fit "
                f"into the {gigabytes(available)} that they may take. Give finetune.distill_upscale=null, which leaves "
                f"distillation out, or fewer images, by data.train_limit=."
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Go on with a run whose fine-tuning has begun: its backbone is not the pretrained one any more."""
        if trainer.current_epoch >= self.unfreeze_at_epoch and trainer.global_step > 0:
            self._teach(trainer, pl_module, self.pretrained().to(trainer.strategy.root_device))

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compute the teacher's features with the backbone that is about to change."""
        if trainer.current_epoch >= self.unfreeze_at_epoch and self.datamodule.teacher is None:
            self._teach(trainer, pl_module, pl_module.get_submodule("backbone"))

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Free the memory."""
        self._hand_over(pl_module, None, None)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Free the memory."""
        self._hand_over(pl_module, None, None)

    def _teach(self, trainer: L.Trainer, pl_module: L.LightningModule, backbone: nn.Module) -> None:
        with evaluating(backbone), _enlarging(backbone, self.own_upscale):
            features = self._get(trainer, backbone)
        self._hand_over(pl_module, features["teacher"], features["map"][0])

    def _hand_over(self, pl_module: L.LightningModule, teacher: Tensor | None, map_to_teacher: Tensor | None) -> None:
        self.datamodule.teacher = teacher
        cast(ResNet50Classifier, pl_module).map_to_teacher = map_to_teacher

    def _shapes(self) -> dict[str, tuple[int, int, int]]:
        images = self.datamodule.sizes["train"]
        return {"teacher": (self.views, images, FEATURES), "map": (1, FEATURES + 1, FEATURES)}

    def _make(self, trainer: L.Trainer, backbone: nn.Module) -> dict[str, Tensor]:
        log.info("%s are being computed, of images at %s", self.what, "x".join([str(SIZE * self.upscale)] * 2))
        with _enlarging(backbone, self.upscale):
            teacher = self._compute(trainer, backbone, "train", self.views)
        standardize(teacher.flatten(0, 1))
        (features,) = self._compute(trainer, backbone, "train", 1)
        return {"teacher": teacher, "map": ridge_regression(features, teacher[0])[None]}

    def _compute(self, trainer: L.Trainer, backbone: nn.Module, split: str, views: int) -> Tensor:
        """Return the features of all images, of which each process computes its share."""
        computed = super()._compute(trainer, backbone, split, views)
        if trainer.world_size == 1:
            return computed
        examples = computed.shape[1]
        share = computed[:, : math.ceil(examples / trainer.world_size)].contiguous()
        # (processes, views, images, length): each process has had every so many-th image
        shares = trainer.strategy.all_gather(share)
        return shares.permute(1, 2, 0, 3).flatten(1, 2)[:, :examples].contiguous()

    def _count(self) -> int:
        return (self.views + 1) * self.datamodule.sizes["train"]

    def _facts(self, trainer: L.Trainer, backbone: nn.Module) -> dict[str, Any]:
        return {**super()._facts(trainer, backbone), "teacher": [self.upscale, inspect.getsource(distillation_code)]}


@contextmanager
def _enlarging(backbone: nn.Module, upscale: int) -> Iterator[None]:
    """Have a backbone enlarge its images, and do as before afterwards."""
    before = backbone.upscale
    backbone.upscale = upscale  # type: ignore[assignment]  # no module, whatever nn.Module promises
    try:
        yield
    finally:
        backbone.upscale = before
