"""The frozen phase on cached features gives what it gives on images."""

import inspect
import json
import os
import time
import zipfile
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import SGD, TINY

from cifar_tl import train as command
from cifar_tl.build import build_datamodule, build_module
from cifar_tl.callbacks import feature_cache
from cifar_tl.callbacks.feature_cache import FeatureCache, decide
from cifar_tl.data.augment import Augment
from cifar_tl.errors import UserError
from cifar_tl.model.backbone import Backbone

FLIP = Augment("random")
CROP = replace(FLIP, crop_padding=4)
SIZES = {"train": 45_000, "val": 5_000}


def decision(mode="auto", epochs=10, augment=FLIP, available=10**10, world_size=1):
    return decide(mode, epochs, augment, SIZES, 4, available, world_size)


def test_auto_caches_the_views_there_are():
    assert decision().views == 2
    assert decision().size == 95_000 * 2048 * 4
    assert decision(augment=replace(FLIP, flip="none")).views == 1


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"mode": "false"}, "cache_features=false"),
        ({"augment": CROP}, "finetune.frozen_augment=flip keeps the views that can be cached"),
        ({"epochs": 0}, "no epoch is frozen"),
        ({"epochs": 1}, "does not pay for 2 views"),
        ({"available": 10**6}, "0.78 GB of features would not fit into the 0.00 GB"),
        ({"world_size": 2}, "2 processes"),
    ],
)
def test_auto_says_why_it_does_not_cache(given, reason):
    assert decision(**given).views == 0
    assert reason in decision(**given).text


def test_true_refuses_what_cannot_be_cached():
    with pytest.raises(UserError, match=r"cache_features=true.*frozen_augment=flip"):
        decision(mode="true", augment=CROP)
    assert decision(mode="true", epochs=1).views == 2


@pytest.mark.parametrize("frozen_augment", ["none", "flip"])
@pytest.mark.slow
def test_a_head_trained_on_cached_features_equals_one_trained_on_images(compose, tmp_path, frozen_augment):
    # sgd: Adam's division by tiny moments would blow rounding up
    optimizer = (*SGD, "finetune.head_lr=0.01")
    heads, losses = [], []
    for cached in ("true", "false"):
        overrides = (*TINY, "finetune.unfreeze_at_epoch=null", "model.dropout=0.2", *optimizer)
        keys = (f"finetune.cache_features={cached}", f"finetune.frozen_augment={frozen_augment}")
        metrics = command.train(compose(*overrides, *keys), tmp_path / cached, "demo")
        state = torch.load(tmp_path / cached / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        heads.append({name: tensor for name, tensor in state.items() if name.startswith("head.")})
        losses.append(metrics["train/loss"] + metrics["val/loss"])
    torch.testing.assert_close(heads[0], heads[1], rtol=1e-4, atol=1e-6)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_the_name_of_kept_features_depends_on_all_that_they_depend_on(compose, monkeypatch):
    def key(*overrides, change=lambda backbone: None, precision="32-true", **attributes):
        cfg = compose(*TINY, *overrides)
        datamodule = build_datamodule(cfg)
        datamodule.setup("fit")
        vars(datamodule).update(attributes)
        torch.manual_seed(0)
        backbone = build_module(cfg, datamodule.classes).backbone
        change(backbone)
        cache = FeatureCache(datamodule, 2, "auto", None)
        cache.views = 2
        strategy = SimpleNamespace(root_device=torch.device("cpu"))
        return cache._key(SimpleNamespace(precision=precision, strategy=strategy), backbone)

    def weights(backbone):
        with torch.no_grad():
            backbone.layer4[0].conv1.weight[0, 0, 0, 0] += 1

    def statistics(backbone):
        backbone.layer4[0].bn1.running_mean[0] += 1

    assert key() == key()
    keys = [
        key(),
        key("data.split_seed=1"),
        key("model.conventions=keras"),  # another eps
        key("model.upscale=2"),
        key(change=weights),
        key(change=statistics),
        key(change=lambda backbone: backbone.compile(backend="eager")),
        key(precision="bf16-mixed"),
        key(mean=(0.5, 0.5, 0.5)),
        key(std=(0.5, 0.5, 0.5)),
    ]
    torch.use_deterministic_algorithms(True)
    try:
        keys.append(key())
    finally:
        torch.use_deterministic_algorithms(False)
    source = inspect.getsource
    for module in (feature_cache.backbone_code, feature_cache.cpu_kernels):
        with monkeypatch.context() as patched:
            patched.setattr("inspect.getsource", lambda m, of=module: source(m) + "#" * (m is of))
            keys.append(key())
    with monkeypatch.context() as patched:
        patched.setattr(feature_cache, "device_name", lambda accelerator: "another CPU")
        keys.append(key())
    with monkeypatch.context() as patched:
        patched.setattr(torch, "__version__", "0")
        keys.append(key())
    assert len(set(keys)) == len(keys)


@pytest.fixture
def real_looking_weights(tmp_path):
    torch.save(Backbone(upscale=1).state_dict(), tmp_path / "w.pth")
    return f"model.weights='{tmp_path / 'w.pth'}'"


@pytest.mark.slow
def test_features_are_kept_and_read_by_the_next_run(compose, tmp_path, monkeypatch, caplog, real_looking_weights):
    overrides = (*TINY, real_looking_weights, f"finetune.features_folder='{tmp_path / 'features'}'")
    first = command.train(compose(*overrides), tmp_path / "first", "demo")
    (kept,) = (tmp_path / "features").iterdir()

    with monkeypatch.context() as patched:
        patched.setattr(FeatureCache, "_compute", lambda *args: pytest.fail("features were computed again"))
        second = command.train(compose(*overrides), tmp_path / "second", "demo")
    assert first["train/loss"] == second["train/loss"]

    whole = kept.read_bytes()
    zeroed = whole[: len(whole) // 2] + bytes(1000) + whole[len(whole) // 2 + 1000 :]
    for name, damaged in (("third", whole[:1000]), ("fourth", zeroed)):
        kept.write_bytes(damaged)
        again = command.train(compose(*overrides), tmp_path / name, "demo")
        assert again["train/loss"] == first["train/loss"]
        assert caplog.text.count(f"{kept} is damaged") == 1
        caplog.clear()
        assert zipfile.ZipFile(kept).testzip() is None  # made whole again


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.slow
def test_the_size_that_is_announced_is_the_one_they_have(compose, tmp_path, monkeypatch, precision):
    announced = []
    monkeypatch.setattr(feature_cache, "decide", lambda *of: announced.append(decide(*of)) or announced[-1])
    computed = []
    compute = FeatureCache._compute
    monkeypatch.setattr(FeatureCache, "_compute", lambda *of: computed.append(compute(*of)) or computed[-1])
    keys = (f"trainer.precision={precision}", "trainer.max_epochs=3")
    metrics = command.train(compose(*TINY, *keys), tmp_path, "demo")
    assert metrics["precision"] == metrics["starts"][0]["precision"] == precision
    assert sum(features.nbytes for features in computed) == announced[0].size


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed writing file")]
)
def test_a_full_disk_costs_the_kept_features_not_the_run(tmp_path, monkeypatch, caplog, error):
    def full(*args, **kwargs):
        raise error

    monkeypatch.setattr(feature_cache.torch, "save", full)
    features = {"train": torch.zeros(1, 2, 2048)}
    assert not feature_cache._write(tmp_path / "features" / "x.pt", features)
    assert str(error) in caplog.text
    assert not list((tmp_path / "features").iterdir())


@pytest.mark.slow
def test_random_weights_leave_no_features_behind(compose, tmp_path):
    command.train(compose(*TINY, f"finetune.features_folder='{tmp_path / 'features'}'"), tmp_path / "run", "demo")
    assert not (tmp_path / "features").exists()
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["status"] == "finished"


def test_what_killed_runs_left_of_features_goes_when_it_is_old(tmp_path):
    for name, age in (("old", 2 * feature_cache.ABANDONED_S), ("new", 0)):
        path = tmp_path / f".key.{name}.partial.pt"
        path.touch()
        os.utime(path, (time.time() - age,) * 2)
    assert feature_cache._write(tmp_path / "key.pt", {"train": torch.zeros(1)})
    assert {path.name for path in tmp_path.iterdir()} == {".key.new.partial.pt", "key.pt"}


def test_features_take_half_of_the_free_memory_at_most(monkeypatch):
    monkeypatch.setattr(feature_cache, "host_memory", lambda: 1000)
    assert feature_cache.memory_for_features(torch.device("cpu")) == 500


def test_the_name_of_features_depends_on_the_images_of_every_split(compose):
    data = build_datamodule(compose(*TINY))
    data.setup("fit")
    backbone = build_module(compose(*TINY), data.classes).backbone
    cache = FeatureCache(data, 2, "auto", None)
    trainer = SimpleNamespace(precision="32-true", strategy=SimpleNamespace(root_device=torch.device("cpu")))
    keys = {cache._key(trainer, backbone)}
    for split in ("train", "val"):
        images, targets = data.splits[split]
        data.splits[split] = 255 - images, targets
        keys.add(cache._key(trainer, backbone))
    assert len(keys) == 3


def test_the_end_of_training_frees_the_features():
    data = SimpleNamespace(features={"train": torch.zeros(1)})
    FeatureCache(data, 2, "auto", None).on_fit_end(None, None)
    assert data.features == {}
