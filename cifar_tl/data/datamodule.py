"""The LightningDataModule: a source of images, split and batched."""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import lightning as L
import torch
from torch import Tensor

from cifar_tl.data.augment import Augment
from cifar_tl.data.batch import IMAGENET_MEAN, IMAGENET_STD, Batch
from cifar_tl.data.lazy import LazyImages
from cifar_tl.data.loader import ArrayLoader
from cifar_tl.data.splits import limited, split_hash, split_train_val
from cifar_tl.errors import UserError, check_int


class Source(Protocol):
    """Where images come from: CIFAR-10, class folders, or a generator."""

    @property
    def classes(self) -> Sequence[str]:
        """Class names, in the order of their indices."""

    def prepare(self) -> None:
        """Make sure that everything `train` and `test` need is there and intact."""

    def train(self) -> tuple[Tensor | LazyImages, Tensor]:
        """Return images (examples, 3, 32, 32), uint8, and targets (examples,), int64."""

    def test(self) -> tuple[Tensor | LazyImages, Tensor]:
        """Return images (examples, 3, 32, 32), uint8, and targets (examples,), int64."""


class CIFAR10DataModule(L.LightningDataModule):
    """CIFAR-10 at 32x32, never resized, or a stand-in.

    Validation is cut from the training set; the test set is loaded when testing starts, not before.

    Args:
        source: Where images come from.
        batch_size: Images per training step, of all processes together: one setting is one training on any number.
        eval_batch_size: Images per step of validation and test; results do not depend on it.
        val_size: Images cut from the training set for validation, stratified.
        limit: At most so many images for each of training, validation and test, stratified; None for all.
        split_seed: Of the split and the subsets, apart from the run's seed, so that runs of all seeds share a split.
        one_hot: Give targets as one-hot rows instead of class indices.
        augment: The augmentation of the training images in an epoch.
        seed: Of shuffling and augmentation.

    Attributes:
        features: What `train` and `val` batches have instead of images, (views, examples, length); empty for images.
    """

    mean = IMAGENET_MEAN
    std = IMAGENET_STD

    def __init__(
        self,
        source: Source,
        batch_size: int,
        eval_batch_size: int,
        val_size: int,
        limit: int | None,
        split_seed: int,
        one_hot: bool,
        augment: Callable[[int], Augment],
        seed: int,
    ) -> None:
        super().__init__()
        self.source = source
        self.batch_size = check_int("data.batch_size", batch_size, 1)
        self.eval_batch_size = check_int("data.eval_batch_size", eval_batch_size, 1)
        self.val_size = check_int("data.val_size", val_size, 1)
        self.limit = None if limit is None else check_int("data.limit", limit, len(source.classes))
        self.split_seed = check_int("data.split_seed", split_seed, 0)
        self.one_hot = one_hot
        self.augment = augment
        self.seed = seed
        self.features: dict[str, Tensor] = {}
        self.caching = ""
        """Whether the frozen phase has features instead of images, and why, in words; FeatureCache says so."""
        self.splits: dict[str, tuple[Tensor | LazyImages, Tensor]] = {}
        self.indices: dict[str, Tensor] = {}
        """Of each loaded split, which images of the official training set (train, val) or test set it has; sorted."""
        self.split_sha256 = ""

    @property
    def classes(self) -> Sequence[str]:
        """Class names, in the order of their indices."""
        return self.source.classes

    @property
    def sizes(self) -> dict[str, int]:
        """Images of each split that is loaded."""
        return {name: len(targets) for name, (_, targets) in self.splits.items()}

    def images(self, split: str) -> Tensor:
        """Return the images of a loaded split, (examples, 3, 32, 32), uint8, as the source gave them."""
        images = self.splits[split][0]
        if isinstance(images, Tensor):
            return images
        return torch.cat(list(images.read(torch.split(torch.arange(len(images)), self.eval_batch_size))))

    def targets(self, split: str) -> Tensor:
        """Return the class indices of a loaded split, (examples,)."""
        return self.splits[split][1]

    def normalized(self, split: str, positions: Tensor) -> Iterator[Tensor]:
        """Yield batches of some images of a loaded split, in order, as the network gets them in evaluation."""
        images, targets = self.images(split), self.targets(split)
        positions = positions.to(images.device)
        for batch, _ in ArrayLoader(
            images[positions], targets[positions], self.eval_batch_size, self.mean, self.std, device=images.device
        ):
            yield batch

    def prepare_data(self) -> None:
        """Fetch or check the files, unless they have been read."""
        if not self.splits:
            self.source.prepare()

    def setup(self, stage: str) -> None:
        """Load what a stage needs: `fit` and `validate` the training set and its split, `test` the test set."""
        if stage in ("fit", "validate") and "train" not in self.splits:
            images, targets = self.source.train()
            train, val = split_train_val(targets, self.val_size, self.limit, self.split_seed)
            self.split_sha256 = split_hash(train, val)
            self.indices |= {"train": train, "val": val}
            self.splits["train"] = images[train], targets[train]
            self.splits["val"] = images[val], targets[val]
        if stage == "test" and "test" not in self.splits:
            images, targets = self.source.test()
            chosen = limited(torch.arange(len(targets)), targets, self.limit, self.split_seed)
            self.indices["test"] = chosen
            self.splits["test"] = images[chosen], targets[chosen]

    def train_dataloader(self) -> ArrayLoader:
        """Return shuffled, augmented batches; a function of the seed and the trainer's epoch."""
        trainer = self.trainer
        assert trainer is not None
        return self._loader("train", self.batch_size, self.augment, lambda: trainer.current_epoch)

    def val_dataloader(self) -> ArrayLoader:
        """Return the validation images in order."""
        return self.in_order("val")

    def test_dataloader(self) -> ArrayLoader:
        """Return the test images in order."""
        return self.in_order("test")

    def in_order(self, split: str) -> ArrayLoader:
        """Return a split's images in order, as they are."""
        return self._loader(split, self.eval_batch_size)

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
            seed=self.seed,
            epoch=epoch,
            device=trainer.strategy.root_device if trainer else "cpu",
            rank=trainer.global_rank if trainer else 0,
            world_size=world_size,
        )
