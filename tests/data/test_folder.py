import logging

import numpy as np
import pytest
import torch
from PIL import Image

from cifar_tl.data.augment import Augment
from cifar_tl.data.batch import IMAGENET_MEAN, IMAGENET_STD
from cifar_tl.data.folder import ImageFolders
from cifar_tl.data.loader import ArrayLoader
from cifar_tl.errors import UserError


def save(path, size=(32, 32), color=(10, 20, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


@pytest.fixture
def root(tmp_path):
    for split in ("train", "test"):
        save(tmp_path / split / "cat" / "1.png")
        save(tmp_path / split / "dog" / "1.png", color=(200, 0, 0))
    return tmp_path


def test_folders_are_classes_and_pixels_are_kept(root):
    source = ImageFolders(root, workers=0)
    images, targets = source.train()
    assert source.classes == ("cat", "dog")
    assert targets.tolist() == [0, 1]
    assert images.shape == (2, 3, 32, 32)
    assert np.array_equal(images[0, :, 5, 5], [10, 20, 30])


def test_other_sizes_are_brought_to_32_and_counted(root, caplog):
    save(root / "train" / "cat" / "2.jpg", size=(100, 60))
    with caplog.at_level(logging.INFO):
        images, _ = ImageFolders(root, workers=0).train()
    assert images.shape == (3, 3, 32, 32)
    assert "1 of 3 images resized to 32x32" in caplog.text


def test_a_broken_image_is_named(root):
    (root / "train" / "cat" / "broken.png").write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"broken\.png is not a readable image"):
        ImageFolders(root, workers=0).train()


def test_missing_folders_and_different_classes_are_refused(root, tmp_path):
    with pytest.raises(UserError, match="at least two class folders"):
        ImageFolders(tmp_path / "nowhere", workers=0)
    save(root / "test" / "bird" / "1.png")
    with pytest.raises(UserError, match="different classes: bird"):
        ImageFolders(root, workers=0)


def test_worker_processes_give_the_same_batches_as_memory(root):
    for i in range(7):
        save(root / "train" / "dog" / f"{i}.png", size=(40, 32), color=(i * 30, i, 0))
    (stored, targets), (lazy, same_targets) = (ImageFolders(root, workers=w).train() for w in (0, 2))
    assert torch.equal(targets, same_targets)
    augment = Augment("random", 2, 0, 0, 0, 0, 0, 0)
    options = {"batch_size": 4, "mean": IMAGENET_MEAN, "std": IMAGENET_STD, "augment": lambda epoch: augment}
    batches = zip(ArrayLoader(stored, targets, **options), ArrayLoader(lazy, targets, **options), strict=True)
    for (images, labels), (same_images, same_labels) in batches:
        assert torch.equal(images, same_images)
        assert torch.equal(labels, same_labels)
    subset = lazy[torch.tensor([3, 1])]
    assert len(subset) == 2
    assert torch.equal(next(subset.read([torch.tensor([1])]))[0], stored[1])
