"""Runs as a whole: what they leave behind, and that their figures can be had again from the checkpoint."""

import csv
import hashlib
import json
import logging
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SGD, TINY
from lightning.pytorch import loggers
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import DummyLogger
from torch import nn
from torch.nn.functional import cross_entropy

from cifar_tl import hardware
from cifar_tl.build import build_loggers, build_schedule
from cifar_tl.callbacks.backbone_unfreeze import BackboneUnfreeze
from cifar_tl.callbacks.early_stopping import EarlyStopping
from cifar_tl.callbacks.weight_ema import WeightEMA
from cifar_tl.checkpoints import load_trained
from cifar_tl.data.synthetic import Synthetic
from cifar_tl.errors import UserError
from cifar_tl.evaluate import evaluate
from cifar_tl.files import lock
from cifar_tl.loggers import MLFlowLogger, spelled_out
from cifar_tl.model.module import ResNet50Classifier
from cifar_tl.runs.metrics import wilson_interval
from cifar_tl.runs.predictions import read_images
from cifar_tl.runs.record import collapse_warnings
from cifar_tl.schedule import FinetuneSchedule
from cifar_tl.train import augment_text, train


@pytest.fixture(scope="module")
def run(compose, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    train(compose(*TINY, "logger=[tensorboard,csv]"), folder, "demo")
    return folder


@pytest.mark.slow
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


@pytest.mark.slow
def test_loggers_write_where_they_should(run):
    assert list((run / "tensorboard").glob("events.*"))
    header = (run / "csv" / "version_0" / "metrics.csv").read_text().splitlines()[0]
    assert {"val/acc", "lr/head", "lr/backbone", "val/f1/0 degrees"} <= set(header.split(","))


@pytest.mark.slow
@pytest.mark.parametrize("best", [2, 3])
def test_images_that_grow_are_tested_as_large_as_they_were_in_the_best_epoch(compose, tmp_path, monkeypatch, best):
    seen = []
    step = ResNet50Classifier.test_step

    def best_in_that_epoch(self):
        self.log("val/acc", float(self.current_epoch == best))

    def notes_the_size(self, images_and_targets, batch_idx):
        seen.append(self.backbone.upscale)
        return step(self, images_and_targets, batch_idx)

    monkeypatch.setattr(ResNet50Classifier, "on_validation_epoch_end", best_in_that_epoch)
    monkeypatch.setattr(ResNet50Classifier, "test_step", notes_the_size)
    metrics = train(compose(*TINY, "model.upscale=2", "finetune.progressive_resizing=[1,3]"), tmp_path, "demo")
    assert metrics["best/epoch"] == best
    assert set(seen) == {{2: 1, 3: 3}[best]}
    assert load_trained(tmp_path).module.backbone.upscale == seen[0]
    cfg = compose(f"checkpoint='{tmp_path}'", "trainer.accelerator=cpu", config_name="evaluate")
    assert metrics["test/loss"] == evaluate(cfg)["test/loss"]  # with that epoch's weights, too
    assert [phase["upscale"] for phase in metrics["plan"]] == [None, 1, 3]
    assert [phase["name"] for phase in metrics["phases"]] == ["frozen", "fine-tune at 32x32", "fine-tune at 96x96"]


@pytest.mark.slow
def test_evaluate_gives_the_runs_test_numbers(run, compose):
    checkpoint = run / "checkpoints" / "best.ckpt"
    cfg = compose(f"checkpoint='{checkpoint}'", "trainer.accelerator=cpu", config_name="evaluate")
    metrics = json.loads((run / "metrics.json").read_text())
    result = evaluate(cfg)
    assert result["test_images"] == metrics["images"]["test"]
    assert {key: metrics[key] for key in result if key in metrics} == {k: v for k, v in result.items() if k in metrics}
    assert {"test/acc", "test/confusion", "test_sha256", "device"} <= result.keys() & metrics.keys()


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
        "finetune.features_folder=null",
    )
    metrics = train(compose(*overrides), tmp_path, "default")
    # chance is 0.1; 300 images are enough for ImageNet features to do far better, random ones would not
    assert metrics["val/acc"][2] > 0.3
    weights = shared / "weights" / "resnet50-imagenet-pq.pth"
    assert metrics["weights_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()


def test_interval_is_wilsons():
    # Wilson (1927), e.g. for 90 of 100: 0.8256 to 0.9448
    assert wilson_interval(0.9, 100) == pytest.approx((0.8256, 0.9448), abs=1e-4)
    low, high = wilson_interval(0.9, 10_000)
    assert high - low == pytest.approx(2 * 0.0059, abs=1e-4)


@pytest.mark.slow
def test_train_loss_is_the_mean_over_the_epochs_images(compose, tmp_path, monkeypatch):
    losses, right, sizes, step = [], [], [], ResNet50Classifier.training_step

    def spy(self, batch, batch_idx):
        loss, logits = step(self, batch, batch_idx), self(batch[0])
        smoothed = cross_entropy(logits, batch[1], label_smoothing=0.1)
        right.append((logits.argmax(dim=1) == batch[1]).sum().item())
        torch.testing.assert_close(loss, smoothed)
        losses.append(loss.item())
        sizes.append(len(batch[1]))
        return loss

    monkeypatch.setattr(ResNet50Classifier, "training_step", spy)
    keys = ("finetune.label_smoothing=0.1", "model.dropout=0")
    metrics = train(compose(*TINY, *keys), tmp_path, "demo")
    assert sizes == [16, 16, 8] * 4
    expected = [np.average(losses[i : i + 3], weights=sizes[i : i + 3]) for i in range(0, 12, 3)]
    assert metrics["train/loss"] == pytest.approx(expected, rel=1e-6)
    assert metrics["train/acc"] == pytest.approx([sum(right[i : i + 3]) / 40 for i in range(0, 12, 3)])


@pytest.mark.slow
def test_seconds_are_each_epochs_own_and_speed_is_of_training_alone(compose, tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("cifar_tl.callbacks.epoch_timer.time", SimpleNamespace(perf_counter=lambda: now[0]))

    def takes(name, seconds):
        step = getattr(ResNet50Classifier, name)

        def slow(self, batch, batch_idx):
            now[0] += seconds
            return step(self, batch, batch_idx)

        monkeypatch.setattr(ResNet50Classifier, name, slow)

    takes("training_step", 1.0)
    takes("validation_step", 10.0)
    metrics = train(compose(*TINY), tmp_path, "demo")
    assert metrics["seconds"] == [13.0] * 4  # three steps and a validation
    assert [phase["images_per_s"] for phase in metrics["phases"]] == [13.3, 13.3]


@pytest.mark.slow
def test_a_compiled_run_is_the_one_that_is_not(compose, tmp_path, monkeypatch, run):
    compiled, resets, free, original = [], [], [], nn.Module.compile

    def backend(graph, inputs):
        nodes = [node for node in graph.graph.nodes if node.op == "placeholder"]
        free.extend(node for node in nodes if isinstance(node.meta["example_value"], torch.SymInt))
        return graph.forward  # without minutes for its kernels

    def compile(module, **options):
        compiled.append(module)
        original(module, backend=backend, **options)

    monkeypatch.setattr(nn.Module, "compile", compile)
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(True))
    keys = ("model.compile=true", "finetune.cache_features=false", "finetune.features_folder=null")
    metrics = train(compose(*TINY, *keys), tmp_path, "demo")  # FreezeGuard sees both phases
    assert [type(module).__name__ for module in compiled] == ["Backbone"]
    assert len(resets) == 2  # of the run before, and at the unfreeze, though this backend would give gradients
    assert free == []  # no graph is for batches of any size
    plain = json.loads((run / "metrics.json").read_text())
    assert metrics["train/loss"] == pytest.approx(plain["train/loss"], rel=1e-3)


@pytest.mark.slow
def test_logged_learning_rates_are_those_of_their_steps(compose, tmp_path):
    cfg = compose(*TINY, "trainer.log_every_n_steps=2", "logger=csv")
    train(cfg, tmp_path, "demo")
    schedule = build_schedule(cfg)
    with next(tmp_path.glob("csv/*/metrics.csv")).open() as file:
        rates = {int(row["step"]): row for row in csv.DictReader(file) if row["lr/head"]}
    assert rates.keys() >= {1, 3, 5, 7, 9, 11}
    for step, row in rates.items():
        for name, rate in schedule.learning_rates(step // 3, step % 3, 3).items():
            assert float(row[f"lr/{name}"]) == pytest.approx(rate, rel=1e-6), (step, name)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([], "flip random while frozen, then flip random, crop_padding 4"),
        (["experiment=long32", "augment=none"], "nothing while frozen, then nothing"),
        (["augment=none", "augment.mixup=0.3"], "nothing while frozen, then mixup 0.3"),
        (["augment=strong", "finetune.unfreeze_at_epoch=null"], "flip alternating while frozen"),
        (
            ["finetune.frozen_augment=none", "finetune=gradual"],
            "nothing while frozen, then flip random, crop_padding 4",
        ),
        (["finetune.unfreeze_at_epoch=0"], "flip random, crop_padding 4"),
    ],
)
def test_what_happens_to_training_images_is_said_by_phase(compose, overrides, said):
    cfg = compose(*overrides)
    assert augment_text(cfg, build_schedule(cfg)) == said


@pytest.mark.slow
def test_early_stopping_by_config_alone_ends_the_run_early_and_it_is_tested(compose, tmp_path):
    stopping = ("callbacks=early_stopping", "callbacks.early_stopping.patience=1", "finetune.unfreeze_at_epoch=null")
    metrics = train(compose(*TINY, *stopping, "finetune.head_lr=0", "trainer.max_epochs=9"), tmp_path, "demo")
    assert metrics["epoch"] == [0, 1]
    assert metrics["status"] == "finished"
    assert "test/acc" in metrics
    resumed = (*TINY, *stopping, "finetune.head_lr=0", "trainer.max_epochs=9", f"resume={tmp_path}")
    again = train(compose(*resumed), tmp_path, "demo")
    assert (again["epoch"], again["warnings"]) == ([0, 1], metrics["warnings"])
    record = (tmp_path / "metrics.json").read_bytes()
    with pytest.raises(UserError, match=r"nothing left to train, so that finetune\.weight_decay=0\.5 would change"):
        train(compose(*resumed, "finetune.weight_decay=0.5"), tmp_path, "demo")
    with pytest.raises(UserError, match=r"trainer\.max_epochs=20 would change its record alone"):
        train(compose(*resumed, "trainer.max_epochs=20"), tmp_path, "demo")
    assert (tmp_path / "metrics.json").read_bytes() == record
    patient = train(compose(*resumed, "callbacks.early_stopping.patience=3"), tmp_path, "demo")
    assert patient["epoch"] == [0, 1, 2, 3]
    assert patient["starts"][-1]["changed"] == {"callbacks.early_stopping.patience": 3}


@pytest.mark.slow
def test_epochs_without_a_number_are_never_the_best_by_naming_one_class(compose, tmp_path, caplog):
    exploding = ("finetune=full", *SGD, "finetune.backbone_lr=1e9", "finetune.head_lr_unfrozen=1e9")
    caplog.set_level(logging.INFO)
    metrics = train(compose(*TINY, *exploding, "trainer.max_epochs=1"), tmp_path, "demo")
    assert (metrics["best/val/acc"], metrics["test/acc"], metrics["test/loss"]) == (0, 0, None)
    assert "Test accuracy 0.00% (95% interval 0.00 to" in caplog.text


@pytest.mark.slow
def test_early_stopping_waits_for_the_unfreeze(compose, tmp_path):
    patience = ("callbacks=early_stopping", "callbacks.early_stopping.patience=1", "finetune.unfreeze_at_epoch=3")
    still = ("finetune.batchnorm=frozen", "finetune.head_lr=0", "finetune.head_lr_unfrozen=0", "finetune.backbone_lr=0")
    metrics = train(compose(*TINY, *patience, *still, "trainer.max_epochs=9"), tmp_path, "demo")
    assert metrics["epoch"] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("given", "keys", "counts"),
    [
        (None, {}, range(2, 8)),
        (None, {"progressive_resizing": [1, 2, 3]}, range(6, 8)),
        (None, {"stage_epochs": 1}, range(6, 8)),
        (None, {"unfreeze_at_epoch": None}, range(8)),
        (1, {}, range(1, 8)),
    ],
)
def test_early_stopping_looks_at_the_last_phase_unless_told(given, keys, counts):
    rates = {"unfreeze_at_epoch": 2, "head_lr": 1e-3, "backbone_lr": 1e-3, "max_epochs": 8}
    trainer = SimpleNamespace(callbacks=[BackboneUnfreeze(**rates | keys)])
    stopping = EarlyStopping("val/acc", start_epoch=given)
    looked_at = []
    for trainer.current_epoch in range(8):
        looked_at += [trainer.current_epoch] * stopping._counts(trainer)
    assert looked_at == list(counts)


@pytest.mark.parametrize(
    ("max_epochs", "average", "promise"),
    [
        (6, False, ""),
        (7, False, " With more patience or callbacks=none it goes on."),
        (7, True, " or callbacks=ema it"),
    ],
)
def test_an_early_stop_says_what_goes_on_unless_it_was_in_the_last_epoch(caplog, max_epochs, average, promise):
    stopping = EarlyStopping("val/acc", patience=2)
    stopping.stopping_reason, stopping.wait_count, stopping.stopped_epoch = EarlyStoppingReason.PATIENCE_EXHAUSTED, 2, 5
    caplog.set_level(logging.INFO)
    callbacks = [WeightEMA()] if average else []
    stopping.on_fit_start(SimpleNamespace(max_epochs=max_epochs, is_global_zero=True, callbacks=callbacks), None)
    assert "stopped    early, before it was resumed" in caplog.text
    assert promise in caplog.text
    assert ("goes on" in caplog.text) == bool(promise)


@pytest.mark.slow
def test_an_early_stop_has_its_own_reason(compose, tmp_path):
    stopping = ("callbacks=early_stopping", "+callbacks.early_stopping.stopping_threshold=0.0")
    metrics = train(compose(*TINY, *stopping, "finetune.unfreeze_at_epoch=null"), tmp_path, "demo")
    assert metrics["epoch"] == [0]
    (warning,) = metrics["warnings"]
    assert warning.startswith(
        "The training ended in epoch 0 of 0..3: EarlyStopping: Stopping threshold reached: val/acc"
    )


class Elsewhere(DummyLogger):
    """A logger that has no folder."""

    def __init__(self, project):
        super().__init__()
        self.project = project


class Passing(CSVLogger):
    """A logger that names no argument of its own."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)


def test_loggers_have_the_runs_folder_where_they_take_one(compose, tmp_path):
    passing = f"+logger.passing={{_target_:{__name__}.Passing}}"
    mine = f"+logger.mine={{_target_:{__name__}.Elsewhere,project:p}}"
    there = f"+logger.other={{_target_:lightning.pytorch.loggers.CSVLogger,save_dir:{tmp_path}/there}}"
    csv_logger, other, mine, passing = build_loggers(compose(*TINY, there, mine, passing), tmp_path)
    assert Path(passing.save_dir) == tmp_path
    assert Path(csv_logger.save_dir) == tmp_path
    assert Path(other.save_dir) == tmp_path / "there"
    assert mine.project == "p"


def test_names_that_mlflow_refuses_are_spelled_out():
    names = ["val/precision/C++", "val/precision/C#", "val/precision/猫", "val/acc"]
    expected = ["val/precision/C_2b_2b", "val/precision/C_23", "val/precision/_732b", "val/acc"]
    assert [spelled_out(name) for name in names] == expected


def test_one_process_at_a_time_makes_mlflows_tables(tmp_path, monkeypatch):
    database = tmp_path / "new" / "mlflow.db"

    def taken():
        with pytest.raises(BlockingIOError):
            lock(database.with_name(".mlflow.db.lock"), wait=False)

    def make(self, **kwargs):
        taken()
        made.append(kwargs)

    made = []
    monkeypatch.setattr(loggers.MLFlowLogger, "__init__", make)
    monkeypatch.setattr(loggers.MLFlowLogger, "experiment", property(lambda self: taken()))
    logger = MLFlowLogger(f"sqlite:///{database}", experiment_name="x")
    assert made == [{"tracking_uri": f"sqlite:///{database}", "experiment_name": "x"}]
    assert logger.experiment is None
    lock(database.with_name(".mlflow.db.lock"), wait=False).close()


@pytest.mark.filterwarnings("ignore")  # of MLflow's own dependencies
@pytest.mark.slow
def test_mlflow_by_config_alone(compose, tmp_path):
    pytest.importorskip("mlflow", reason="needs pip install cifar_tl[mlflow]")
    from mlflow import MlflowClient

    database = f"sqlite:///{tmp_path / 'mlflow.db'}"
    metrics = train(compose(*TINY, "logger=mlflow", f"logger.mlflow.tracking_uri={database}"), tmp_path / "run", "demo")
    client = MlflowClient(database)
    (experiment,) = (e for e in client.search_experiments() if e.name == "cifar_tl")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.metrics["val/acc"] == pytest.approx(metrics["val/acc"][-1])
    assert run.data.metrics["test/acc"] == pytest.approx(metrics["test/acc"])
    assert run.data.params["finetune/optimizer"] == "adamw"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("+callbacks.mine.patience=3", r"callbacks\.mine has no _target_"),
        (
            "+callbacks.mine={_target_:cifar_tl.callbacks.FreezeGuard,unfreeze_at_epoch:???}",
            r"^callbacks\.mine\.unfreeze_at_epoch= is missing",
        ),
        ("+callbacks.mine._target_=nowhere.Callback", r"callbacks\.mine: nowhere\.Callback cannot be built"),
        ("logger.csv._target_=lightning.pytorch.loggers.CSV", r"logger\.csv: .* cannot be built"),
    ],
)
def test_a_callback_or_logger_that_cannot_be_built_is_named(compose, tmp_path, override, said):
    with pytest.raises(UserError, match=said):
        train(compose(*TINY, override), tmp_path, "demo")


def test_lightning_loads_a_checkpoint_by_itself(tiny_run, tiny_checkpoint):
    module = ResNet50Classifier.load_from_checkpoint(tiny_checkpoint, weights_only=True).eval()
    trained = load_trained(tiny_checkpoint)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(module(images), trained.module(images), rtol=0, atol=0)
    assert module.hparams["classes"] == json.loads((tiny_run / "metrics.json").read_text())["classes"]


@pytest.mark.slow
def test_a_training_that_collapses_says_so(compose, tmp_path, caplog):
    healthy = train(compose(*TINY), tmp_path / "healthy", "demo")
    assert healthy["warnings"] == []
    planted = (*SGD, "finetune.backbone_lr=1e6", "finetune.head_lr_unfrozen=1e6")
    metrics = train(compose(*TINY, *planted), tmp_path / "planted", "demo")
    (warning,) = [w for w in metrics["warnings"] if "not a finite number" in w]
    assert "from epoch 2 on" in warning
    assert "finetune.backbone_lr=1e+06" in warning
    assert f"warning: {warning}" in caplog.text
    text = (tmp_path / "planted" / "metrics.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert metrics["train/loss"][2] is None
    assert metrics["status"] == "finished"


def test_a_run_has_its_own_peak_of_memory_in_a_process_that_had_another():
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("the system does not let a process forget its peak")
    hardware.keep_freed_memory()
    hardware.forget_peak_memory("cpu")
    torch.ones(2**29, dtype=torch.uint8)  # half a GiB, freed at once
    before = hardware.peak_memory("cpu")["host"]
    hardware.forget_peak_memory("cpu")
    assert hardware.peak_memory("cpu")["host"] < before - 0.25


def test_a_run_forgets_the_peak_of_the_one_before(compose, tmp_path, monkeypatch):
    def forgets(accelerator):
        raise StopIteration(accelerator)

    monkeypatch.setattr("cifar_tl.train.forget_peak_memory", forgets)
    with pytest.raises(StopIteration, match="cpu"):
        train(compose(*TINY), tmp_path, "demo")


def test_validation_that_falls_at_the_unfreeze_is_a_collapse():
    schedule = FinetuneSchedule(max_epochs=4, unfreeze_at_epoch=2, head_lr=1e-3, backbone_lr=1e-2)

    def warnings(after, images=5000, batchnorm="frozen"):
        accuracies = [0.5, 0.6, after, 0.7]
        losses = {"train/loss": 1.0, "val/loss": 1.0}
        epochs = [{"epoch": e, "val/acc": a, **losses} for e, a in enumerate(accuracies)]
        return collapse_warnings(epochs, schedule, images, batchnorm)

    assert warnings(after=0.56) == []
    assert warnings(after=0.4, images=20) == []  # four images
    (warning,) = warnings(after=0.54)
    assert "fell from 60.00% to 54.00%" in warning
    assert "Likely: finetune.backbone_lr=0.01" in warning
    assert "model.filter_rms" in warning
    (warning,) = warnings(after=0.54, batchnorm="train")
    assert "Likely: finetune.batchnorm=train leaves the statistics of pretraining (frozen keeps them), or" in warning
    assert "finetune.backbone_lr=0.01" in warning


def test_validation_that_falls_at_a_change_of_scale_is_a_collapse():
    schedule = FinetuneSchedule(
        max_epochs=4, unfreeze_at_epoch=1, head_lr=1e-3, backbone_lr=1e-2, progressive_resizing=[1, 2, 3]
    )
    epochs = [{"epoch": e, "val/acc": a, "train/loss": 1.0} for e, a in enumerate([0.5, 0.6, 0.58, 0.5])]
    (warning,) = collapse_warnings([{**epoch, "val/loss": 1.0} for epoch in epochs], schedule, 5000, "frozen")
    assert "fell from 58.00% to 50.00% in the first epoch of 'fine-tune at 96x96'" in warning


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_gradients_are_clipped_in_mixed_precision(compose, tmp_path, optimizer):
    clipping = ("trainer.precision=bf16-mixed", "+trainer.gradient_clip_val=1e-2", f"finetune.optimizer={optimizer}")
    free = train(compose(*TINY, *clipping[::2]), tmp_path / "free", "demo")
    clipped = train(compose(*TINY, *clipping), tmp_path / "clipped", "demo")
    assert clipped["status"] == "finished"
    assert clipped["train/loss"] != free["train/loss"]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError("NCCL error: unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'"),
    ],
)
def test_a_full_gpu_gets_advice_whoever_notices_it(compose, tmp_path, monkeypatch, error):
    def full(self, batch, batch_idx):
        raise error

    monkeypatch.setattr(ResNet50Classifier, "training_step", full)
    with pytest.raises(UserError, match=r"out of memory\. Lower data\.batch_size=16, or data\.eval_batch_size=500 if"):
        train(compose(*TINY), tmp_path, "demo")


def test_metrics_are_written_as_the_numbers_that_they_are(run):
    metrics = json.loads((run / "metrics.json").read_text())
    numbers = [*metrics["val/acc"], metrics["test/acc"], *metrics["test/recall"], metrics["lr/head"][0]]
    assert all(len(repr(number)) <= 12 for number in numbers), numbers
    assert metrics["test/acc"] == round(20 * metrics["test/acc"]) / 20  # of 20 images


@pytest.mark.slow
@pytest.mark.parametrize("logger", ["tensorboard", "csv"])
def test_a_run_names_the_figures_that_it_has(compose, tmp_path, caplog, logger):
    caplog.set_level(logging.INFO)
    train(compose(*TINY[:-1], f"logger={logger}", "trainer.max_epochs=3"), tmp_path, "demo")
    assert (f"figures     tensorboard --logdir {tmp_path}" in caplog.text) == (logger == "tensorboard")


@pytest.mark.slow
def test_targets_of_any_kind_are_counted(compose, tmp_path):
    short = ("trainer.max_epochs=2", "finetune.unfreeze_at_epoch=1")
    kinds = {"indices": (), "one_hot": ("data.one_hot=true",), "mixed": ("augment.mixup=0.3",)}
    runs = {kind: train(compose(*TINY, *short, *keys), tmp_path / kind, "demo") for kind, keys in kinds.items()}
    for name in ("train/loss", "train/acc", "val/loss", "val/acc"):
        assert runs["one_hot"][name] == pytest.approx(runs["indices"][name], rel=1e-4), name
    assert all(0 <= accuracy <= 1 for accuracy in runs["mixed"]["train/acc"])


@pytest.mark.slow
def test_images_of_mistakes_are_those_of_the_test_set_whatever_the_limit(compose, tmp_path):
    few = ("data.limit=12", "trainer.max_epochs=1", "finetune.unfreeze_at_epoch=null")
    train(compose(*TINY, *few), tmp_path, "demo")
    images, _ = Synthetic(60, 20).test()
    shown = read_images(tmp_path)
    assert max(shown) >= 12, "else a position in the limited set would do"
    for index, image in shown.items():
        np.testing.assert_array_equal(image, images[index].permute(1, 2, 0).numpy())


@pytest.mark.slow
def test_learning_rates_are_logged_as_the_schedule_has_them(compose, tmp_path):
    cfg = compose(*TINY, "trainer.log_every_n_steps=2")
    metrics = train(cfg, tmp_path, "demo")
    for name in ("head", "backbone"):
        expected = [build_schedule(cfg).learning_rates(epoch, 2, 3)[name] for epoch in range(4)]
        assert metrics[f"lr/{name}"] == pytest.approx(expected, rel=1e-5)


def test_mistakes_are_told_before_anything_is_downloaded(compose, tmp_path, monkeypatch):
    def download(*args, **kwargs):
        raise AssertionError("downloaded")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    monkeypatch.setattr("cifar_tl.data.download.ensure", download)
    with pytest.raises(UserError, match=r"data\.root"):
        train(compose("data=folder", f"data.root={tmp_path / 'nowhere'}"), tmp_path / "run", "default")
    with pytest.raises(UserError, match=r"model\.weights=nowhere\.pth: no such file"):
        train(compose("model.weights=nowhere.pth", f"data.root={tmp_path}"), tmp_path / "run", "default")


@pytest.mark.slow
def test_weights_of_a_run_that_was_trained_on_other_images_are_warned_of(compose, tmp_path, tiny_run, caplog):
    weights = f"model.weights={tiny_run / 'checkpoints' / 'best.ckpt'}"
    old = tmp_path / "old.pth"
    torch.save(load_trained(tiny_run).module.backbone.state_dict(), old, _use_new_zipfile_serialization=False)
    for other in ([], [f"model.weights={old}", "data.split_seed=7"], ["data.split_seed=7"]):
        metrics = train(
            compose(*TINY, weights, "trainer.max_epochs=1", "finetune=head_only", *other),
            tmp_path / str(len(other)),
            "demo",
        )
        assert metrics["weights_sha256"]
        assert ("was trained on other images than this run's" in caplog.text) == (other == ["data.split_seed=7"])
