import hashlib

import pytest
import torch
from torchvision.models import resnet18, resnet50

from cifar_tl.errors import UserError
from cifar_tl.model.backbone import FEATURES, build_backbone, load_weights


def test_backbone_is_torchvisions_resnet50_up_to_its_pooling(tmp_path):
    original = resnet50().eval()
    path = tmp_path / "weights.pth"
    torch.save(original.state_dict(), path)
    backbone = build_backbone().eval()
    sha256 = load_weights(backbone, str(path))
    images = torch.randn(2, 3, 32, 32)
    features = backbone(images)
    assert features.shape == (2, FEATURES)
    torch.testing.assert_close(original.fc(features), original(images))
    assert sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_weights_of_another_architecture_are_refused(tmp_path):
    torch.save(resnet18().state_dict(), tmp_path / "resnet18.pth")
    with pytest.raises(UserError, match=r"resnet18\.pth is not a ResNet-50.*missing"):
        load_weights(build_backbone(), str(tmp_path / "resnet18.pth"))


def test_a_whole_checkpoint_is_no_state_dict(tmp_path):
    torch.save({"state_dict": {}, "epoch": 3}, tmp_path / "checkpoint.pth")
    with pytest.raises(UserError, match=r"its keys: state_dict, epoch"):
        load_weights(build_backbone(), str(tmp_path / "checkpoint.pth"))


def test_truncated_weights_are_refused(tmp_path):
    torch.save(resnet18().state_dict(), tmp_path / "w.pth")
    (tmp_path / "w.pth").write_bytes((tmp_path / "w.pth").read_bytes()[:1000])
    with pytest.raises(UserError, match="truncated"):
        load_weights(build_backbone(), str(tmp_path / "w.pth"))


def test_code_in_a_weights_file_is_not_run(tmp_path):
    class Hostile:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").touch, ())

    torch.save(Hostile(), tmp_path / "w.pth")
    with pytest.raises(UserError):
        load_weights(build_backbone(), str(tmp_path / "w.pth"))
    assert not (tmp_path / "ran").exists()


def test_a_mistyped_name_is_corrected():
    with pytest.raises(UserError, match="Did you mean IMAGENET1K_V2"):
        load_weights(build_backbone(), "IMAGENET1K_V22")


def test_no_network_says_where_to_put_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def unreachable(*args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    with pytest.raises(UserError, match=r"resnet50-0676ba61\.pth at .*model\.weights=PATH"):
        load_weights(build_backbone(), "IMAGENET1K_V1")
