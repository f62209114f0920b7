"""Weights at one scale: files of the same network at other scales train alike."""

import pytest
import torch
from conftest import TINY
from torch.nn.functional import cosine_similarity

from cifar_tl.errors import UserError
from cifar_tl.model.backbone import Backbone, conv_batchnorm_pairs
from cifar_tl.model.module import ResNet50Classifier
from cifar_tl.model.weights import load_weights, rescale_filters
from cifar_tl.train import train


def pretrained(seed=0):
    """A backbone with statistics and BatchNorm weights that differ per channel, as training leaves them."""
    torch.manual_seed(seed)
    backbone = Backbone(upscale=1).double().eval()
    for conv, bn in conv_batchnorm_pairs(backbone):
        conv.weight.data *= torch.empty(len(conv.weight), 1, 1, 1).uniform_(0.5, 2)
        bn.running_mean.normal_(std=0.1)
        bn.running_var.uniform_(0.2, 2)
        bn.weight.data.uniform_(0.2, 1.5)
        bn.bias.data.normal_(std=0.2)
    return backbone


@torch.no_grad()
def twin(backbone, seed=1):
    """The same function with every filter times a random factor between 1/8 and 8, taken back by BatchNorm."""
    generator = torch.Generator().manual_seed(seed)
    other = Backbone(upscale=1).double().eval()
    other.load_state_dict(backbone.state_dict())
    for conv, bn in conv_batchnorm_pairs(other):
        factor = 8 ** (2 * torch.rand(len(conv.weight), generator=generator) - 1)
        variance = bn.running_var.clone()
        conv.weight.mul_(factor[:, None, None, None])
        bn.running_mean.mul_(factor)
        bn.running_var.mul_(factor**2)
        bn.weight.mul_((bn.running_var + bn.eps).sqrt() / (factor * (variance + bn.eps).sqrt()))
    return other


def gradients(backbone, images):
    backbone.zero_grad()
    backbone(images).square().mean().backward()
    return {name: p.grad.clone() for name, p in backbone.named_parameters()}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.slow
def test_files_of_one_network_become_one_whatever_the_scale_of_their_filters(seed):
    torch.manual_seed(seed)
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    backbone = pretrained(seed)
    other = twin(backbone, seed)
    features = backbone(images)
    torch.testing.assert_close(other(images), features, rtol=1e-6, atol=1e-8)
    assert least_similarity(gradients(backbone, images), gradients(other, images)) < 0.95
    for model in (backbone, other):
        rescale_filters(model, 0.4)
        torch.testing.assert_close(model(images), features, rtol=1e-6, atol=1e-8)
        for conv, _ in conv_batchnorm_pairs(model):
            rms = conv.weight.square().mean(dim=(1, 2, 3)).sqrt()
            torch.testing.assert_close(rms, torch.full_like(rms, 0.4))
    for (name, a), b in zip(backbone.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8, msg=name)
    assert least_similarity(gradients(backbone, images), gradients(other, images)) > 0.999


def least_similarity(a, b):
    """The smallest cosine between the gradients of one parameter."""
    return min(cosine_similarity(a[name].flatten(), b[name].flatten(), dim=0) for name in a)


def test_a_dead_filter_stays_dead_and_cannot_wake_up_as_noise():
    torch.manual_seed(0)
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    backbone = pretrained()
    with torch.no_grad():
        for conv, bn in conv_batchnorm_pairs(backbone):
            for channel, size in ((0, 0.0), (1, 1e-8)):  # weight decay leaves both kinds
                conv.weight[channel] *= size
                bn.running_mean[channel], bn.running_var[channel], bn.weight[channel] = 0.0, size**2, 1e-8
    features = backbone(images)
    before = backbone.state_dict()["conv1.weight"].clone()
    rescale_filters(backbone, 0.4)
    torch.testing.assert_close(backbone(images), features, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(backbone.conv1.weight[:2], before[:2], rtol=0, atol=0)
    assert all(bn.running_var[:2].min() > 0.01 for _, bn in conv_batchnorm_pairs(backbone))
    with torch.no_grad():  # a step of the size that training takes
        for conv, bn in conv_batchnorm_pairs(backbone):
            conv.weight[:2] += 2e-3 * torch.randn_like(conv.weight[:2])
            bn.weight[:2] += 1e-2
    assert (backbone(images) - features).abs().max() < 0.1 * features.abs().max()


@pytest.mark.parametrize("zero", [40, 64])
def test_a_layer_most_of_which_is_pruned_keeps_its_function(zero):
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    backbone = pretrained()
    with torch.no_grad():
        backbone.conv1.weight[:zero] = 0.0
    features = backbone(images)
    rescale_filters(backbone, 0.4)
    torch.testing.assert_close(backbone(images), features, rtol=1e-6, atol=1e-8)
    assert backbone.conv1.weight[:zero].count_nonzero() == 0


def test_filter_rms_null_keeps_the_files_scale_and_nonsense_is_refused(tmp_path):
    backbone = pretrained()
    torch.save(backbone.float().state_dict(), tmp_path / "w.pth")
    loaded = Backbone(upscale=1)
    load_weights(loaded, str(tmp_path / "w.pth"), filter_rms=None)
    torch.testing.assert_close(loaded.state_dict(), backbone.float().state_dict(), rtol=0, atol=0)
    for rms in (0, -1, "much"):
        with pytest.raises(UserError, match=r"model\.filter_rms"):
            load_weights(loaded, str(tmp_path / "w.pth"), filter_rms=rms)


@pytest.mark.parametrize("own", [False, True])
def test_a_runs_checkpoint_gives_its_backbone_unless_its_network_is_another_one(tmp_path, own):
    model = ResNet50Classifier(["a", "b"])
    ours = {"facts": {"own_network": own}, "config": {"model": {"_target_": "mine.Stem"}}}
    torch.save({"state_dict": model.state_dict(), "cifar_tl": ours, "epoch": 1}, tmp_path / "best.ckpt")
    loaded = Backbone(upscale=1)
    if own:
        with pytest.raises(UserError, match=r"best.ckpt is of mine\.Stem, whose layers or forward are not"):
            load_weights(loaded, str(tmp_path / "best.ckpt"), filter_rms=None)
    else:
        load_weights(loaded, str(tmp_path / "best.ckpt"), filter_rms=None)
        torch.testing.assert_close(loaded.state_dict(), model.backbone.state_dict(), rtol=0, atol=0)


@pytest.mark.slow
def test_training_on_two_files_of_one_network_agrees_at_one_scale_and_not_at_their_own(compose, tmp_path):
    backbone = pretrained()
    curves = {}
    for name, model in (("file", backbone), ("twin", twin(backbone))):
        torch.save(model.float().state_dict(), tmp_path / f"{name}.pth")
        for rms in ("0.4", "null"):
            overrides = (
                f"model.weights='{tmp_path / name}.pth'",
                f"model.filter_rms={rms}",
                "finetune.batchnorm=frozen",
            )
            keys = ("finetune.optimizer=muon", "finetune.backbone_lr=3e-2", "finetune.features_folder=null")
            metrics = train(compose(*TINY, *overrides, *keys), tmp_path / f"{name}{rms}", "demo")
            curves[name, rms] = metrics["train/loss"]
            assert metrics["filter_rms"] == (0.4 if rms == "0.4" else None)
    # steps enlarge what the rounding of two files differs in, on some CPUs to 0.3% of the last loss
    assert curves["file", "0.4"] == pytest.approx(curves["twin", "0.4"], rel=1e-2)
    assert curves["file", "null"][3] != pytest.approx(curves["twin", "null"][3], rel=1e-1)
