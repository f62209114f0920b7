"""Runs as a whole: what they leave behind, and that their figures can be had again from the checkpoint."""

import json

import numpy as np
import pytest
import torch
from conftest import TINY

from cifar_tl.evaluate import evaluate
from cifar_tl.model.module import ResNet50Classifier
from cifar_tl.runs.metrics import wilson_interval
from cifar_tl.train import train


@pytest.fixture(scope="module")
def run(compose, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    train(compose(*TINY, "logger=[tensorboard,csv]"), folder, "demo")
    return folder


def test_metrics_json_has_everything_to_judge_and_repeat_a_run(run):
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["status"] == "finished"
    for key in ("train/loss", "train/acc", "val/loss", "val/acc", "val/ece", "lr/head", "lr/backbone", "seconds"):
        assert len(metrics[key]) == 4, key
    assert [phase["name"] for phase in metrics["phases"]] == ["frozen", "fine-tune"]
    assert all(phase["seconds"] > 0 and phase["images_per_s"] > 0 for phase in metrics["phases"])
    assert metrics["best/val/acc"] == max(metrics["val/acc"])
    assert metrics["best/epoch"] == metrics["val/acc"].index(metrics["best/val/acc"])
    confusion = torch.tensor(metrics["test/confusion"])
    assert confusion.sum() == 20
    assert metrics["test/acc"] == pytest.approx(confusion.diag().sum().item() / 20)
    assert len(metrics["test/f1"]) == len(metrics["classes"]) == 10
    for key in ("config_sha256", "split_sha256", "device", "versions", "weights", "weights_sha256", "git_commit"):
        assert key in metrics, key


def test_loggers_write_where_they_should(run):
    assert list((run / "tensorboard").glob("events.*"))
    header = (run / "csv" / "version_0" / "metrics.csv").read_text().splitlines()[0]
    assert {"val/acc", "lr/head", "lr/backbone", "val/f1/0 degrees"} <= set(header.split(","))


def test_evaluate_gives_the_runs_test_numbers(run, compose):
    checkpoint = run / "checkpoints" / "best.ckpt"
    cfg = compose(f"checkpoint='{checkpoint}'", "trainer.accelerator=cpu", config_name="evaluate")
    metrics = json.loads((run / "metrics.json").read_text())
    assert {key: metrics[key] for key in evaluate(cfg)} == evaluate(cfg)


@pytest.mark.slow
def test_same_seed_same_run_other_seed_other_run(run, compose, tmp_path):
    expected = json.loads((run / "metrics.json").read_text())
    assert train(compose(*TINY), tmp_path / "same", "demo")["train/loss"] == expected["train/loss"]
    assert train(compose(*TINY, "seed=1"), tmp_path / "other", "demo")["train/loss"] != expected["train/loss"]


@pytest.mark.resnet50
@pytest.mark.slow
def test_real_data_and_real_weights(compose, shared, tmp_path):
    overrides = (
        f"data.root='{shared / 'data'}'",
        f"model.weights='{shared / 'weights' / 'resnet50-imagenet-pq.pth'}'",
        "trainer.accelerator=cpu",
        "trainer.max_epochs=4",
        "finetune.unfreeze_at_epoch=3",
        "data.limit=300",
        "data.batch_size=50",
        "data.download=false",
    )
    metrics = train(compose(*overrides), tmp_path, "default")
    # chance is 0.1; 300 images are enough for ImageNet features to do far better, random ones would not
    assert metrics["val/acc"][2] > 0.3
    assert metrics["weights_sha256"].startswith("761a9fa4247a")


def test_interval_is_wilsons():
    # Wilson (1927), e.g. for 90 of 100: 0.8256 to 0.9448
    assert wilson_interval(0.9, 100) == pytest.approx((0.8256, 0.9448), abs=1e-4)
    low, high = wilson_interval(0.9, 10_000)
    assert high - low == pytest.approx(2 * 0.0059, abs=1e-4)


@pytest.mark.slow
def test_train_loss_is_the_mean_over_the_epochs_images(compose, tmp_path, monkeypatch):
    losses, sizes, step = [], [], ResNet50Classifier.training_step

    def spy(self, batch, batch_idx):
        loss = step(self, batch, batch_idx)
        losses.append(loss.item())
        sizes.append(len(batch[1]))
        return loss

    monkeypatch.setattr(ResNet50Classifier, "training_step", spy)
    metrics = train(compose(*TINY), tmp_path, "demo")
    assert sizes == [16, 16, 8] * 4
    expected = [np.average(losses[i : i + 3], weights=sizes[i : i + 3]) for i in range(0, 12, 3)]
    assert metrics["train/loss"] == pytest.approx(expected, rel=1e-6)
