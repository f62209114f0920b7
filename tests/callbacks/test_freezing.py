import pytest
import torch
from lightning.pytorch.plugins import TorchSyncBatchNorm
from torch import nn

from cifar_tl.callbacks import BackboneUnfreeze, freezing
from cifar_tl.model.backbone import Backbone
from cifar_tl.schedule import STAGES


def block():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


def copy(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def changed(module, before):
    return {name for name, tensor in module.state_dict().items() if not torch.equal(tensor, before[name])}


def step(module):
    output = module(torch.randn(8, 3, 8, 8) + 3)
    (output * torch.randn_like(output)).sum().backward()
    torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1).step()


def test_frozen_module_keeps_its_batchnorm_statistics():
    module = nn.Sequential(block(), nn.Conv2d(4, 1, 1))
    freezing.freeze(module[0])
    before = copy(module)
    step(module)
    assert changed(module, before) == {"1.weight", "1.bias"}


@pytest.mark.parametrize(
    ("policy", "statistics"),
    [
        ("frozen", set()),
        ("train", {"1.running_mean", "1.running_var", "1.num_batches_tracked"}),
        ("adapt", {"1.running_mean", "1.running_var"}),
    ],
)
def test_thawed_module_trains_its_weights_and_the_policy_says_which_statistics(policy, statistics):
    module = block()
    freezing.freeze(module)
    freezing.unfreeze([module], policy)
    if policy == "adapt":
        freezing.adapt_statistics([module])
    before = copy(module)
    step(module)
    assert all(parameter.requires_grad for parameter in module.parameters())
    noise = {"0.bias"} if policy == "train" else set()  # the mean of a batch is subtracted after it
    assert changed(module, before) | noise == {"0.weight", "0.bias", "1.weight", "1.bias"} | statistics


def test_batchnorm_that_processes_share_freezes_and_trains_as_it_does_in_one():
    module = TorchSyncBatchNorm().apply(block())  # before fit starts, Lightning does so for trainer.sync_batchnorm
    freezing.freeze(module)
    before = copy(module)
    with torch.no_grad():
        module(torch.randn(8, 3, 8, 8))
    assert changed(module, before) == set()
    for policy in ("train", "frozen"):
        freezing.unfreeze([module], policy)
        assert [layer.training for layer in freezing.batchnorms([module])] == [policy == "train"]


def test_adapting_statistics_stay_without_gradients_and_after_removal():
    module = block()
    freezing.unfreeze([module], "adapt")
    handles = freezing.adapt_statistics([module])
    before = copy(module)
    with torch.no_grad():
        module(torch.randn(8, 3, 8, 8))
    for handle in handles:
        handle.remove()
    module(torch.randn(8, 3, 8, 8))
    assert changed(module, before) == set()


def test_stages_cover_every_backbone_parameter_once():
    backbone = Backbone(upscale=1)
    stages = [p for stage in STAGES for m in freezing.stage_modules(backbone, stage) for p in m.parameters()]
    assert len(stages) == len({id(p) for p in stages}) == len(list(backbone.parameters()))


def test_statistics_of_features_adapt_as_those_of_maps_do():
    layer = nn.Sequential(nn.BatchNorm1d(4)).eval()
    freezing.adapt_statistics([layer], momentum=1.0)
    features = torch.randn(16, 4)
    layer(features)
    torch.testing.assert_close(layer[0].running_mean, features.mean(dim=0))


def test_a_phase_that_is_entered_again_adapts_once():
    module = nn.ModuleDict({"backbone": block(), "head": nn.Linear(4, 2)})
    unfreeze = BackboneUnfreeze(0, 1e-3, 1e-3, batchnorm="adapt", max_epochs=3)
    for epoch in (0, 0, 1):
        unfreeze.apply(module, unfreeze.schedule.phase(epoch))
    assert len(module["backbone"][1]._forward_pre_hooks) == 1


def test_modes_come_back_after_an_error():
    module = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout())
    module[0].eval()
    with pytest.raises(RuntimeError), freezing.evaluating(module):
        raise RuntimeError
    assert [part.training for part in module.modules()] == [True, False, True]
