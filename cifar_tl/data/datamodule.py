"""The LightningDataModule: a source of images, split and batched."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import lightning as L
import torch
from torch import Tensor

from cifar_tl.data.augment import Augment
from cifar_tl.data.batch import IMAGENET_MEAN, IMAGENET_STD, Batch
from cifar_tl.data.lazy import LazyImages
from cifar_tl.data.loader import ArrayLoader
from cifar_tl.data.splits import (
    check_every_class_trains,
    content_hash,
    first_copies,
    image_digest,
    limited,
    split_train_val,
)
from cifar_tl.errors import UserError, check_int

log = logging.getLogger(__name__)

Split = tuple[Tensor | LazyImages, Tensor]
"""Images (examples, 3, 32, 32), uint8, and targets (examples,), int64."""


class Source(Protocol):
    """Where images come from: CIFAR-10, class folders, or a generator."""

    @property
    def classes(self) -> Sequence[str]:
        """Class names, in the order of their indices."""

    @property
    def own_val(self) -> int:
        """Images at the end of `train`, once it has been read, that are for validation; 0: some are cut from it."""

    def prepare(self) -> None:
        """Fetch what has to be fetched."""

    def read(self, splits: Sequence[str]) -> Mapping[str, Split]:
        """Return `train`, `test` or both, by name; raise one UserError for all that is wrong with them."""

    def name(self, split: str, index: int) -> str:
        """Return what people call an image of a split that has been read."""


class CIFAR10DataModule(L.LightningDataModule):
    """CIFAR-10 at 32x32, never resized, or a stand-in.

    Validation is cut from the training set, if the source has none of its own. The test set is read before training, so
    that what is wrong with it does not come out hours later; until testing starts it is only compared with the training
    images, pixel for pixel.

    Args:
        source: Where images come from.
        batch_size: Images per training step, of all processes together: one setting is one training on any number, but
            for a last step of fewer images than processes, and for mixup and CutMix, which pair a process's images.
        eval_batch_size: Images per step of validation and test; results do not depend on it.
        val_size: Images cut from the training set for validation, stratified, unless the source has some of its own;
            None for a tenth of them, at most 500.
        limit: At most so many images for each of training, validation and test, stratified; None for all.
        train_limit: At most so many for training, stratified; None for `limit` alone.
        split_seed: Of the split and the subsets, apart from the run's seed, so that runs of all seeds share a split.
        one_hot: Give targets as one-hot rows instead of class indices.
        augment: The augmentation of the training images in an epoch.
        seed: Of shuffling and augmentation.

    Attributes:
        features: What `train` and `val` batches have instead of images, (views, examples, length); empty for images.
        teacher: What training batches have as a third part, a row for each of their images, (views, examples, length);
            None for batches of two parts.
        test_limit: As `limit`, for the test alone.
        split_sha256: Of the training and the validation split: their indices, images, targets and class names.
        test_sha256: The same of the test set.
        duplicates: Images that are in two splits: `test` and `val`, how many; `example`, one pair or None. Empty before
            `setup("fit")`.
    """

    mean = IMAGENET_MEAN
    std = IMAGENET_STD

    def __init__(
        self,
        source: Source,
        batch_size: int,
        eval_batch_size: int,
        val_size: int | None,
        limit: int | None,
        train_limit: int | None,
        split_seed: int,
        one_hot: bool,
        augment: Callable[[int], Augment],
        seed: int,
    ) -> None:
        super().__init__()
        self.source = source
        self.batch_size = check_int("data.batch_size", batch_size, 1)
        self.eval_batch_size = check_int("data.eval_batch_size", eval_batch_size, 1)
        self.val_size = None if val_size is None else check_int("data.val_size", val_size, 1)
        self.limit = None if limit is None else check_int("data.limit", limit, len(source.classes))
        self.test_limit = self.limit
        self.train_limit = (
            None if train_limit is None else check_int("data.train_limit", train_limit, len(source.classes))
        )
        self.split_seed = check_int("data.split_seed", split_seed, 0)
        self.one_hot = one_hot
        self.augment = augment
        self.seed = seed
        self.features: dict[str, Tensor] = {}
        self.teacher: Tensor | None = None
        self.caching = ""
        """Whether the frozen phase has features instead of images, and why, in words; FeatureCache says so."""
        self.splits: dict[str, tuple[Tensor | LazyImages, Tensor]] = {}
        self.indices: dict[str, Tensor] = {}
        """Of each loaded split, which images of the official training set (train, val) or test set it has; sorted."""
        self.split_sha256 = ""
        self.test_sha256 = ""
        self.duplicates: dict[str, Any] = {}
        self._test: Split | None = None

    @property
    def classes(self) -> Sequence[str]:
        """Class names, in the order of their indices."""
        return self.source.classes

    @property
    def sizes(self) -> dict[str, int]:
        """Images of each split that is loaded, and of `test` once it has been compared with the others."""
        compared = {} if self._test is None else {"test": len(self._chosen_for_test(self._test[1]))}
        return {name: len(targets) for name, (_, targets) in self.splits.items()} | compared

    def images(self, split: str, positions: Tensor | None = None) -> Tensor:
        """Return images of a loaded split, (images, 3, 32, 32), uint8, as the source gave them.

        Args:
            split: `train`, `val` or `test`.
            positions: Which of its images, so that no others are decoded; None for all.
        """
        images = self.splits[split][0]
        if positions is not None:
            images = images[positions]
        if isinstance(images, Tensor):
            return images
        return torch.cat(list(images.read(torch.split(torch.arange(len(images)), self.eval_batch_size))))

    def targets(self, split: str) -> Tensor:
        """Return the class indices of a loaded split, (examples,)."""
        return self.splits[split][1]

    def normalized(self, split: str, positions: Tensor) -> Iterator[Tensor]:
        """Yield batches of some images of a loaded split, in order, as the network gets them in evaluation."""
        images, targets = self.images(split, positions), self.targets(split)[positions]
        for batch, _ in ArrayLoader(
            images, targets.to(images.device), self.eval_batch_size, self.mean, self.std, device=images.device
        ):
            yield batch

    def prepare_data(self) -> None:
        """Fetch or check the files, unless they have been read."""
        if not self.splits:
            self.source.prepare()

    def setup(self, stage: str) -> None:
        """Load what a stage needs: `fit` both sets, `validate` the training set, `test` and `predict` the test set.

        Raises:
            UserError: What is wrong with the files, or a class would have nothing to train on.
        """
        fitting = stage == "fit"
        if fitting and not self.duplicates:  # read for another stage, and so not compared
            self.splits.clear()
            self.indices.clear()
        if stage in ("fit", "validate") and "train" not in self.splits:
            sets = self.source.read(["train", "test"] if fitting else ["train"])
            images, targets = sets["train"]
            val_size = min(500, max(1, len(targets) // 10)) if self.val_size is None else self.val_size
            train, val = split_train_val(
                targets, val_size, self.limit, self.split_seed, self.train_limit, self.source.own_val
            )
            if fitting:
                self._check_classes(targets, train, val)
            self.indices |= {"train": train, "val": val}
            self.splits["train"] = images[train], targets[train]
            self.splits["val"] = images[val], targets[val]
            digests = {split: _digests(self.splits[split][0]) for split in ("train", "val")}
            self.split_sha256 = content_hash(
                self.classes, *((self.indices[split], digests[split], self.targets(split)) for split in digests)
            )
            if fitting:
                self._test = sets["test"]
                self._compare_with_test(digests["train"], digests["val"])
        if stage in ("test", "predict") and "test" not in self.splits:
            images, targets = self._test or self.source.read(["test"])["test"]
            self._test = None
            chosen = self._chosen_for_test(targets)
            self.indices["test"] = chosen
            self.splits["test"] = images[chosen], targets[chosen]
            if not self.test_sha256:
                self.test_sha256 = content_hash(
                    self.classes, (chosen, _digests(self.splits["test"][0]), self.targets("test"))
                )

    def _chosen_for_test(self, targets: Tensor) -> Tensor:
        return limited(torch.arange(len(targets)), targets, self.test_limit, self.split_seed)

    def _check_classes(self, targets: Tensor, train: Tensor, val: Tensor) -> None:
        limits = {"data.limit": self.limit, "data.train_limit": self.train_limit}
        asked = [f"{key}={size}" for key, size in limits.items() if size is not None]
        cut = "a tenth of the images for validation" if self.val_size is None else f"data.val_size={self.val_size}"
        cut = "its own validation split" if self.source.own_val else cut
        given = cut + (f" with {' and '.join(asked)}" if asked else "")
        missing = check_every_class_trains(self.classes, targets, train, val, given)
        if missing:
            log.warning(
                "warning: %s leaves no validation image of %s: validation says nothing about %s.",
                given,
                ", ".join(missing),
                "it" if len(missing) == 1 else "them",
            )

    def _compare_with_test(self, train: list[bytes], val: list[bytes]) -> None:
        """Hash the test images and count those of two splits."""
        assert self._test is not None
        images, targets = self._test
        chosen = self._chosen_for_test(targets)
        test = _digests(images[chosen])
        self.test_sha256 = content_hash(self.classes, (chosen, test, targets[chosen]))
        in_training = first_copies(test, [*train, *val])
        places = torch.cat([self.indices["train"], self.indices["val"]])
        self.duplicates = {
            "test": len(in_training),
            "val": len(first_copies(val, train)),
            "example": None,
        }
        if in_training:
            at, original = min(in_training.items())
            copy, original_name = (
                self.source.name("test", int(chosen[at])),
                self.source.name("train", int(places[original])),
            )
            self.duplicates["example"] = [copy, original_name]
            log.warning(
                "warning: %s of %s test images are training or validation images, too, pixel for pixel at 32x32 (%s is "
                "%s): the test says too much good of the model. Remove them from one of the two.",
                f"{len(in_training):,}",
                f"{len(test):,}",
                copy,
                original_name,
            )
        if self.duplicates["val"]:
            log.warning(
                "warning: %s of %s validation images are training images, too, pixel for pixel at 32x32.",
                f"{self.duplicates['val']:,}",
                f"{len(val):,}",
            )

    def train_dataloader(self) -> ArrayLoader:
        """Return shuffled, augmented batches; a function of the seed and the trainer's epoch.

        Without a trainer, and under its overfit_batches, which is for the same batches again and again: of epoch 0.
        """
        trainer = self.trainer

        def epoch() -> int:
            if trainer is None or trainer.overfit_batches:  # type: ignore[attr-defined]  # Lightning adds it
                return 0
            return trainer.current_epoch

        return self._loader("train", self.batch_size, self.augment, epoch)

    def val_dataloader(self) -> ArrayLoader:
        """Return the validation images in order."""
        return self.in_order("val")

    def test_dataloader(self) -> ArrayLoader:
        """Return the test images in order."""
        return self.in_order("test")

    def predict_dataloader(self) -> ArrayLoader:
        """Return the test images in order."""
        return self.in_order("test")

    def in_order(self, split: str) -> ArrayLoader:
        """Return a split's images in order, as they are."""
        return self._loader(split, self.eval_batch_size)

    def images_in_order(self, split: str) -> ArrayLoader:
        """Return a split's images in order, where `in_order` has features, too."""
        loader = self.in_order(split)
        loader.features = lambda: None
        return loader

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Return the batch: it was made on the device."""
        return batch

    def _loader(
        self,
        split: str,
        batch_size: int,
        augment: Callable[[int], Augment] | None = None,
        epoch: Callable[[], int] = lambda: 0,
    ) -> ArrayLoader:
        assert split in self.splits, "setup() comes first"
        trainer = self.trainer
        world_size = trainer.world_size if trainer else 1
        if batch_size % world_size and augment is not None:
            raise UserError(
                f"data.batch_size={batch_size} cannot be shared by {world_size} processes: give a multiple of "
                f"{world_size}. It is the number of images of a step of all processes together."
            )
        images, targets = self.splits[split]
        if trainer is not None and isinstance(images, Tensor):
            device = trainer.strategy.root_device
            self.splits[split] = images.to(device), targets.to(device)
        return ArrayLoader(
            *self.splits[split],
            batch_size=max(1, batch_size // world_size),
            mean=self.mean,
            std=self.std,
            classes=len(self.classes),
            one_hot_targets=self.one_hot,
            augment=augment,
            features=lambda: self.features.get(split),
            teacher=lambda: self.teacher,
            seed=self.seed,
            epoch=epoch,
            device=trainer.strategy.root_device if trainer else "cpu",
            rank=trainer.global_rank if trainer else 0,
            world_size=world_size,
        )


def _digests(images: Tensor | LazyImages) -> list[bytes]:
    """Return a digest per image; equal images have equal ones."""
    if isinstance(images, LazyImages):
        return images.digests
    return [image_digest(image) for image in images.cpu().numpy()]
