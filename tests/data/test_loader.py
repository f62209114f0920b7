from dataclasses import replace
from itertools import chain

import pytest
import torch
from torchvision.transforms.v2 import functional as F

from cifar_tl.data.augment import Augment
from cifar_tl.data.loader import ArrayLoader, _mix

IMAGES = torch.randint(0, 256, (50, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
TARGETS = torch.arange(50)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


NOTHING = Augment()


def loader(**options):
    return ArrayLoader(IMAGES, TARGETS, batch_size=16, mean=MEAN, std=STD, **options)


def order(**options):
    return torch.cat([targets for _, targets in loader(**options)]).tolist()


def test_images_are_normalized_as_torchvision_does():
    batch, _ = next(iter(loader()))
    expected = F.normalize(IMAGES[:16].float() / 255, list(MEAN), list(STD))
    torch.testing.assert_close(batch, expected)


def test_evaluation_keeps_the_order_and_every_image():
    assert order() == list(range(50))
    assert len(loader()) == 4


def test_training_order_is_a_function_of_seed_and_epoch():
    training = {"augment": lambda epoch: NOTHING}
    first = order(**training, seed=0, epoch=lambda: 0)
    assert sorted(first) == list(range(50)) != first
    assert first == order(**training, seed=0, epoch=lambda: 0)
    assert first != order(**training, seed=0, epoch=lambda: 1)
    assert first != order(**training, seed=1, epoch=lambda: 0)


def test_ranks_share_an_epoch_without_overlap():
    shares = [order(rank=r, world_size=3) for r in range(3)]
    assert sorted(chain(*shares)) == list(range(50))
    training = [order(augment=lambda epoch: NOTHING, rank=r, world_size=3) for r in range(3)]
    assert [len(share) for share in training] == [16, 16, 16]
    assert len(set(chain(*training))) == 48


def test_a_single_image_is_no_training_batch_of_its_own():
    flips = replace(NOTHING, flip="random")
    training = ArrayLoader(IMAGES[:49], TARGETS[:49], 16, MEAN, STD, augment=lambda epoch: flips)
    batches = [targets for _, targets in training]
    assert [len(batch) for batch in batches] == [16, 16, 17]
    assert len(training) == 3
    assert sorted(torch.cat(batches).tolist()) == list(range(49))
    assert [len(targets) for _, targets in ArrayLoader(IMAGES[:49], TARGETS[:49], 16, MEAN, STD)] == [16, 16, 16, 1]


@pytest.mark.parametrize("images", [45_000, 512, 513, 514, 515, 769])
def test_several_processes_take_as_many_steps_as_one(images):
    def steps(processes):
        training = {"augment": lambda epoch: NOTHING, "world_size": processes}
        targets = torch.zeros(images, dtype=torch.int64)
        return {
            len(ArrayLoader(IMAGES, targets, 256 // processes, MEAN, STD, rank=r, **training)) for r in range(processes)
        }

    assert steps(2) == steps(1)


def test_one_hot_targets_are_available():
    _, targets = next(iter(ArrayLoader(IMAGES, TARGETS % 10, 4, MEAN, STD, one_hot_targets=True)))
    assert targets.shape == (4, 10)
    assert targets.argmax(1).tolist() == [0, 1, 2, 3]
    assert targets.sum().item() == 4


def test_cached_features_come_with_the_same_targets_and_flips_as_images():
    # features that say which image they are of, and in which view
    features = torch.stack([torch.arange(50.0), -torch.arange(50.0)]).unsqueeze(2)
    training = {"augment": lambda epoch: replace(NOTHING, flip="random"), "epoch": lambda: 3}
    images = list(loader(**training))
    cached = list(loader(**training, features=lambda: features))
    for (pixels, targets), (values, same_targets) in zip(images, cached, strict=True):
        assert torch.equal(targets, same_targets)
        kept, _ = next(iter(ArrayLoader(IMAGES[targets], targets, len(targets), MEAN, STD)))
        mirrored = (pixels == kept.flip(3)).flatten(1).all(1)
        assert torch.equal(values.flatten(), torch.where(mirrored, -1.0, 1.0) * targets)
    assert len({v.item() > 0 for values, _ in cached for v in values if v}) == 2  # both views were met


def test_the_teacher_has_seen_the_view_that_the_student_sees():
    seen = torch.stack([torch.arange(50.0), -torch.arange(50.0)]).unsqueeze(2)
    augment = replace(NOTHING, flip="random", crop_padding=4)
    draws = augment.draw(torch.arange(50), 50, 0, 3)
    batches = list(loader(augment=lambda epoch: augment, epoch=lambda: 3, teacher=lambda: seen))
    for _, targets, taught in batches:
        assert torch.equal(taught.flatten(), torch.where(draws["mirrored"][targets], -1.0, 1.0) * targets)
    assert len({v.item() > 0 for *_, taught in batches for v in taught if v}) == 2
    for (images, targets), (same_images, same_targets, _) in zip(
        loader(augment=lambda epoch: augment, epoch=lambda: 3), batches, strict=True
    ):
        assert torch.equal(images, same_images)
        assert torch.equal(targets, same_targets)


def test_evaluation_and_cached_features_have_no_teacher():
    seen = torch.zeros(1, 50, 1)
    assert {len(batch) for batch in loader(teacher=lambda: seen)} == {2}
    cached = loader(augment=lambda epoch: NOTHING, features=lambda: seen, teacher=lambda: seen)
    assert {len(batch) for batch in cached} == {2}


@pytest.mark.parametrize("mix", [{"mixup": 1.0}, {"cutmix": 1.0}, {"mixup": 1.0, "cutmix": 1.0}])
def test_what_the_teacher_has_seen_is_mixed_as_the_images_are(mix):
    seen = torch.randn(1, 50, 8)
    augment = {"augment": lambda epoch: replace(NOTHING, **mix), "classes": 50}
    for (images, targets), (same_images, same_targets, taught) in zip(
        loader(**augment), loader(**augment, teacher=lambda: seen), strict=True
    ):
        assert torch.equal(images, same_images)
        assert torch.equal(targets, same_targets)
        torch.testing.assert_close(taught, targets @ seen[0])  # each image is a class of its own


@pytest.mark.parametrize("mix", ["mixup", "cutmix"])
def test_mixing_gives_targets_that_are_shares(mix):
    torch.manual_seed(0)
    augment = replace(NOTHING, **{mix: 1.0})
    mixed = ArrayLoader(IMAGES, TARGETS % 10, 50, MEAN, STD, augment=lambda epoch: augment)
    images, targets = next(iter(mixed))
    assert images.shape == (50, 3, 32, 32)
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(50))
    assert ((targets > 0).sum(dim=1) == 2).any()


@pytest.mark.parametrize("mix", ["mixup", "cutmix"])
def test_mixed_images_are_made_of_both_as_their_targets_are(mix):
    torch.manual_seed(0)
    kept, classes = next(iter(ArrayLoader(IMAGES, TARGETS, 50, MEAN, STD, augment=lambda epoch: NOTHING, classes=50)))
    augment = replace(NOTHING, **{mix: 1.0})
    mixed = ArrayLoader(IMAGES, TARGETS, 50, MEAN, STD, augment=lambda epoch: augment, classes=50)
    images, targets = next(iter(mixed))
    other = kept.roll(1, 0)
    share = targets[torch.arange(50), classes]
    torch.testing.assert_close(targets[torch.arange(50), classes.roll(1)], 1 - share)
    assert 0.01 < share[0] < 0.99
    if mix == "mixup":
        torch.testing.assert_close(images, share[0] * kept + (1 - share[0]) * other)
    else:
        own = (images == kept).all(1)
        assert ((images == other).all(1) | own).all()
        assert own.float().mean().item() == pytest.approx(share[0].item(), abs=0.01)


def test_an_epoch_takes_the_augmentation_of_its_phase():
    phases = {"augment": lambda epoch: replace(NOTHING, flip="none" if epoch < 2 else "random")}
    plain = torch.cat([images for images, _ in loader()])

    def unchanged(epoch):
        batches = loader(**phases, epoch=lambda: epoch)
        return [torch.equal(x, plain[t]) for images, targets in batches for x, t in zip(images, targets, strict=True)]

    assert all(unchanged(1))
    assert not all(unchanged(2))


def test_each_way_of_mixing_has_its_own_alpha():
    augment = Augment(mixup=0.2, cutmix=0.5)
    assert [mix.alpha for mix in _mix(augment, 10).transforms] == [0.2, 0.5]


@pytest.mark.parametrize("alpha", ["mixup", "cutmix"])
def test_alpha_may_be_an_integer(alpha):
    augment = replace(NOTHING, **{alpha: 1})
    assert all(targets.ndim == 2 for _, targets in loader(augment=lambda epoch: augment, classes=50))


def test_mixup_has_a_share_of_its_own_for_each_batch_of_each_epoch():
    images, targets = torch.zeros(64, 3, 32, 32, dtype=torch.uint8), torch.arange(64)

    def shares(epoch):
        mixing = {"augment": lambda epoch: replace(NOTHING, mixup=1.0), "epoch": lambda: epoch}
        batches = ArrayLoader(images, targets, 16, (0.5,) * 3, (0.2,) * 3, classes=64, **mixing)
        return [round(mixed[0].max().item(), 4) for _, mixed in batches]

    assert len({*shares(0), *shares(1)}) == 8
