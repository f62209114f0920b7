"""CIFAR-10 as two pairs of tensors, checked byte for byte against the official MD5s."""

import pickle
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from cifar_tl.data import download


class Cifar10:
    """The official 50,000 training and 10,000 test images, in torchvision's order.

    Args:
        root: the folder that holds `cifar-10-batches-py` or the archive; see `cifar_tl.data.download`.
        download: whether `prepare` may use the network.
    """

    own_val = 0
    classes: tuple[str, ...] = (
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    )

    def __init__(self, root: str | Path, download: bool) -> None:
        self.root = Path(root)
        self.download = download

    def prepare(self) -> None:
        """Make sure that every file is there and right, the test batch included, before anything is trained.

        Raises:
            UserError: see `download.ensure`.
        """
        download.ensure(self.root, self.download)

    def train(self) -> tuple[Tensor, Tensor]:
        """Load the training images.

        Returns:
            Images, (50000, 3, 32, 32), uint8, RGB, and labels, (50000,), int64, indices into `classes`.

        Raises:
            UserError: a file is missing or not the official one.
        """
        return self._load([f"data_batch_{number}" for number in range(1, 6)])

    def test(self) -> tuple[Tensor, Tensor]:
        """Load the test images.

        Returns:
            Images, (10000, 3, 32, 32), uint8, RGB, and labels, (10000,), int64, indices into `classes`.

        Raises:
            UserError: the file is missing or not the official one.
        """
        return self._load(["test_batch"])

    def read(self, splits: Sequence[str]) -> dict[str, tuple[Tensor, Tensor]]:
        """Return `train`, `test` or both, by name."""
        return {split: self.train() if split == "train" else self.test() for split in splits}

    def name(self, split: str, index: int) -> str:
        """Return what people call an image."""
        return f"{split} image {index}"

    def _load(self, names: list[str]) -> tuple[Tensor, Tensor]:
        images, labels = [], []
        for name in names:
            # A pickle can run code. These bytes have the official MD5, so they are the official, harmless pickle.
            batch = pickle.loads(download.read_checked(self.root, name), encoding="latin1")
            images.append(torch.from_numpy(batch["data"]).reshape(-1, 3, 32, 32))
            labels.append(torch.tensor(batch["labels"], dtype=torch.int64))
        return torch.cat(images), torch.cat(labels)
