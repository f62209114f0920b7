import pytest
import torch

from cifar_tl.errors import UserError
from cifar_tl.model.head import dense_head
from cifar_tl.model.module import TransferClassifier, class_indices, one_hot


@pytest.fixture(scope="module")
def module():
    return TransferClassifier(
        classes=[str(n) for n in range(10)],
        upscale=1,
        head=[128, 64],
        dropout=0.0,
        optimizer="adamw",
        momentum=0.9,
        weight_decay=0.05,
        label_smoothing=0.1,
    )


def test_head_is_the_originals():
    shapes = [tuple(layer.weight.shape) for layer in dense_head(2048, [128, 64], 10, 0.0) if hasattr(layer, "weight")]
    assert shapes == [(128, 2048), (64, 128), (10, 64)]


def test_dropout_outside_0_1_is_refused():
    with pytest.raises(UserError, match=r"model\.dropout=1"):
        dense_head(8, [4], 2, 1.0)


def test_named_groups_hold_every_parameter_once_and_spare_vectors_from_decay(module):
    groups = module.configure_optimizers().param_groups
    assert [g["name"] for g in groups] == ["head", "head_no_decay", "backbone", "backbone_no_decay"]
    ids = [id(p) for g in groups for p in g["params"]]
    assert len(ids) == len(set(ids)) == len(list(module.parameters()))
    for group in groups:
        decays = group["weight_decay"] > 0
        assert all((p.ndim > 1) == decays for p in group["params"])


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_optimizers_start_at_rate_zero_until_their_owner_sets_it(module, name, monkeypatch):
    monkeypatch.setattr(module, "optimizer", name)
    assert {g["lr"] for g in module.configure_optimizers().param_groups} == {0.0}


def test_logits_come_out_and_probabilities_are_predicted(module):
    images = torch.randn(2, 3, 32, 32)
    module.eval()
    with torch.no_grad():
        logits = module(images)
        probabilities = module.predict_step((images, torch.zeros(2)), 0)
    torch.testing.assert_close(probabilities, logits.softmax(1))


def test_one_hot_and_back():
    targets = torch.tensor([3, 0])
    assert class_indices(one_hot(targets, 10)).tolist() == [3, 0]
    assert class_indices(targets) is targets
