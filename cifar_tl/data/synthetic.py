"""Generated images of ten classes: learnable, offline, in a second. For the demo and the tests."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from cifar_tl.errors import check_int


class Synthetic:
    """Gratings on 32x32: a class is an orientation and a tint, an example has its own phase, contrast and noise.

    Args:
        train_size: Images in the training set, before validation is cut from it.
        test_size: Images in the test set.
    """

    own_val = 0
    classes = tuple(f"{angle} degrees" for angle in range(0, 180, 18))

    def __init__(self, train_size: int, test_size: int) -> None:
        self.train_size = check_int("data.train_size", train_size, len(self.classes))
        self.test_size = check_int("data.test_size", test_size, len(self.classes))

    def prepare(self) -> None:
        """Do nothing: images are generated when they are asked for."""

    def train(self) -> tuple[Tensor, Tensor]:
        """Return images (train_size, 3, 32, 32), uint8, and targets (train_size,), int64."""
        return self._generate(self.train_size, seed=0)

    def test(self) -> tuple[Tensor, Tensor]:
        """Return images (test_size, 3, 32, 32), uint8, and targets (test_size,), int64."""
        return self._generate(self.test_size, seed=1)

    def read(self, splits: Sequence[str]) -> dict[str, tuple[Tensor, Tensor]]:
        """Return `train`, `test` or both, by name."""
        return {split: self.train() if split == "train" else self.test() for split in splits}

    def name(self, split: str, index: int) -> str:
        """Return what people call an image."""
        return f"{split} image {index}"

    def _generate(self, size: int, seed: int) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng(seed)
        targets = np.arange(size) % len(self.classes)
        angle = np.pi * targets / len(self.classes)
        rows, columns = np.mgrid[0:32, 0:32]
        along = np.cos(angle)[:, None, None] * columns + np.sin(angle)[:, None, None] * rows
        phase = rng.uniform(0, 2 * np.pi, (size, 1, 1))
        grating = rng.uniform(30, 60, (size, 1, 1)) * np.sin(2 * np.pi * along / 8 + phase)
        tint = 25 * np.cos(2 * angle[:, None] + np.array([0, 2, 4]) * np.pi / 3)
        noise = rng.normal(0, 20, (size, 3, 32, 32))
        images = 128 + tint[:, :, None, None] + grating[:, None] + noise
        return torch.from_numpy(images.clip(0, 255).astype(np.uint8)), torch.from_numpy(targets)
