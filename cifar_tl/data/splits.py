"""Seeded, stratified splits and subsets of a set of targets, and seeds that are a function of where a run stands."""

import hashlib

import numpy as np
import torch
from torch import Tensor

from cifar_tl.errors import UserError


def make_generator(seed: int, *position: int) -> torch.Generator:
    """Return a generator for one purpose at one point of a run, such as (seed, epoch, purpose).

    Lightning's checkpoints carry no generator state (Lightning issue 17543), so whatever is drawn during training is
    drawn from a generator that a resumed run can make again. Different positions give independent streams.
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


def split_train_val(targets: Tensor, val_size: int, limit: int | None, seed: int) -> tuple[Tensor, Tensor]:
    """Cut validation from the training examples, then keep at most `limit` of each.

    Args:
        targets: (examples,), class indices of the official training set.
        val_size: Examples for validation.
        limit: At most so many for training and for validation each, None for all.
        seed: The same seed gives the same split.

    Returns:
        Sorted indices for training and for validation; no example is in both.

    Raises:
        UserError: Nothing would be left to train on.
    """
    if val_size >= len(targets):
        raise UserError(
            f"data.val_size={val_size} leaves nothing to train on: there are {len(targets)} examples. Lower it."
        )
    val = stratified_subset(targets, val_size, seed)
    is_train = torch.ones(len(targets), dtype=torch.bool)
    is_train[val] = False
    train = is_train.nonzero().squeeze(1)
    return limited(train, targets, limit, seed), limited(val, targets, limit, seed)


def limited(indices: Tensor, targets: Tensor, limit: int | None, seed: int) -> Tensor:
    """Return at most `limit` of the indices, stratified by their targets."""
    if limit is None or limit >= len(indices):
        return indices
    return indices[stratified_subset(targets[indices], limit, seed)]


def split_hash(train: Tensor, val: Tensor) -> str:
    """Return the SHA-256 that names a split: runs with the same hash trained and validated on the same examples."""
    digest = hashlib.sha256()
    for indices in (train, val):
        digest.update(len(indices).to_bytes(8, "little") + indices.numpy().astype("<i8").tobytes())
    return digest.hexdigest()
