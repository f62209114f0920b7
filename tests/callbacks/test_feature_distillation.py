"""Fine-tuning imitates the pretrained backbone on enlarged images, and goes on exactly as it began."""

import csv
import inspect
import logging
import math
import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY
from torch.nn.functional import interpolate

from cifar_tl.build import build_datamodule, build_module, distills, fill_backbone, keys_without_effect
from cifar_tl.callbacks import distillation
from cifar_tl.callbacks.distillation import FeatureDistillation
from cifar_tl.callbacks.feature_cache import BackboneFeatures
from cifar_tl.errors import UserError
from cifar_tl.model import distillation as fitting
from cifar_tl.model.backbone import FEATURES, Backbone
from cifar_tl.model.distillation import ridge_regression, standardize
from cifar_tl.model.module import ResNet50Classifier
from cifar_tl.train import train

DISTILL = ("finetune.distill_upscale=2", "augment=flip_crop", "finetune.batchnorm=frozen")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """The file of a pretrained backbone."""
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("weights") / "w.pth"
    torch.save(Backbone(upscale=1).state_dict(), path)
    return path


@pytest.fixture
def teaching(compose, weights):
    """A config that distills, with overrides."""
    return lambda *given: compose(
        *TINY, *DISTILL, f"model.weights='{weights}'", "finetune.features_folder=null", *given
    )


@pytest.fixture
def batches(monkeypatch):
    """The batches of a run's training steps."""
    seen = []
    step = ResNet50Classifier.training_step

    def spied(self, batch, batch_idx):
        loss = step(self, batch, batch_idx)
        seen.append((self.current_epoch, batch, loss.item()))
        return loss

    monkeypatch.setattr(ResNet50Classifier, "training_step", spied)
    return seen


def seen_by_teacher(cfg):
    """The pretrained model, the training images in order, and the teacher's features of these and their mirrors."""
    datamodule = build_datamodule(cfg)
    datamodule.setup("fit")
    module = build_module(cfg, datamodule.classes).eval()
    fill_backbone(cfg, module)
    images = torch.cat([images for images, _ in datamodule.in_order("train")])
    with torch.no_grad():
        views = [module.backbone(interpolate(v, scale_factor=2, mode="bicubic")) for v in (images, images.flip(3))]
    standardize(teacher := torch.cat(views))
    return module, images, teacher


@pytest.mark.slow
def test_fine_tuning_has_the_features_that_the_pretrained_backbone_makes_of_enlarged_images(
    teaching, tmp_path, batches, caplog
):
    caplog.set_level(logging.INFO)
    cfg = teaching()
    train(cfg, tmp_path, "demo")
    frozen = [batch for epoch, batch, _ in batches if epoch < 2]
    assert {len(batch) for batch in frozen} == {2}
    tuned = [batch for epoch, batch, _ in batches if epoch >= 2]
    assert {len(batch) for batch in tuned} == {3}
    assert (
        "distill    from the pretrained backbone on images enlarged to 64x64, while fine-tuning; weight 10"
        in caplog.text
    )

    _, _, teacher = seen_by_teacher(cfg)
    unlike = [(taught[:, None] - teacher).abs().amax(2).min(1).values for _, _, taught in tuned]
    assert torch.cat(unlike).max() < 1e-2


@pytest.mark.slow
def test_the_loss_has_a_term_for_them_of_the_given_weight(teaching, tmp_path, batches):
    losses = {}
    for weight in (0, 3):
        batches.clear()
        folder = tmp_path / str(weight)
        metrics = train(teaching(f"finetune.distill_weight={weight}", "finetune=full"), folder, "demo")
        losses[weight] = batches[0]
    (_, (images, _, taught), without), (_, (same_images, _, _), loss) = losses[0], losses[3]
    assert torch.equal(images, same_images)
    module, every, teacher = seen_by_teacher(teaching())
    with torch.no_grad():
        fitted = ridge_regression(module.backbone(every), teacher[: len(every)])
        mapped = module.backbone(images) @ fitted[:-1] + fitted[-1]
    expected = 3 * (mapped - taught).square().mean().item()
    assert loss - without == pytest.approx(expected, rel=1e-2)
    assert expected > 0.01
    (file,) = (folder / "csv").rglob("metrics.csv")
    rows = [row for row in csv.DictReader(file.read_text().splitlines()) if row["train/distillation"]]
    # what is recorded as the loss is without it, as validation's is; of the four epochs, the first
    in_epoch = [(len(batch[1]), loss) for epoch, batch, loss in batches if epoch == 0]
    mean = sum(n * loss for n, loss in in_epoch) / sum(n for n, _ in in_epoch)
    assert metrics["train/loss"][0] + float(rows[0]["train/distillation"]) == pytest.approx(mean, rel=1e-4)
    assert metrics["train/loss"][0] < mean - expected / 2


@pytest.mark.parametrize("epoch", [2, 3], ids=["at-the-unfreeze", "after-the-unfreeze"])
@pytest.mark.parametrize("growing", [False, True], ids=["", "where-images-grow"])
@pytest.mark.slow
def test_a_run_that_goes_on_is_taught_by_the_same_teacher(teaching, weights, tmp_path, monkeypatch, epoch, growing):
    growth = ["finetune.progressive_resizing=[2,2]", "finetune.distill_upscale=3"] if growing else []

    def last(folder):
        return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]

    train(teaching(*growth), tmp_path / "straight", "demo")
    step = ResNet50Classifier.training_step

    def dies(self, batch, batch_idx):
        if self.current_epoch == epoch:
            raise KeyboardInterrupt
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patched:
        patched.setattr(ResNet50Classifier, "training_step", dies)
        with pytest.raises(BaseException, match="are saved in"):
            train(teaching(*growth), tmp_path / "resumed", "demo")
    copy = shutil.copy(weights, tmp_path / "elsewhere.pth")
    given = [f"resume='{tmp_path / 'resumed'}'", f"model.weights='{copy}'"]
    train(teaching(*growth, *given), tmp_path / "resumed", "demo")
    expected = last(tmp_path / "straight")
    for name, tensor in last(tmp_path / "resumed").items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.slow
def test_a_run_does_not_go_on_with_another_teacher(teaching, tmp_path):
    torch.save(Backbone(upscale=1).state_dict(), file := tmp_path / "w.pth")
    given = f"model.weights='{file}'"
    train(teaching(given), tmp_path / "run", "demo")
    torch.save(Backbone(upscale=1).state_dict(), file)
    with pytest.raises(UserError, match=r"is another file than the run was started with.*Restore it"):
        train(teaching(given, f"resume='{tmp_path / 'run'}'", "trainer.max_epochs=5"), tmp_path / "run", "demo")
    file.unlink()
    with pytest.raises(UserError, match=r"no such file. The teacher is made of it.*the path of a copy"):
        train(teaching(given, f"resume='{tmp_path / 'run'}'", "trainer.max_epochs=5"), tmp_path / "run", "demo")
    with pytest.raises(UserError, match=r"cannot change finetune.distill_upscale=3"):
        train(
            teaching(given, f"resume='{tmp_path / 'run'}'", "trainer.max_epochs=5", "finetune.distill_upscale=3"),
            tmp_path / "run",
            "demo",
        )


@pytest.mark.slow
def test_the_teachers_features_are_kept_for_other_runs_and_freed_at_the_end(teaching, tmp_path, monkeypatch, batches):
    folder = f"finetune.features_folder='{tmp_path / 'features'}'"
    made = []
    init = FeatureDistillation.__init__
    monkeypatch.setattr(FeatureDistillation, "__init__", lambda self, *of: made.append(self) or init(self, *of))
    train(teaching(folder), tmp_path / "first", "demo")
    assert len(list((tmp_path / "features").iterdir())) == 2  # those of the frozen phase, and the teacher's
    assert made[0].datamodule.teacher is None
    monkeypatch.setattr(FeatureDistillation, "_compute", lambda *of: pytest.fail("they were computed again"))
    first = [loss for *_, loss in batches]
    batches.clear()
    train(teaching(folder), tmp_path / "second", "demo")
    assert [loss for *_, loss in batches] == first


def test_the_name_of_kept_features_depends_on_the_teacher_and_on_what_the_map_starts_from(compose, monkeypatch):
    datamodule = build_datamodule(cfg := compose(*TINY))
    datamodule.setup("fit")
    backbone = build_module(cfg, datamodule.classes).backbone
    trainer = SimpleNamespace(precision="32-true", strategy=SimpleNamespace(root_device=torch.device("cpu")))

    def name(upscale, own_upscale):
        callback = FeatureDistillation(datamodule, 2, upscale, own_upscale, None, None)
        names = []
        monkeypatch.setattr(
            callback, "_get", lambda *of: names.append(callback._key(*of)) or {"teacher": 0, "map": [0]}
        )
        callback._teach(trainer, SimpleNamespace(), backbone)
        return names[0]

    assert name(4, 1) == name(4, 1)
    names = [name(4, 1), name(3, 1), name(4, 2)]
    monkeypatch.setattr("inspect.getsource", lambda code, of=inspect.getsource: of(code) + "#" * (code is fitting))
    names.append(name(4, 1))
    assert len(set(names)) == 4
    assert backbone.upscale == 1


@pytest.mark.slow
def test_features_that_do_not_fit_are_refused_before_anything_is_trained(teaching, tmp_path, monkeypatch):
    monkeypatch.setattr(distillation, "memory_for_features", lambda device: 1000)
    with pytest.raises(UserError, match=r"0\.00 GB of the teacher's features would not fit.*distill_upscale=null"):
        train(teaching(), tmp_path, "demo")
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_that_share_the_images_all_have_the_features_of_all(compose, processes):
    datamodule = build_datamodule(compose(*TINY, "data.train_size=61"))
    datamodule.setup("fit")  # 41 images to train

    def trainer(rank, world_size, shares=()):
        strategy = SimpleNamespace(root_device=torch.device("cpu"), all_gather=lambda share: torch.stack(shares))
        precision = SimpleNamespace(forward_context=nullcontext)
        return SimpleNamespace(
            strategy=strategy, precision_plugin=precision, world_size=world_size, global_rank=rank, overfit_batches=0
        )

    class Pixels(torch.nn.Module):
        def forward(self, images):
            return images.flatten(1)[:, :FEATURES]

    def compute(features, rank, world_size, shares=()):
        datamodule.trainer = trainer(rank, world_size, shares)
        callback = FeatureDistillation(datamodule, 2, 4, 1, None, None)
        callback.views = 2
        return features._compute(callback, datamodule.trainer, Pixels(), "train", 2)

    each = math.ceil(41 / processes)
    shares = [compute(BackboneFeatures, rank, processes)[:, :each] for rank in range(processes)]
    alone = compute(BackboneFeatures, 0, 1)
    assert torch.equal(compute(FeatureDistillation, 0, processes, shares), alone)


def test_random_weights_and_a_frozen_backbone_have_no_teacher(compose):
    assert distills(compose("experiment=distill32"))
    for given in (["model.weights=null"], ["finetune.unfreeze_at_epoch=null"], ["finetune.distill_upscale=null"]):
        assert not distills(compose("experiment=distill32", *given)), given
    given = ["model.weights=null", "finetune.distill_weight=1"]
    assert any("random weights have nothing to teach" in said for said in keys_without_effect(compose(*given), given))
