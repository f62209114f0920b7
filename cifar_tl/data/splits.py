"""Seeded, stratified splits and subsets of a set of targets, and seeds that are a function of where a run stands."""

import hashlib
import unicodedata
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cifar_tl.errors import UserError


def make_generator(seed: int, *position: int) -> torch.Generator:
    """Return a generator for one purpose at one point of a run, such as (seed, epoch, purpose).

    Lightning's checkpoints carry no generator state (Lightning issue 17543), so whatever is drawn during training is
    drawn from a generator that a resumed run can make again. Different positions give independent generators, but for
    those that differ by zeros at the end alone, which give the same one.
    """
    state = np.random.SeedSequence([seed, *position]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def stratified_subset(targets: Tensor, size: int, seed: int) -> Tensor:
    """Choose `size` examples at random with each class's share kept.

    Shares are rounded by largest remainder, so that class counts differ from the exact share by less than one.

    Args:
        targets: (examples,), class indices.
        size: Examples to choose, at most all.
        seed: The same seed chooses the same examples.

    Returns:
        Sorted indices, (size,), int64.
    """
    counts = torch.bincount(targets)
    exact = counts * size / len(targets)
    take = exact.floor().long()
    largest_remainders = (exact - take).argsort(descending=True, stable=True)
    take[largest_remainders[: size - int(take.sum())]] += 1
    generator = make_generator(seed)
    chosen = []
    for label, amount in enumerate(take.tolist()):
        members = (targets == label).nonzero().squeeze(1)
        chosen.append(members[torch.randperm(len(members), generator=generator)[:amount]])
    return torch.cat(chosen).sort().values


def split_train_val(
    targets: Tensor, val_size: int, limit: int | None, seed: int, train_limit: int | None = None, own_val: int = 0
) -> tuple[Tensor, Tensor]:
    """Cut validation from the training examples, then keep at most `limit` of each.

    Args:
        targets: (examples,), class indices of the official training set.
        val_size: Examples for validation.
        limit: At most so many for training and for validation each, None for all.
        seed: The same seed gives the same split.
        train_limit: At most so many for training, None for `limit` alone; with classes of equal size,
            fewer are some of more.
        own_val: Examples at the end that are for validation already; 0 chooses `val_size` at random, stratified.

    Returns:
        Sorted indices for training and for validation; no example is in both.

    Raises:
        UserError: Nothing would be left to train on.
    """
    if val_size >= len(targets) and not own_val:
        raise UserError(
            f"data.val_size={val_size} leaves nothing to train on: there are {len(targets)} examples. Lower it."
        )
    val = torch.arange(len(targets))[-own_val:] if own_val else stratified_subset(targets, val_size, seed)
    is_train = torch.ones(len(targets), dtype=torch.bool)
    is_train[val] = False
    train = is_train.nonzero().squeeze(1)
    at_most = min((size for size in (limit, train_limit) if size is not None), default=None)
    return limited(train, targets, at_most, seed), limited(val, targets, limit, seed)


def limited(indices: Tensor, targets: Tensor, limit: int | None, seed: int) -> Tensor:
    """Return at most `limit` of the indices, stratified by their targets."""
    if limit is None or limit >= len(indices):
        return indices
    return indices[stratified_subset(targets[indices], limit, seed)]


def content_hash(classes: Sequence[str], *splits: tuple[Tensor, Sequence[bytes], Tensor]) -> str:
    """Return the SHA-256 of all that makes up some splits: equal hashes mean the same images with the same classes.

    Args:
        classes: Names, in the order of their indices; equal after Unicode's NFC is equal.
        splits: Of each its indices, (examples,), the digests of its images and its targets, (examples,).
    """
    digest = hashlib.sha256()
    for name in classes:
        encoded = unicodedata.normalize("NFC", name).encode("utf-8", "surrogateescape")
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    for indices, images, targets in splits:
        _add_numbers(digest, indices)
        for image in images:
            digest.update(image)
        _add_numbers(digest, targets)
    return digest.hexdigest()


def _add_numbers(digest: "hashlib._Hash", numbers: Tensor) -> None:
    digest.update(len(numbers).to_bytes(8, "little") + numbers.cpu().numpy().astype("<i8").tobytes())


def image_digest(pixels: NDArray[np.uint8]) -> bytes:
    """Return the SHA-256 of an image's pixels: equal for equal images."""
    return hashlib.sha256(pixels.tobytes()).digest()


def first_copies(images: Sequence[bytes], among: Sequence[bytes]) -> dict[int, int]:
    """Find exact copies.

    Args:
        images: Digests of the images to look for.
        among: Digests of the images to look among.

    Returns:
        For each of `images` that is there, by its position, the position of the first one like it in `among`.
    """
    first: dict[bytes, int] = {}
    for at, image in enumerate(among):
        first.setdefault(image, at)
    return {at: first[image] for at, image in enumerate(images) if image in first}


def check_every_class_trains(
    classes: Sequence[str], targets: Tensor, train: Tensor, val: Tensor, given: str
) -> list[str]:
    """Refuse a split that leaves a class without training images.

    Args:
        classes: Names, in the order of their indices.
        targets: (examples,), class indices of the official training set.
        train: Indices of the training images.
        val: Indices of the validation images.
        given: What says how many are taken, for the error: keys with their values.

    Returns:
        The classes without validation images: their validation metrics mean nothing.

    Raises:
        UserError: A class has no training image; with names and counts.
    """
    there, left, held_out = (torch.bincount(t, minlength=len(classes)) for t in (targets, targets[train], targets[val]))
    if starved := [
        f"{name} (0 of {there[label]}, {held_out[label]} in validation)"
        for label, name in enumerate(classes)
        if not left[label]
    ]:
        limits = [key for key in ("data.limit", "data.train_limit") if f"{key}=" in given]
        lower = ["lower data.val_size"] if "data.val_size=" in given else []
        ways = ", ".join([*lower, *(f"raise {key}" for key in limits)])
        advice = f"{ways}, or add images" if ways else "add images"
        raise UserError(
            f"{given} leaves nothing to train on for {len(starved)} of {len(classes)} classes: {_some(starved)}; "
            f"training images in all: {len(train)}. {advice.capitalize()} of these classes."
        )
    return [name for label, name in enumerate(classes) if not held_out[label]]


def _some(items: Sequence[str], shown: int = 20) -> str:
    return ", ".join(items[:shown]) + (f" and {len(items) - shown} more" if len(items) > shown else "")
