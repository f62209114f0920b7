"""CIFAR-10 as tensors: a small made-up copy for the checks, the real one for equality with torchvision."""

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

from cifar_tl.data import download
from cifar_tl.data.cifar10 import Cifar10
from cifar_tl.errors import UserError


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A root whose batches hold four images each, with the constants set to them."""
    folder = tmp_path / download.FOLDER
    folder.mkdir()
    spec = {}
    for number, name in enumerate(download.FILES):
        pixels = np.arange(4 * 3072, dtype=np.int64).reshape(4, 3072) // 1024 % 3 + 10 * number
        data = pickle.dumps({"data": pixels.astype(np.uint8), "labels": [number, 0, 1, 2]}, protocol=2)
        (folder / name).write_bytes(data)
        spec[name] = (len(data), hashlib.md5(data).hexdigest())
    monkeypatch.setattr(download, "FILES", spec)
    return tmp_path


def test_batches_are_joined_in_order_with_channels_first(small: Path) -> None:
    images, labels = Cifar10(small, download=False).train()
    assert images.shape == (20, 3, 32, 32)
    assert images.dtype == torch.uint8
    assert labels.dtype == torch.int64
    assert labels[::4].tolist() == [0, 1, 2, 3, 4]
    assert images[4].float().mean(dim=(1, 2)).tolist() == [10, 11, 12]


def test_test_images_come_from_the_test_batch(small: Path) -> None:
    images, labels = Cifar10(small, download=False).test()
    assert images.shape == (4, 3, 32, 32)
    assert labels.tolist() == [5, 0, 1, 2]


def test_prepare_finds_a_wrong_test_batch_before_training(small: Path) -> None:
    data = Cifar10(small, download=False)
    data.prepare()
    path = small / download.FOLDER / "test_batch"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="test_batch is altered"):
        data.prepare()


def test_a_pickle_without_the_official_md5_is_never_loaded(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = small / download.FOLDER / "data_batch_1"
    size = path.stat().st_size
    path.write_bytes(b"cos\nabort\n(tR.".ljust(size, b"x"))  # unpickling it would end this process
    monkeypatch.setattr(download, "ensure", lambda *args: None)
    with pytest.raises(UserError, match="data_batch_1 is altered"):
        Cifar10(small, download=False).train()


@pytest.mark.parametrize("train", [True, False])
def test_real_data_equals_torchvision(shared: Path, train: bool) -> None:
    data = Cifar10(shared / "data", download=False)
    data.prepare()
    images, labels = data.train() if train else data.test()
    reference = torchvision.datasets.CIFAR10(str(shared / "data"), train=train, download=False)
    assert torch.equal(images, torch.from_numpy(reference.data).permute(0, 3, 1, 2))
    assert labels.tolist() == reference.targets
    assert list(data.classes) == reference.classes
