"""The LightningDataModule: a source of images, split and batched."""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import lightning as L
import torch
from omegaconf import DictConfig
from torch import Tensor

from cifar_tl.data.augment import Augment
from cifar_tl.data.cifar10 import Cifar10
from cifar_tl.data.folder import ImageFolders
from cifar_tl.data.loader import ArrayLoader
from cifar_tl.data.splits import limited, split_hash, split_train_val
from cifar_tl.data.synthetic import Synthetic
from cifar_tl.errors import check_choice, check_int
from cifar_tl.model.backbone import IMAGENET_MEAN, IMAGENET_STD


class Source(Protocol):
    """Where images come from: CIFAR-10, class folders, or a generator."""

    @property
    def classes(self) -> Sequence[str]:
        """Class names, in the order of their indices."""

    def prepare(self) -> None:
        """Make sure that everything `train` and `test` need is there and intact."""

    def train(self) -> tuple[Tensor, Tensor]:
        """Return images (examples, 3, 32, 32), uint8, and targets (examples,), int64."""

    def test(self) -> tuple[Tensor, Tensor]:
        """Return images (examples, 3, 32, 32), uint8, and targets (examples,), int64."""


class ImageDataModule(L.LightningDataModule):
    """CIFAR-10 at 32x32, never resized, or a stand-in.

    Validation is cut from the training set; the test set is loaded when testing starts, not before.

    Args:
        source: Where images come from.
        batch_size: Images per training step, per process.
        eval_batch_size: Images per step of validation and test; results do not depend on it.
        val_size: Images cut from the training set for validation, stratified.
        limit: At most so many images for each of training, validation and test, stratified; None for all.
        split_seed: Of the split and the subsets, apart from the run's seed, so that runs of all seeds share a split.
        one_hot: Give targets as one-hot rows instead of class indices.
        augment: For the training images.
        seed: Of shuffling and augmentation.
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
        augment: Augment,
        seed: int,
    ) -> None:
        super().__init__()
        self.source = source
        self.batch_size = check_int("data.batch_size", batch_size, 1)
        self.eval_batch_size = check_int("data.eval_batch_size", eval_batch_size, 1)
        self.val_size = check_int("data.val_size", val_size, 1)
        self.limit = None if limit is None else check_int("data.limit", limit, len(source.classes))
        self.split_seed = check_int("data.split_seed", split_seed, 0)
        self.num_classes = len(source.classes) if one_hot else None
        self.augment = augment
        self.seed = seed
        self._train: tuple[Tensor, Tensor] | None = None
        self._val: tuple[Tensor, Tensor] | None = None
        self._test: tuple[Tensor, Tensor] | None = None
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
        splits = {"train": self._train, "val": self._val, "test": self._test}
        return {name: len(split[1]) for name, split in splits.items() if split is not None}

    def images(self, split: str) -> Tensor:
        """Return the images of a loaded split, (examples, 3, 32, 32), uint8, as the source gave them."""
        return self._loaded(split)[0]

    def targets(self, split: str) -> Tensor:
        """Return the class indices of a loaded split, (examples,)."""
        return self._loaded(split)[1]

    def normalised(self, split: str, positions: Tensor) -> Iterator[Tensor]:
        """Yield batches of some images of a loaded split, in order, as the network gets them in evaluation."""
        images, targets = self._loaded(split)
        for batch, _ in ArrayLoader(
            images[positions], targets[positions], self.eval_batch_size, mean=self.mean, std=self.std
        ):
            yield batch

    def _loaded(self, split: str) -> tuple[Tensor, Tensor]:
        loaded = {"train": self._train, "val": self._val, "test": self._test}[split]
        assert loaded is not None, "setup() comes first"
        return loaded

    def prepare_data(self) -> None:
        """Fetch or check the files."""
        self.source.prepare()

    def setup(self, stage: str) -> None:
        """Load what a stage needs: `fit` and `validate` the training set and its split, `test` the test set."""
        if stage in ("fit", "validate") and self._train is None:
            images, targets = self.source.train()
            train, val = split_train_val(targets, self.val_size, self.limit, self.split_seed)
            self.split_sha256 = split_hash(train, val)
            self.indices |= {"train": train, "val": val}
            self._train = images[train], targets[train]
            self._val = images[val], targets[val]
        if stage == "test" and self._test is None:
            images, targets = self.source.test()
            chosen = limited(torch.arange(len(targets)), targets, self.limit, self.split_seed)
            self.indices["test"] = chosen
            self._test = images[chosen], targets[chosen]

    def train_dataloader(self) -> ArrayLoader:
        """Return shuffled, augmented batches; a function of the seed and the trainer's epoch."""
        trainer = self.trainer
        assert trainer is not None
        return self._loader(self._train, self.batch_size, self.augment, lambda: trainer.current_epoch)

    def val_dataloader(self) -> ArrayLoader:
        """Return the validation images in order."""
        return self._loader(self._val, self.eval_batch_size)

    def test_dataloader(self) -> ArrayLoader:
        """Return the test images in order."""
        return self._loader(self._test, self.eval_batch_size)

    def _loader(
        self,
        split: tuple[Tensor, Tensor] | None,
        batch_size: int,
        augment: Augment | None = None,
        epoch: Callable[[], int] = lambda: 0,
    ) -> ArrayLoader:
        assert split is not None, "setup() comes first"
        trainer = self.trainer
        return ArrayLoader(
            *split,
            batch_size=batch_size,
            mean=self.mean,
            std=self.std,
            num_classes=self.num_classes,
            augment=augment,
            seed=self.seed,
            epoch=epoch,
            rank=trainer.global_rank if trainer else 0,
            world_size=trainer.world_size if trainer else 1,
        )


def build_source(data: DictConfig) -> Source:
    """Build the source that `data.name` asks for."""
    match check_choice("data.name", data.name, ("cifar10", "folder", "synthetic")):
        case "cifar10":
            return Cifar10(data.root, download=data.download)
        case "folder":
            return ImageFolders(data.root)
        case _:
            return Synthetic(data.train_size, data.test_size)


def build_datamodule(data: DictConfig, augment: Augment, seed: int) -> ImageDataModule:
    """Build the data module of a run from its `data` group."""
    return ImageDataModule(
        source=build_source(data),
        batch_size=data.batch_size,
        eval_batch_size=data.eval_batch_size,
        val_size=data.val_size,
        limit=data.limit,
        split_seed=data.split_seed,
        one_hot=data.one_hot,
        augment=augment,
        seed=seed,
    )
