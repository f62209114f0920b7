from itertools import chain

import torch
from torchvision.transforms.v2 import functional as F

from cifar_tl.data.augment import Augment
from cifar_tl.data.loader import ArrayLoader
from cifar_tl.data.splits import stream

IMAGES = torch.randint(0, 256, (50, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
TARGETS = torch.arange(50)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def loader(**options):
    return ArrayLoader(IMAGES, TARGETS, batch_size=16, mean=MEAN, std=STD, **options)


def order(**options):
    return torch.cat([targets for _, targets in loader(**options)]).tolist()


def test_images_are_normalised_as_torchvision_does():
    batch, _ = next(iter(loader()))
    expected = F.normalize(IMAGES[:16].float() / 255, list(MEAN), list(STD))
    torch.testing.assert_close(batch, expected)


def test_evaluation_keeps_the_order_and_every_image():
    assert order() == list(range(50))
    assert len(loader()) == 4


def test_training_order_is_a_function_of_seed_and_epoch():
    training = {"augment": Augment(flip=False, crop_padding=0)}
    first = order(**training, seed=0, epoch=lambda: 0)
    assert sorted(first) == list(range(50)) != first
    assert first == order(**training, seed=0, epoch=lambda: 0)
    assert first != order(**training, seed=0, epoch=lambda: 1)
    assert first != order(**training, seed=1, epoch=lambda: 0)


def test_ranks_share_an_epoch_without_overlap():
    shares = [order(rank=r, world_size=3) for r in range(3)]
    assert sorted(chain(*shares)) == list(range(50))
    training = [order(augment=Augment(False, 0), rank=r, world_size=3) for r in range(3)]
    assert [len(share) for share in training] == [16, 16, 16]
    assert len(set(chain(*training))) == 48


def test_one_hot_targets_are_available():
    _, targets = next(iter(ArrayLoader(IMAGES, TARGETS % 10, 4, MEAN, STD, num_classes=10)))
    assert targets.shape == (4, 10)
    assert targets.argmax(1).tolist() == [0, 1, 2, 3]
    assert targets.sum().item() == 4


def test_flip_mirrors_about_half_and_nothing_else():
    flipped = Augment(flip=True, crop_padding=0)(IMAGES, stream(0))
    mirrored = (flipped == IMAGES.flip(3)).flatten(1).all(1)
    kept = (flipped == IMAGES).flatten(1).all(1)
    assert (mirrored | kept).all()
    assert 15 <= mirrored.sum() <= 35


def test_crop_shifts_each_image_by_its_own_draw_and_reflects():
    padding = 4
    cropped = Augment(flip=False, crop_padding=padding)(IMAGES, stream(0))
    padded = F.pad(IMAGES, [padding] * 4, padding_mode="reflect")
    found = set()
    for image, source in zip(cropped, padded, strict=True):
        shifts = [
            (y, x)
            for y in range(2 * padding + 1)
            for x in range(2 * padding + 1)
            if torch.equal(image, source[:, y : y + 32, x : x + 32])
        ]
        assert len(shifts) == 1
        found.add(shifts[0])
    assert len(found) > 20


def test_no_augmentation_gives_images_as_they_are():
    assert Augment(flip=False, crop_padding=0)(IMAGES, stream(0)) is IMAGES
