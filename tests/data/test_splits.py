import pytest
import torch

from cifar_tl.data.splits import make_generator, split_train_val, stratified_subset
from cifar_tl.errors import UserError

TARGETS = torch.arange(1000) % 10


def test_split_is_stratified_disjoint_and_complete():
    train, val = split_train_val(TARGETS, val_size=100, limit=None, seed=0)
    assert torch.bincount(TARGETS[val]).tolist() == [10] * 10
    assert torch.cat([train, val]).sort().values.tolist() == list(range(1000))


def test_split_depends_on_the_seed_alone():
    first, again, other = (torch.cat(split_train_val(TARGETS, 100, None, seed)).tolist() for seed in (0, 0, 1))
    assert first == again != other


def test_limit_applies_to_training_and_validation_each():
    train, val = split_train_val(TARGETS, val_size=100, limit=50, seed=0)
    assert torch.bincount(TARGETS[train]).tolist() == torch.bincount(TARGETS[val]).tolist() == [5] * 10
    whole_train, whole_val = split_train_val(TARGETS, val_size=100, limit=None, seed=0)
    assert set(train.tolist()) <= set(whole_train.tolist())
    assert set(val.tolist()) <= set(whole_val.tolist())


def test_fewer_training_images_are_some_of_more_and_validation_keeps_its_own():
    _, all_val = split_train_val(TARGETS, 100, None, 0)
    few, val = split_train_val(TARGETS, 100, None, 0, train_limit=20)
    more, _ = split_train_val(TARGETS, 100, None, 0, train_limit=200)
    assert torch.bincount(TARGETS[few]).tolist() == [2] * 10
    assert set(few.tolist()) < set(more.tolist())
    assert torch.equal(val, all_val)
    both, val = split_train_val(TARGETS, 100, 50, 0, train_limit=20)
    assert torch.equal(both, few)
    assert len(val) == 50


def test_uneven_classes_get_their_share_within_one():
    targets = torch.tensor([0] * 70 + [1] * 20 + [2] * 10)
    counts = torch.bincount(targets[stratified_subset(targets, 33, seed=0)])
    assert counts.sum() == 33
    assert (counts - torch.tensor([23.1, 6.6, 3.3])).abs().max() < 1


def test_nothing_left_to_train_on_is_refused():
    with pytest.raises(UserError, match=r"data\.val_size=1000"):
        split_train_val(TARGETS, val_size=1000, limit=None, seed=0)


def test_streams_differ_by_every_position_and_repeat():
    draws = [torch.rand(1, generator=make_generator(*p)).item() for p in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))]
    assert len(set(draws)) == 4
    assert torch.rand(1, generator=make_generator(0, 0, 0)).item() == draws[0]
