import math
from dataclasses import replace

import pytest
import torch
from torchvision.transforms.v2 import functional as F

from cifar_tl.data import augment as augment_module
from cifar_tl.data import transforms
from cifar_tl.data.augment import Augment
from cifar_tl.data.loader import SHUFFLE
from cifar_tl.data.splits import make_generator

IMAGES = torch.randint(0, 256, (50, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
ALL = torch.arange(50)
BLANK = torch.full((3, 1, 1), 7.0)
NOTHING = Augment()


def apply(augment, seed=0, epoch=0):
    return augment.apply(IMAGES, augment.draw(ALL, 50, seed, epoch), BLANK)


def mirrored(augment, epoch):
    result = apply(augment, epoch=epoch)
    flipped = (result == IMAGES.flip(3)).flatten(1).all(1)
    assert (flipped | (result == IMAGES).flatten(1).all(1)).all()
    return flipped


def test_nothing_changes_nothing():
    assert torch.equal(apply(NOTHING), IMAGES.float())


def test_random_flip_mirrors_about_half_anew_in_every_epoch():
    flip = replace(NOTHING, flip="random")
    assert 15 <= mirrored(flip, 0).sum() <= 35
    assert not torch.equal(mirrored(flip, 0), mirrored(flip, 1))


def test_alternating_flip_shows_every_image_both_ways_in_two_epochs():
    flip = replace(NOTHING, flip="alternating")
    first = mirrored(flip, 0)
    assert 15 <= first.sum() <= 35
    assert torch.equal(mirrored(flip, 1), ~first)
    assert torch.equal(mirrored(flip, 2), first)


@pytest.mark.parametrize("flip", ["random", "alternating"])
def test_draws_share_no_stream_with_the_order_of_any_epoch(flip, monkeypatch):
    streams = []

    def noted(seed, *position):
        streams.append(make_generator(seed, *position).initial_seed())
        return make_generator(seed, *position)

    orders = {make_generator(0, epoch, SHUFFLE).initial_seed() for epoch in range(100)}
    monkeypatch.setattr(augment_module, "make_generator", noted)
    Augment(flip, 4, 10, 0.1, 8, 0.2, 0, 0).draw(ALL, 50, 0, 3)
    assert len(streams) == len(set(streams)) == 5
    assert orders.isdisjoint(streams)


def test_crop_shifts_each_image_by_its_own_draw_and_reflects():
    padding = 4
    cropped = apply(replace(NOTHING, crop_padding=padding))
    padded = F.pad(IMAGES, [padding] * 4, padding_mode="reflect")
    found = set()
    for image, source in zip(cropped, padded, strict=True):
        shifts = [
            (y, x)
            for y in range(2 * padding + 1)
            for x in range(2 * padding + 1)
            if torch.equal(image, source[:, y : y + 32, x : x + 32].float())
        ]
        assert len(shifts) == 1
        found.add(shifts[0])
    assert len(found) > 20


def test_draws_of_one_kind_do_not_depend_on_the_others_or_on_the_order():
    flip, both = replace(NOTHING, flip="random"), Augment("random", 4, 10, 0.1, 8, 0.2, 0, 0)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    assert torch.equal(flip.draw(ALL, 50, 0, 3)["mirrored"][order], both.draw(order, 50, 0, 3)["mirrored"])


def test_one_warp_flips_shifts_and_rotates_as_torchvision_does_one_by_one():
    image = torch.zeros(1, 3, 32, 32)
    image[:, :, 8:20, 10:16] = 255
    smooth = F.gaussian_blur(image, [5, 5])
    turned = transforms.warp(smooth, torch.tensor([90.0]), torch.tensor([1.0]), None, None)
    torch.testing.assert_close(turned, F.rotate(smooth, 90), atol=0.01, rtol=0)
    angle = torch.tensor([20.0])
    turned = transforms.warp(smooth, angle, torch.tensor([1.0]), None, None)
    torch.testing.assert_close(
        turned, F.rotate(smooth, 20, interpolation=F.InterpolationMode.BILINEAR), atol=0.1, rtol=0
    )
    moved = transforms.warp(smooth, torch.zeros(1), torch.ones(1), torch.tensor([True]), torch.tensor([[3, -2]]))
    exact = transforms.mirror_and_shift(smooth, torch.tensor([True]), torch.tensor([[3, -2]]), reach=4)
    torch.testing.assert_close(moved, exact, atol=0.01, rtol=0)
    together = transforms.warp(smooth, angle, torch.ones(1), torch.tensor([True]), torch.tensor([[3, -2]]))
    expected = F.rotate(exact, 20, interpolation=F.InterpolationMode.BILINEAR)
    torch.testing.assert_close(together[..., 6:26, 6:26], expected[..., 6:26, 6:26], atol=0.5, rtol=0)
    zoomed = transforms.warp(smooth, torch.zeros(1), torch.tensor([2.0]), None, None)
    assert zoomed.sum() > 3 * smooth.sum()


@pytest.mark.parametrize("kind", ["color_jitter", "rotation", "cutout"])
def test_what_is_drawn_for_each_image_is_applied_to_it(kind):
    result = apply(replace(NOTHING, **{kind: {"color_jitter": 0.4, "rotation": 30, "cutout": 8}[kind]}))
    changes = (result - IMAGES.float()).abs().sum(1)
    assert (changes.flatten(1).sum(1) > 0).all()
    same_place = (changes[:1] > 0) == (changes[1:] > 0)
    if kind == "cutout":
        assert not same_place.flatten(1).all(1).any()
    assert len({round(change.item(), 2) for change in changes.flatten(1).sum(1)}) > 40


def test_cutout_blanks_one_square_per_image():
    blanked = (apply(replace(NOTHING, cutout=8)) == BLANK).all(1).sum((1, 2))
    assert (blanked <= 64 + 2).all()
    assert (blanked >= 16).all()  # a corner: a quarter of the square is inside
    assert (blanked == 64).any()


def test_color_jitter_is_torchvisions_with_factors_per_image():
    factors = torch.tensor([[0.8, 1.1, 1.2], [1.0, 1.0, 1.0]])
    images = IMAGES[:2].float()
    result = transforms.jitter_color(images, factors)
    expected = F.adjust_brightness(images[0] / 255, 0.8)
    expected = F.adjust_saturation(F.adjust_contrast(expected, 1.1), 1.2) * 255
    torch.testing.assert_close(result[0], expected, atol=0.6, rtol=0)
    torch.testing.assert_close(result[1], images[1], atol=0.01, rtol=0)


@pytest.mark.parametrize(
    ("augment", "views"),
    [
        (NOTHING, 1),
        (replace(NOTHING, flip="random"), 2),
        (replace(NOTHING, flip="alternating"), 2),
        (replace(NOTHING, crop_padding=1), 0),
        (replace(NOTHING, flip="random", mixup=0.2), 0),
    ],
)
def test_views_that_can_come_of_an_image_are_counted(augment, views):
    assert augment.views == views


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_results_on_a_gpu_are_those_on_the_cpu():
    augment = Augment("random", 4, 15, 0.1, 8, 0.2, 0, 0)
    draws = augment.draw(ALL, 50, 0, 0)
    there = augment.apply(IMAGES.cuda(), {k: v.cuda() for k, v in draws.items()}, BLANK.cuda())
    torch.testing.assert_close(there.cpu(), augment.apply(IMAGES, draws, BLANK), atol=math.sqrt(1e-3), rtol=0)


KINDS = [
    *({"flip": "random"}, {"flip": "alternating"}, {"crop_padding": 4}, {"rotation": 30}, {"scale": 0.3}),
    *({"cutout": 8}, {"color_jitter": 0.4}),
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_kind_is_drawn_anew_for_every_epoch_and_seed(kind):
    augment = replace(NOTHING, **kind)
    first = apply(augment)
    assert torch.equal(apply(augment), first)
    assert not torch.equal(apply(augment, epoch=1), first)
    assert not torch.equal(apply(augment, seed=1), first)


def test_a_rotated_image_is_mirrored_and_shifted_as_one_that_is_not():
    flip_crop = replace(NOTHING, flip="random", crop_padding=4)
    plain, warped = (apply(replace(flip_crop, rotation=angle)) for angle in (0, 1e-6))
    inside = (..., slice(5, -5), slice(5, -5))  # the two ways reflect differently at the border
    torch.testing.assert_close(warped[inside], plain[inside], atol=0.5, rtol=0)


def test_angles_and_factors_fill_the_range_that_is_given():
    draws = replace(NOTHING, rotation=15, scale=0.1).draw(ALL, 50, 0, 0)
    assert 10 < draws["angle"].abs().max() <= 15
    assert 0.9 <= draws["zoom"].min() < 0.95 < 1.05 < draws["zoom"].max() <= 1.1
    factors = replace(NOTHING, color_jitter=0.2).draw(ALL, 50, 0, 0)["color"]
    assert 0.8 <= factors.min() < 0.85 < 1.15 < factors.max() <= 1.2
