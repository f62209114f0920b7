"""What setup() refuses, warns of and records before anything is trained."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image

from cifar_tl.build import build_datamodule
from cifar_tl.data.datamodule import CIFAR10DataModule
from cifar_tl.data.folder import ImageFolders
from cifar_tl.data.lazy import LazyImages
from cifar_tl.data.splits import content_hash
from cifar_tl.errors import UserError
from cifar_tl.train import train

DRAW = np.random.default_rng(0)


def write(root, train, test):
    """Class folders with so many images of each class; no two are alike."""
    for split, counts in (("train", train), ("test", test)):
        for name, count in counts.items():
            folder = root / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                Image.fromarray(DRAW.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return root


@pytest.fixture
def fitted(compose):
    """Set up the data of a folder for training."""

    def fitted(root, *overrides):
        cfg = compose("data=folder", f"data.root='{root}'", "data.val_size=3", *overrides)
        datamodule = build_datamodule(cfg)
        datamodule.setup("fit")
        return datamodule

    return fitted


def place(epoch, processes=1, overfit_batches=0):
    """What a data module asks of its Trainer."""
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    return SimpleNamespace(
        current_epoch=epoch,
        world_size=processes,
        global_rank=0,
        strategy=strategy,
        overfit_batches=overfit_batches,
    )


def test_batches_of_a_run_follow_its_seed_epoch_and_phase(compose):
    def epoch(number, *keys):
        """Return its targets, and how many of 40 images are as they are, and as they are or mirrored."""
        data = build_datamodule(compose(*TINY, *keys))
        data.setup("fit")
        data.trainer = place(number)
        images, targets = (torch.cat(parts) for parts in zip(*data.train_dataloader(), strict=True))
        originals = torch.cat(list(data.normalized("train", torch.arange(40))))
        same, mirrored = (
            (images[:, None] == these).flatten(2).all(2).any(1) for these in (originals, originals.flip(3))
        )
        return targets, same.sum().item(), (same | mirrored).sum().item()

    assert len({tuple(epoch(*of)[0].tolist()) for of in ((0,), (1,), (0, "seed=1"))}) == 3
    assert epoch(1, "finetune.frozen_augment=none")[1] == 40
    assert epoch(1)[1] < epoch(1)[2] == 40  # flips alone while frozen
    assert epoch(1, "finetune.frozen_augment=full")[2] < 20
    assert epoch(2)[2] < 20  # shifts, too
    assert epoch(0, "data.one_hot=true")[0].shape == (40, 10)


def test_one_hot_targets_have_the_folders_classes(fitted, tmp_path):
    data = fitted(write(tmp_path, {"a": 5, "b": 5}, {"a": 1, "b": 1}), "data.one_hot=true")
    data.trainer = place(0)
    assert {targets.shape[1] for _, targets in data.train_dataloader()} == {2}


def test_a_batch_that_processes_cannot_share_is_refused(compose):
    data = build_datamodule(compose(*TINY, "data.batch_size=5"))
    data.setup("fit")
    data.trainer = place(0, processes=2)
    with pytest.raises(UserError, match=r"data\.batch_size=5 cannot be shared by 2 processes"):
        data.train_dataloader()


def test_a_class_without_training_images_is_refused_with_names_and_counts(fitted, tmp_path):
    root = write(tmp_path, {"big": 60, "rare1": 1, "rare2": 2}, {"big": 2, "rare1": 1, "rare2": 1})
    with pytest.raises(
        UserError, match=r"data.val_size=32 leaves nothing to train on for 1 of 3 classes: rare1 \(0 of"
    ):
        fitted(root, "data.val_size=32")
    with pytest.raises(UserError, match=r"for 2 of 3 classes: .*; training images in all: 1\. Lower data\.val_size"):
        fitted(root, "data.val_size=62")
    with pytest.raises(
        UserError, match=r"data.val_size=9 with data.limit=5 .*rare1 \(0 of 1, 0 in validation.*data\.limit"
    ):
        fitted(root, "data.val_size=9", "data.limit=5")
    with pytest.raises(UserError, match=r"=9 with data.limit=50 and data.train_limit=5 .*raise data\.train_limit, or"):
        fitted(root, "data.val_size=9", "data.limit=50", "data.train_limit=5")


def test_few_labels_leave_validation_and_test_whole(fitted, tmp_path):
    root = write(tmp_path, {"cat": 20, "dog": 20}, {"cat": 5, "dog": 5})
    assert fitted(root, "data.val_size=8", "data.train_limit=6").sizes == {"train": 6, "val": 8, "test": 10}


@pytest.mark.parametrize(("each", "validate"), [(4, 1), (25, 5)])
def test_of_a_small_folder_a_tenth_validates(fitted, tmp_path, each, validate):
    root = write(tmp_path, {"cat": each, "dog": each}, {"cat": 1, "dog": 1})
    assert fitted(root, "data.val_size=null").sizes == {"train": 2 * each - validate, "val": validate, "test": 2}


def test_of_a_large_folder_500_validate(compose, tmp_path, monkeypatch):
    images, targets = torch.zeros(6000, 3, 32, 32, dtype=torch.uint8), torch.arange(6000) % 2
    monkeypatch.setattr(ImageFolders, "read", lambda self, names: dict.fromkeys(names, (images, targets)))
    root = write(tmp_path, {"cat": 1, "dog": 1}, {"cat": 1, "dog": 1})
    datamodule = build_datamodule(compose("data=folder", f"data.root='{root}'"))
    datamodule.setup("validate")
    assert datamodule.sizes == {"train": 5500, "val": 500}


def test_a_class_without_validation_images_is_warned_of(fitted, tmp_path, caplog):
    root = write(tmp_path, {"big": 60, "rare1": 1, "rare2": 2}, {"big": 2, "rare1": 1, "rare2": 1})
    fitted(root, "data.val_size=9")
    assert "warning: data.val_size=9 leaves no validation image of rare1, rare2" in caplog.text


def test_the_value_that_is_warned_of_is_the_one_that_was_given(fitted, tmp_path, caplog):
    root = write(tmp_path, {"big": 500, "also": 500, "rare": 8}, {"big": 2, "also": 1, "rare": 1})
    fitted(root, "data.val_size=300", "data.limit=80")
    assert "warning: data.val_size=300 with data.limit=80 leaves no validation image of rare" in caplog.text


@pytest.mark.parametrize("workers", [0, 1])
def test_test_images_that_are_training_images_are_counted_with_an_example(fitted, tmp_path, caplog, workers):
    root = write(tmp_path, {"cat": 6, "dog": 6}, {"cat": 3, "dog": 3})
    assert fitted(root).duplicates == {"test": 0, "val": 0, "example": None}
    assert "warning" not in caplog.text
    for name in ("cat", "dog"):
        for number in range(2):
            content = (root / "train" / name / f"{number}.png").read_bytes()
            (root / "test" / name / f"copy{number}.png").write_bytes(content)
    with caplog.at_level(logging.INFO):
        datamodule = fitted(root, f"data.workers={workers}")
    assert datamodule.duplicates == {"test": 4, "val": 0, "example": ["test/cat/copy0.png", "train/cat/0.png"]}
    assert "warning: 4 of 10 test images are training or validation images, too, pixel for pixel" in caplog.text
    assert "(test/cat/copy0.png is train/cat/0.png)" in caplog.text


def test_validation_images_that_are_training_images_are_counted(fitted, tmp_path, caplog):
    root = write(tmp_path, {"cat": 6, "dog": 6}, {"cat": 3, "dog": 3})
    for copy in (root / "train" / "cat").iterdir():
        Image.new("RGB", (32, 32)).save(copy)
    datamodule = fitted(root, "data.val_size=4")
    copies = [name for name in datamodule.indices["val"].tolist() if "cat" in datamodule.source.name("train", name)]
    assert datamodule.duplicates == {"test": 0, "val": len(copies), "example": None}
    assert len(copies) == 2
    assert "warning: 2 of 4 validation images are training images, too, pixel for pixel" in caplog.text


def test_the_splits_hash_covers_images_targets_and_class_names(fitted, tmp_path):
    root = write(tmp_path / "root", {"cat": 6, "dog": 6}, {"cat": 3, "dog": 3})
    first, again, lazy = fitted(root), fitted(root), fitted(root, "data.workers=1")
    assert first.split_sha256 == again.split_sha256 == lazy.split_sha256
    assert first.test_sha256 == again.test_sha256 == lazy.test_sha256
    rows, images = torch.arange(2), [b"a", b"b"]
    hashes = {content_hash(("cat", "dog"), (rows, images, torch.tensor(targets))) for targets in ([0, 1], [1, 0])}
    assert len(hashes) == 2
    for split in ("train", "test"):
        (root / split / "dog").rename(root / split / "elk")
    renamed = fitted(root)
    assert renamed.split_sha256 != first.split_sha256
    assert renamed.test_sha256 != first.test_sha256
    Image.new("RGB", (32, 32)).save(root / "test" / "cat" / "0.png")
    other_test = fitted(root)
    assert other_test.split_sha256 == renamed.split_sha256
    assert other_test.test_sha256 != renamed.test_sha256
    Image.new("RGB", (32, 32), "red").save(root / "train" / "cat" / "0.png")
    assert fitted(root).split_sha256 != renamed.split_sha256


def test_images_are_decoded_as_far_as_they_are_asked_for(fitted, tmp_path, monkeypatch):
    root = write(tmp_path, {"cat": 6, "dog": 6}, {"cat": 3, "dog": 3})
    whole, lazy = fitted(root), fitted(root, "data.workers=1")
    positions = torch.tensor([7, 2])
    expected = whole.images("train")[positions]
    assert torch.equal(whole.images("train", positions), expected)
    read = []
    every = LazyImages.read
    monkeypatch.setattr(LazyImages, "read", lambda self, batches: read.extend(self.files) or every(self, batches))
    assert torch.equal(lazy.images("train", positions), expected)
    assert len(read) == 2
    (batch,) = lazy.normalized("train", positions)
    (same,) = whole.normalized("train", positions)
    assert torch.equal(batch, same)
    assert len(read) == 4


@pytest.mark.parametrize(("device", "pinned"), [("cpu", False), ("cuda", True)])
def test_only_a_run_on_a_gpu_takes_page_locked_memory(fitted, tmp_path, monkeypatch, device, pinned):
    lazy = fitted(write(tmp_path, {"cat": 6, "dog": 6}, {"cat": 3, "dog": 3}), "data.workers=1")
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        "cifar_tl.data.lazy.DataLoader", lambda *of, pin_memory, **options: asked.append(pin_memory) or []
    )
    loader = lazy.in_order("train")
    loader.device = device
    assert list(loader._pixels(torch.arange(9), ())) == []
    assert asked == [pinned]


@pytest.mark.slow
def test_a_run_whose_images_do_not_fit_into_memory_never_has_a_split_there_for_a_picture(
    compose, tmp_path, monkeypatch
):
    root = write(tmp_path / "root", {"cat": 30, "dog": 30}, {"cat": 10, "dog": 10})
    asked = []
    images = CIFAR10DataModule.images
    monkeypatch.setattr(CIFAR10DataModule, "images", lambda *of: asked.append(of[1:]) or images(*of))
    data = ("data=folder", f"data.root='{root}'", "data.val_size=20", "data.workers=1", "data.batch_size=16")
    phases = ("trainer.max_epochs=2", "finetune.unfreeze_at_epoch=1", "finetune.features_folder=null")
    config = compose(*data, *phases, "model.weights=null", "trainer.accelerator=cpu", "logger=tensorboard")
    train(config, tmp_path / "run", "default")
    assert {split for split, *_ in asked} == {"train", "val", "test"}
    assert all(positions for _, *positions in asked)


def test_the_test_set_is_read_once_and_given_out_only_for_testing(fitted, tmp_path):
    datamodule = fitted(write(tmp_path, {"cat": 6, "dog": 6}, {"cat": 3, "dog": 3}))
    assert "test" not in datamodule.splits
    before = datamodule.test_sha256
    for path in (tmp_path / "test").rglob("*.png"):
        path.unlink()
    datamodule.setup("test")
    assert datamodule.sizes == {"train": 9, "val": 3, "test": 6}
    assert datamodule.test_sha256 == before


@pytest.mark.parametrize("before", ["validate", "test"])
def test_what_another_stage_has_read_is_still_checked_before_training(fitted, compose, tmp_path, before):
    root = write(tmp_path, {"cat": 6, "dog": 6, "rare": 1}, {"cat": 3, "dog": 3, "rare": 1})
    datamodule = build_datamodule(compose("data=folder", f"data.root='{root}'", "data.val_size=10"))
    datamodule.setup(before)
    with pytest.raises(UserError, match="nothing to train on"):
        datamodule.setup("fit")
    datamodule = build_datamodule(compose("data=folder", f"data.root='{root}'", "data.val_size=3"))
    datamodule.setup(before)
    datamodule.setup("fit")
    whole = fitted(root)
    assert datamodule.duplicates == whole.duplicates
    assert (datamodule.split_sha256, datamodule.test_sha256) == (whole.split_sha256, whole.test_sha256)


def test_batches_can_be_looked_at_without_a_trainer(compose):
    data = build_datamodule(compose(*TINY))
    data.setup("fit")
    alone = torch.cat([targets for _, targets in data.train_dataloader()])
    data.trainer = place(0)
    assert torch.equal(alone, torch.cat([targets for _, targets in data.train_dataloader()]))


def test_batches_that_are_to_be_overfitted_are_the_same_in_every_epoch(compose):
    def batches(epoch, overfit_batches):
        data = build_datamodule(compose(*TINY))
        data.setup("fit")
        data.trainer = place(epoch, overfit_batches=overfit_batches)
        return torch.cat([images for images, _ in data.train_dataloader()])

    assert torch.equal(batches(0, 2), batches(1, 2))
    assert not torch.equal(batches(0, 0), batches(1, 0))


def test_mixing_is_a_function_of_seed_and_epoch(compose):
    def batches(torchs_seed):
        data = build_datamodule(compose(*TINY, "finetune=full", "augment.mixup=1"))  # the frozen phase mixes nothing
        data.setup("fit")
        torch.manual_seed(torchs_seed)
        drawn = list(data.train_dataloader())
        assert all(targets.ndim == 2 for _, targets in drawn)
        return torch.cat([images for images, _ in drawn]), torch.rand(1)

    (images, after), (again, after_again) = batches(0), batches(1)
    assert torch.equal(images, again)
    assert after != after_again, "the model's own draws have to go on"


def test_images_are_there_beside_cached_features(compose):
    datamodule = build_datamodule(compose(*TINY))
    datamodule.setup("fit")
    datamodule.features["train"] = torch.zeros(1, 40, 5)
    assert {batch.shape[1:] for batch, _ in datamodule.in_order("train")} == {(5,)}
    assert {batch.shape[1:] for batch, _ in datamodule.images_in_order("train")} == {(3, 32, 32)}
