import hashlib
from collections import OrderedDict

import pytest
import torch
from torch.nn.functional import interpolate, linear
from torchvision.models import resnet18, resnet50

from cifar_tl.errors import UserError
from cifar_tl.model import cpu_kernels
from cifar_tl.model.backbone import FEATURES, Backbone
from cifar_tl.model.weights import load_weights

pytestmark = pytest.mark.resnet50


@pytest.mark.slow
def test_backbone_is_torchvisions_resnet50_up_to_its_pooling(tmp_path):
    original = resnet50().eval()
    path = tmp_path / "weights.pth"
    torch.save(original.state_dict(), path)
    backbone = Backbone(upscale=1).eval()
    sha256 = load_weights(backbone, str(path), filter_rms=None)
    images = torch.randn(2, 3, 32, 32)
    features = backbone(images)
    assert features.shape == (2, FEATURES)
    torch.testing.assert_close(original.fc(features), original(images))
    assert sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("batchnorm_trains", [False, True])
@pytest.mark.slow
def test_tuning_for_the_cpu_changes_neither_features_nor_gradients(size, batchnorm_trains, monkeypatch):
    torch.manual_seed(0)
    plain, tuned = Backbone(upscale=1), Backbone(upscale=1)
    for name, buffer in plain.named_buffers():  # statistics that make a difference
        if name.endswith("running_mean"):
            buffer.normal_(std=0.1)
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    tuned.load_state_dict(plain.state_dict())
    tuned.tuned_for_cpu = True
    images = torch.randn(40, 3, size, size)  # enough that some layers are folded and some are not
    gradients, products = [], []
    monkeypatch.setattr(cpu_kernels, "linear", lambda *args: products.append(args) or linear(*args))
    for backbone in (plain, tuned):
        assert not products  # torchvision's layers need none
        backbone.train(batchnorm_trains)
        features = backbone.double()(images.double())
        features.square().mean().backward()
        gradients.append({"features": features} | {name: p.grad for name, p in backbone.named_parameters()})
    assert products
    torch.testing.assert_close(gradients[0], gradients[1])
    torch.testing.assert_close(plain.state_dict(), tuned.state_dict())


def test_a_hook_on_batchnorm_is_called_in_spite_of_tuning():
    backbone = Backbone(upscale=1).eval()
    backbone.tuned_for_cpu = True
    called = []
    backbone.layer1[0].bn1.register_forward_pre_hook(lambda module, inputs: called.append(inputs[0].shape))
    backbone(torch.randn(2, 3, 32, 32))
    assert called == [(2, 64, 8, 8)]


def test_upscale_enlarges_images_inside_the_model():
    torch.manual_seed(0)
    plain, enlarging = Backbone(upscale=1).eval(), Backbone(upscale=2).eval()
    enlarging.load_state_dict(plain.state_dict())
    images = torch.randn(2, 3, 32, 32)
    large = interpolate(images, size=(64, 64), mode="bicubic")
    torch.testing.assert_close(enlarging(images), plain(large))


def test_weights_of_another_architecture_are_refused(tmp_path):
    torch.save(resnet18().state_dict(), tmp_path / "resnet18.pth")
    with pytest.raises(UserError, match=r"resnet18\.pth is not a ResNet-50.*missing"):
        load_weights(Backbone(upscale=1), str(tmp_path / "resnet18.pth"), filter_rms=None)


def of_before_torch_0_4_1(model):
    """Return a state dict as torchvision's IMAGENET1K_V1 is: parameters as such, BatchNorm's batches not counted."""
    return {k: v for k, v in model.state_dict(keep_vars=True).items() if not k.endswith("num_batches_tracked")}


@pytest.mark.parametrize("version", [None, 2])
def test_weights_from_before_batchnorm_counted_its_batches_are_read(tmp_path, version):
    source = resnet50()
    state = OrderedDict(of_before_torch_0_4_1(source))
    if version:
        state._metadata = {"bn1": {"version": version}}
    torch.save(state, tmp_path / "w.pth")
    backbone = Backbone(upscale=1)
    load_weights(backbone, str(tmp_path / "w.pth"), filter_rms=None)
    assert torch.equal(backbone.layer4[2].bn3.running_var, source.layer4[2].bn3.running_var)
    assert backbone.bn1.num_batches_tracked == 0


def test_a_whole_checkpoint_is_no_state_dict(tmp_path):
    torch.save({"state_dict": {}, "epoch": 3}, tmp_path / "checkpoint.pth")
    with pytest.raises(UserError, match=r"its keys: state_dict, epoch"):
        load_weights(Backbone(upscale=1), str(tmp_path / "checkpoint.pth"), filter_rms=None)


def test_truncated_weights_are_refused(tmp_path):
    torch.save(resnet18().state_dict(), tmp_path / "w.pth")
    (tmp_path / "w.pth").write_bytes((tmp_path / "w.pth").read_bytes()[:1000])
    with pytest.raises(UserError, match="damaged"):
        load_weights(Backbone(upscale=1), str(tmp_path / "w.pth"), filter_rms=None)


def test_weights_with_a_few_bytes_changed_are_refused(tmp_path):
    torch.save(Backbone(upscale=1).state_dict(), tmp_path / "w.pth")
    content = bytearray((tmp_path / "w.pth").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        load_weights(Backbone(upscale=1), str(tmp_path / "w.pth"), filter_rms=None)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_finite_numbers_are_refused_by_name(tmp_path, value):
    state = Backbone(upscale=1).state_dict()
    state["layer2.0.bn1.running_var"][3] = value
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"1 of its tensors hold NaN or infinite .*layer2.0.bn1.running_var"):
        load_weights(Backbone(upscale=1), str(tmp_path / "w.pth"), filter_rms=None)


def test_code_in_a_weights_file_is_not_run(tmp_path):
    class Hostile:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").touch, ())

    torch.save(Hostile(), tmp_path / "w.pth")
    with pytest.raises(UserError):
        load_weights(Backbone(upscale=1), str(tmp_path / "w.pth"), filter_rms=None)
    assert not (tmp_path / "ran").exists()


def test_a_mistyped_name_is_corrected():
    with pytest.raises(UserError, match="Did you mean IMAGENET1K_V2"):
        load_weights(Backbone(upscale=1), "IMAGENET1K_V22", filter_rms=None)


def test_torchvisions_weights_are_fetched_once_and_their_hash_is_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "_is_legacy_zip_format", lambda path: False)
    source, fetched = resnet50(), []

    def fetch(url, path, hash_prefix, progress):
        fetched.append((url.rpartition("/")[2], hash_prefix))
        torch.save(of_before_torch_0_4_1(source), path)

    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    for _ in range(2):
        backbone = Backbone(upscale=1)
        load_weights(backbone, "IMAGENET1K_V1", filter_rms=None)
        assert torch.equal(backbone.conv1.weight, source.conv1.weight)
    assert fetched == [("resnet50-0676ba61.pth", "0676ba61")]


def test_no_network_says_where_to_put_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def unreachable(*args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    with pytest.raises(UserError, match=r"resnet50-0676ba61\.pth at .*model\.weights=PATH"):
        load_weights(Backbone(upscale=1), "IMAGENET1K_V1", filter_rms=None)
