"""Class folders of images, `train/CLASS/*` and `test/CLASS/*`, brought to 32x32."""

import logging
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cifar_tl.data.decode import SIZE, Decoded, UnreadableImage, decode
from cifar_tl.data.lazy import LazyImages
from cifar_tl.errors import UserError, check_int

log = logging.getLogger(__name__)

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".tif", ".tiff", ".gif"}


class ImageFolders:
    """A folder of images in torchvision's ImageFolder layout, once for training and once for testing.

    Images that are not 32x32 are resized to it (bicubic), and how many is logged.

    Args:
        root: Has `train` and `test`, each with one folder per class.
        workers: 0 reads all images into memory (3 KB each); otherwise so many processes decode them in every epoch.
    """

    def __init__(self, root: str | Path, workers: int) -> None:
        self.root = Path(root)
        self.workers = check_int("data.workers", workers, 0)
        self.classes = self._classes("train")
        if (test := self._classes("test")) != self.classes:
            differing = sorted(set(test) ^ set(self.classes))
            raise UserError(f"{self.root}: train and test have different classes: {', '.join(differing)}.")

    def _classes(self, split: str) -> tuple[str, ...]:
        folder = self.root / split
        names = sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
        if len(names) < 2:
            raise UserError(
                f"data=folder data.root={self.root}: {folder} needs at least two class folders of images, "
                f"has {len(names)}. Lay images out as {self.root}/train/CLASS/*.png and {self.root}/test/CLASS/*.png."
            )
        return tuple(names)

    def prepare(self) -> None:
        """Do nothing: files are read when the split is."""

    def train(self) -> tuple[Tensor | LazyImages, Tensor]:
        """Return images (examples, 3, 32, 32), uint8, and targets (examples,), int64."""
        return self._read("train")

    def test(self) -> tuple[Tensor | LazyImages, Tensor]:
        """Return images (examples, 3, 32, 32), uint8, and targets (examples,), int64."""
        return self._read("test")

    def _read(self, split: str) -> tuple[Tensor | LazyImages, Tensor]:
        files: list[Path] = []
        targets: list[int] = []
        for label, name in enumerate(self.classes):
            folder = self.root / split / name
            found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
            if not found:
                raise UserError(f"{folder} has no images ({', '.join(sorted(SUFFIXES))}). Add some or remove it.")
            files += found
            targets += [label] * len(found)
        if self.workers:
            return LazyImages(files, read_pixels, self.workers), torch.tensor(targets)
        images = np.empty((len(files), 3, SIZE, SIZE), dtype=np.uint8)
        resized = 0
        for image, path in zip(images, files, strict=True):
            decoded = read(path)
            image[:] = decoded.pixels
            resized += decoded.resized
        if resized:
            log.info("%s: %d of %d images resized to %dx%d", self.root / split, resized, len(images), SIZE, SIZE)
        return torch.from_numpy(images), torch.tensor(targets)


def read(path: Path) -> Decoded:
    """Decode an image file.

    Raises:
        UserError: It is no image, or a broken one.
    """
    try:
        return decode(path)
    except UnreadableImage as error:
        raise UserError(f"{path} is not a readable image ({error}). Replace or remove it.") from error


def read_pixels(path: Path) -> NDArray[np.uint8]:
    """Return the image of a file, (3, 32, 32), uint8."""
    return read(path).pixels
