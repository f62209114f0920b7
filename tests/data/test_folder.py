import errno
import logging
import os
import re
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cifar_tl.build import build_datamodule
from cifar_tl.data import folder as class_folders
from cifar_tl.data.augment import Augment
from cifar_tl.data.batch import IMAGENET_MEAN, IMAGENET_STD
from cifar_tl.data.folder import ImageFolders
from cifar_tl.data.loader import ArrayLoader
from cifar_tl.errors import UserError


def save(path, size=(32, 32), color=(10, 20, 30), format=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path, format)


@pytest.fixture
def root(tmp_path):
    for split in ("train", "test"):
        save(tmp_path / split / "cat" / "1.png")
        save(tmp_path / split / "dog" / "1.png", color=(200, 0, 0))
    return tmp_path


def test_folders_are_classes_and_pixels_are_kept(root):
    source = ImageFolders(root, workers=0)
    images, targets = source.read(["train"])["train"]
    assert source.classes == ("cat", "dog")
    assert targets.tolist() == [0, 1]
    assert images.shape == (2, 3, 32, 32)
    assert np.array_equal(images[0, :, 5, 5], [10, 20, 30])


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_a_folder_of_validation_images_is_the_validation_split(root, compose, caplog, name, workers):
    save(root / name / "cat" / "7.png", color=(0, 9, 0))
    save(root / name / "cat" / "8.png", color=(0, 8, 0))
    save(root / name / "dog" / "9.png", color=(0, 0, 9))
    data = build_datamodule(compose("data=folder", f"data.root='{root}'", f"data.workers={workers}"))
    with caplog.at_level("INFO"):
        data.setup("fit")
    assert f"5 images (3 of them in {name}, to validate on)" in caplog.text
    assert (data.sizes["train"], data.sizes["val"]) == (2, 3)
    assert data.targets("val").tolist() == [0, 0, 1]
    assert data.images("val")[:, :, 0, 0].tolist() == [[0, 9, 0], [0, 8, 0], [0, 0, 9]]
    assert data.source.name("train", 4) == f"{name}/dog/9.png"
    save(root / "test" / "cat" / "2.png", color=(0, 9, 0))
    again = build_datamodule(compose("data=folder", f"data.root='{root}'", "data.limit=2"))
    again.setup("fit")
    assert (again.sizes["train"], again.sizes["val"]) == (2, 2)
    assert again.split_sha256 != data.split_sha256


def test_a_folder_of_validation_images_that_does_not_fit_is_refused_by_who_reads_it(root):
    save(root / "val" / "cat" / "1.png")
    ImageFolders(root, workers=0).read(["test"])
    with pytest.raises(UserError, match=r"val needs at least two class folders.*may be in .*val/CLASS"):
        ImageFolders(root, workers=0).read(["train"])
    save(root / "val" / "hen" / "1.png")
    with pytest.raises(UserError, match="train and val have different classes; only in train: dog; only in val: hen"):
        ImageFolders(root, workers=0).read(["train"])
    (root / "val" / "hen").rename(root / "val" / "dog")
    for path in (root / "val").rglob("*.png"):
        path.unlink()
    with pytest.raises(UserError, match=r"val: no images in it"):
        ImageFolders(root, workers=0).read(["train"])
    (root / "valid").mkdir()
    with pytest.raises(UserError, match="has the folders val and valid: keep one of them"):
        ImageFolders(root, workers=0).read(["train"])


def test_validation_images_do_not_stand_for_training_images(root):
    for name in ("cat", "dog"):
        save(root / "val" / name / "9.png", color=(9, 9, 9))
    (root / "train" / "dog" / "1.png").unlink()
    with pytest.raises(UserError, match="train/dog: no images in it"):
        ImageFolders(root, workers=0).read(["train"])


def test_an_image_that_is_replaced_while_a_run_goes_on_ends_it(root):
    images, _ = ImageFolders(root, workers=1).read(["train"])["train"]
    assert len(next(images.read([torch.tensor([0, 1])]))) == 2
    save(root / "train" / "dog" / "1.png", color=(0, 200, 0))
    with pytest.raises(UserError, match=r"dog/1.png is another image than when the run began"):
        next(images.read([torch.tensor([0, 1])]))


def test_other_sizes_are_brought_to_32_and_counted(root, caplog):
    save(root / "train" / "cat" / "2.jpg", size=(100, 60))
    with caplog.at_level(logging.INFO):
        images, _ = ImageFolders(root, workers=0).read(["train"])["train"]
    assert images.shape == (3, 3, 32, 32)
    assert "train: 3 images, 1 resized to 32x32" in caplog.text


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_hidden_or_of_the_system_or_no_regular_file_is_skipped_and_counted(root, caplog, workers):
    save(root / "train" / ".ipynb_checkpoints" / "1-checkpoint.png")
    save(root / "train" / "__MACOSX" / "1.png")
    (root / "train" / "cat" / "._1.png").write_bytes(b"\0\5\x16\7" + bytes(80))  # a resource fork of macOS
    (root / "train" / "cat" / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0")
    os.mkfifo(root / "train" / "dog" / "pipe.png")
    save(root / "train" / "dog" / "folder.png" / "2.png")  # a folder named like an image
    with caplog.at_level(logging.INFO):
        source = ImageFolders(root, workers)
        _, targets = source.read(["train"])["train"]
    assert source.classes == ("cat", "dog")
    assert targets.tolist() == [0, 1, 1]
    assert source.name("train", 2) == "train/dog/folder.png/2.png"
    assert "skipped    5 entries: hidden 2, of the system 2, no regular file 1" in caplog.text


def test_images_are_told_by_content_and_what_is_none_is_left_out_and_counted(root, caplog):
    for name, format in (("x.jfif", "JPEG"), ("no ending", "PNG"), ("y.pgm", "PPM"), ("notes.jpg.txt", "GIF")):
        save(root / "train" / "dog" / name, format=format)
    (root / "train" / "dog" / "labels.txt").write_text("dog")
    (root / "train" / "cat" / "list.txt").write_text("cat")
    (root / "train" / "cat" / "photo.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(30))
    (root / "train" / "classes.csv").write_text("cat,dog")
    with caplog.at_level(logging.INFO):
        _, targets = ImageFolders(root, workers=0).read(["train"])["train"]
    assert targets.tolist() == [0, 1, 1, 1, 1, 1]
    assert "left out   4 files without an image in them: .txt 2, HEIC 1, beside the class folders 1" in caplog.text


def test_what_was_done_to_images_is_counted(root, caplog):
    Image.new("RGBA", (32, 32), (9, 9, 9, 0)).save(root / "train" / "cat" / "clear.png")
    frames = [Image.new("RGB", (32, 32), color) for color in ("red", "blue")]
    for name in ("a.gif", "b.gif"):
        frames[0].save(root / "train" / "dog" / name, save_all=True, append_images=frames[1:])
    for brightest in (3000, 3001, 3002):
        Image.fromarray(np.full((32, 32), brightest, dtype=np.uint16)).save(root / "train" / "cat" / f"{brightest}.png")
    for workers in (0, 1):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            ImageFolders(root, workers).read(["train"])
        grey, frames = "grey taken for 12-bit scaled to 8 bits 3", "first frame of several 2"
        assert f"noted      {grey}, {frames}, transparency over white 1\n" in caplog.text


@pytest.mark.parametrize("place", ["train", "val"])
def test_a_folder_that_may_not_be_read_is_named_with_its_key(root, monkeypatch, place):
    shutil.copytree(root / "test", root / "val")
    iterdir = Path.iterdir

    def refusing(path):
        if path == root / place:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return iterdir(path)

    monkeypatch.setattr(Path, "iterdir", refusing)
    with pytest.raises(
        UserError, match=rf"data\.root={root} cannot be read: {root / place}: Permission denied\. Give a folder"
    ):
        ImageFolders(root, workers=0).read(["train"])


def test_a_folder_that_may_not_be_read_any_more_is_named_with_its_key(root, monkeypatch):
    source, scandir = ImageFolders(root, workers=0), os.scandir

    def refusing(path):
        if path == root / "train":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(UserError, match=rf"data\.root={root} cannot be read: {root / 'train'}: Permission denied"):
        source.read(["train"])


def test_grey_tiffs_that_seem_to_use_different_bits_are_named(root, caplog):
    for number, brightest in enumerate((1000, 1000, 4000)):
        values = np.full((32, 32), 500, dtype=np.uint16)
        values[0, 0] = brightest
        Image.fromarray(values).save(root / "train" / "cat" / f"{number}.tif")
        if number == 1:
            ImageFolders(root, workers=0).read(["train"])
            assert "brightest" not in caplog.text
    for workers in (0, 1):
        caplog.clear()
        ImageFolders(root, workers=workers).read(["train"])
        assert "each one's brightest pixel was taken as a sign (10-bit 2, 12-bit 1)" in caplog.text


def test_links_are_followed_and_loops_end(root, caplog):
    save(root / "elsewhere" / "2.png")
    (root / "train" / "dog" / "linked").symlink_to(root / "elsewhere")
    (root / "elsewhere" / "back").symlink_to(root / "train" / "dog")
    (root / "train" / "dog" / "3.png").symlink_to(root / "elsewhere" / "2.png")
    with caplog.at_level(logging.INFO):
        source = ImageFolders(root, workers=0)
        _, targets = source.read(["train"])["train"]
    assert targets.tolist() == [0, 1, 1, 1]
    assert [source.name("train", at) for at in (1, 2, 3)] == [
        f"train/dog/{n}" for n in ("1.png", "3.png", "linked/2.png")
    ]
    assert "skipped    1 entry: link to a folder met before 1" in caplog.text


@pytest.mark.parametrize("workers", [0, 2])
def test_everything_wrong_with_both_splits_is_named_at_once(root, workers):
    save(root / "train" / "owl" / "1.png")
    (root / "train" / "cat" / "text.png").write_text("no image")
    (root / "train" / "cat" / "empty.jpg").write_bytes(b"")
    (root / "train" / "cat" / "dangling.png").symlink_to(root / "nowhere")
    (root / "test" / "owl").mkdir()
    (root / "test" / "owl" / "notes.txt").write_text("nothing yet")
    save(root / "test" / "dog" / "cut.png", size=(200, 200))
    (root / "test" / "dog" / "cut.png").write_bytes((root / "test" / "dog" / "cut.png").read_bytes()[:120])
    with pytest.raises(UserError) as raised:
        ImageFolders(root, workers).read(["train", "test"])
    first, *lines, advice = str(raised.value).splitlines()
    assert first.endswith("cannot be used as it is:")
    assert [line.split(":")[0] for line in lines] == [
        f"  {path}"
        for path in (
            *("test/dog/cut.png", "test/owl"),
            *("train/cat/dangling.png", "train/cat/empty.jpg", "train/cat/text.png"),
        )
    ]
    assert lines[1].endswith("no images in it (.txt 1)")
    assert lines[2].endswith("cannot be read: No such file or directory")
    assert lines[3].endswith("empty: 0 bytes")
    assert "no image: its content is none of PNG, JPEG" in lines[4]
    assert advice.startswith("Replace or remove")


def test_a_folder_that_cannot_be_listed_is_not_called_empty(root, monkeypatch):
    scandir = os.scandir

    def refusing(path):
        if path == root / "train" / "cat":
            raise PermissionError(errno.EACCES, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(UserError, match=r"train/cat: folder cannot be listed: Permission denied\n"):
        ImageFolders(root, workers=0).read(["train"])


def test_a_link_that_cannot_be_followed_is_one_problem_among_others(root):
    (root / "train" / "cat" / "link.png").symlink_to("x" * 300)  # longer than names can be
    (root / "train" / "dog" / "empty.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"cat/link\.png: cannot be read: File name too long\n  train/dog/empty\.jpg: "):
        ImageFolders(root, workers=0).read(["train"])


def test_a_class_whose_name_is_not_utf_8_is_refused(root):
    for split in ("train", "test"):
        (root / split / os.fsdecode(b"caf\xe9")).mkdir()
    with pytest.raises(UserError, match=re.escape(r"whose name is not UTF-8, b'caf\xe9': rename it")):
        ImageFolders(root, workers=0)


def test_missing_folders_are_refused(root, tmp_path):
    with pytest.raises(UserError, match=r"nowhere: no such folder\. .*at least two class folders"):
        ImageFolders(tmp_path / "nowhere", workers=0)
    (tmp_path / "other" / "images").mkdir(parents=True)
    with pytest.raises(UserError, match=r"has no folder train and no folder test\. Its folders are: images\."):
        ImageFolders(tmp_path / "other", workers=0)
    save(tmp_path / "one" / "train" / "cat" / "1.png")
    with pytest.raises(UserError, match=r"needs at least two class folders of images, has 1 \(cat\)"):
        ImageFolders(tmp_path / "one", workers=0)


def test_different_classes_are_refused_with_what_is_where(root):
    save(root / "test" / "bird" / "1.png")
    save(root / "train" / "Bird" / "1.png")
    with pytest.raises(
        UserError, match="train and test have different classes; only in train: Bird; only in test: bird"
    ):
        ImageFolders(root, workers=0)


def test_class_names_are_compared_after_unicode_normalization(root):
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    assert composed != decomposed
    save(root / "train" / decomposed / "1.png")
    save(root / "test" / composed / "1.png")
    source = ImageFolders(root, workers=0)
    assert source.classes == (composed, "cat", "dog")
    assert len(source.read(["train"])["train"][1]) == len(source.read(["test"])["test"][1]) == 3
    save(root / "train" / composed / "2.png")
    with pytest.raises(UserError, match="has the class café twice"):
        ImageFolders(root, workers=0)


def test_a_split_may_be_missing_until_it_is_read(root):
    shutil.rmtree(root / "train")
    source = ImageFolders(root, workers=0)
    assert source.classes == ("cat", "dog")
    assert len(source.read(["test"])["test"][1]) == 2
    with pytest.raises(UserError, match=r"has no folder train\. Its folders are: test\."):
        source.read(["train", "test"])


def test_a_root_at_the_wrong_level_is_recognized(root):
    for folder, said in (
        (root / "train", f"is one level too deep: give data.root={root}."),
        (root / "train" / "cat", f"is two levels too deep: give data.root={root}."),
    ):
        with pytest.raises(UserError, match=re.escape(said)):
            ImageFolders(folder, workers=0)
    (root / "above").mkdir()
    for split in ("train", "test"):
        (root / split).rename(root / "above" / split)
    with pytest.raises(UserError, match=re.escape(f"is one level too high: give data.root={root / 'above'}.")):
        ImageFolders(root, workers=0)


def test_an_image_that_breaks_during_a_run_is_named_without_a_traceback(root):
    images, _ = ImageFolders(root, workers=1).read(["train"])["train"]
    (root / "train" / "dog" / "1.png").write_bytes(b"broken meanwhile")
    with pytest.raises(UserError, match=r"dog/1\.png was a readable image when the run began") as raised:
        next(images.read([torch.tensor([0, 1])]))
    assert "Traceback" not in str(raised.value)


def test_worker_processes_give_the_same_batches_as_memory(root):
    for i in range(7):
        save(root / "train" / "dog" / f"{i}.png", size=(40, 32), color=(i * 30, i, 0))
    (stored, targets), (lazy, same_targets) = (ImageFolders(root, workers=w).read(["train"])["train"] for w in (0, 2))
    assert torch.equal(targets, same_targets)
    augment = Augment("random", crop_padding=2)
    options = {"batch_size": 4, "mean": IMAGENET_MEAN, "std": IMAGENET_STD, "augment": lambda epoch: augment}
    batches = zip(ArrayLoader(stored, targets, **options), ArrayLoader(lazy, targets, **options), strict=True)
    for (images, labels), (same_images, same_labels) in batches:
        assert torch.equal(images, same_images)
        assert torch.equal(labels, same_labels)
    before = torch.get_rng_state()
    subset = lazy[torch.tensor([3, 1])]
    assert len(subset) == 2
    assert torch.equal(next(subset.read([torch.tensor([1])]))[0], stored[1])
    assert torch.equal(torch.get_rng_state(), before)  # a resumed run reads at other times, and draws the same numbers


def test_an_image_that_memory_has_no_room_for_is_named_as_such(monkeypatch, tmp_path):
    def full(file):
        raise MemoryError

    monkeypatch.setattr(class_folders, "decode", full)
    (tmp_path / "x.png").touch()
    assert class_folders.read(tmp_path / "x.png").problem == "too large for the memory of this machine"


def test_files_of_several_rounds_of_checks_are_each_read_once(monkeypatch, tmp_path):
    for name, count in (("a", 5), ("b", 2)):
        (tmp_path / "train" / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (32, 32), (i, 0, 0)).save(tmp_path / "train" / name / f"{i}.png")
    monkeypatch.setattr(class_folders, "CHECKED_AT_ONCE", 2)
    images, targets = ImageFolders(tmp_path, workers=1).read(["train"])["train"]
    assert targets.tolist() == [0] * 5 + [1] * 2
    assert len(set(images.digests)) == 5
