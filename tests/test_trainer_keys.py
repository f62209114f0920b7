"""Keys of Lightning's Trainer: what is taken works and is recorded as it was done; the rest is refused by name."""

import ctypes
import inspect
import json
import logging
import os
import re
import subprocess
import sys
import warnings
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from conftest import TINY
from lightning.pytorch.callbacks import RichProgressBar, Timer, TQDMProgressBar
from torch import nn

from cifar_tl import hardware
from cifar_tl.build import build_callbacks, build_datamodule
from cifar_tl.callbacks.epoch_timer import EpochTimer
from cifar_tl.callbacks.phase_log import PhaseLog
from cifar_tl.errors import Interrupted, UserError
from cifar_tl.model.backbone import Backbone
from cifar_tl.model.module import ResNet50Classifier
from cifar_tl.reports.run_page import write_run_report
from cifar_tl.runs.predictions import read_predictions
from cifar_tl.schedule import FinetuneSchedule
from cifar_tl.train import train
from cifar_tl.trainer import Bar, build_trainer, check_processes, check_strategy, check_trainer

CPU = {"accelerator": "cpu", "devices": 1, "strategy": "auto", "precision": "32-true", "max_epochs": 3}


def last_epoch(folder, name="last"):
    return torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)["epoch"]


@pytest.mark.slow
def test_an_epoch_without_validation_has_no_figures_of_another_one(compose, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    metrics = train(compose(*TINY, "+trainer.check_val_every_n_epoch=2"), tmp_path, "demo")
    assert [value is None for value in metrics["val/acc"]] == [True, False, True, False]
    assert [value is None for value in metrics["val/loss"]] == [True, False, True, False]
    assert None not in metrics["train/loss"]
    assert metrics["best/epoch"] in (1, 3)
    assert last_epoch(tmp_path, "best") == metrics["best/epoch"]
    assert "phase      fine-tune, epochs 2..3: head and whole backbone; adamw, cosine learning rate" in caplog.text
    assert re.search(r"\n +head +270,976 parameters train +learning rate 0\.002 +weight decay 0\.05\n", caplog.text)
    assert "  BatchNorm          train: statistics of each batch" in caplog.text
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("epoch ")]
    assert ["val loss" in line for line in lines] == [False, True, False, True]
    write_run_report(tmp_path)  # draws what is there


@pytest.fixture
def hours_from_step(monkeypatch):
    """Let the Timer see hours go by from a given step on, counted from 1, and nothing before it."""

    def hours_from_step(first):
        steps, step = [], ResNet50Classifier.training_step
        monkeypatch.setattr(ResNet50Classifier, "training_step", lambda *args: (steps.append(1), step(*args))[1])
        monkeypatch.setattr(Timer, "time_elapsed", lambda *args: 1e6 if len(steps) >= first else 0.0)

    return hours_from_step


@pytest.mark.slow
def test_max_time_ends_a_run_that_is_validated_and_tested(compose, tmp_path, hours_from_step, caplog):
    hours_from_step(5)  # the second of three in the second epoch
    metrics = train(compose(*TINY, "+trainer.max_time='00:01:00:00'"), tmp_path, "demo")
    assert metrics["status"] == "finished"
    assert metrics["epoch"] == [0, 1]
    assert None not in metrics["val/acc"]
    assert [value is None for value in metrics["train/loss"]] == [False, True]
    said = "The training ended in epoch 1 of 0..3: trainer.max_time is over."
    assert metrics["warnings"] == [said]
    assert said in caplog.text
    assert said in write_run_report(tmp_path).read_text()


@pytest.mark.slow
def test_a_run_that_goes_on_after_half_an_epoch_says_so(compose, tmp_path, hours_from_step):
    hours_from_step(5)
    train(compose(*TINY, "+trainer.max_time='00:01:00:00'"), tmp_path, "demo")
    metrics = train(compose(*TINY, f"resume={tmp_path}"), tmp_path, "demo")
    assert metrics["epoch"] == [0, 1, 2, 3]
    assert metrics["warnings"] == ["Epoch 1 was cut short, and the run went on with the one after it."]


@pytest.mark.slow
def test_a_run_that_is_killed_while_it_is_tested_records_the_same_when_it_goes_on(
    compose, tmp_path, monkeypatch, hours_from_step
):
    def killed(*arguments):
        raise SystemExit  # as after Ctrl-C

    hours_from_step(5)
    keys = (*TINY, "+trainer.max_time='00:01:00:00'")
    with monkeypatch.context() as patched:
        patched.setattr(ResNet50Classifier, "test_step", killed)
        with pytest.raises(Interrupted):
            train(compose(*keys), tmp_path, "demo")
    before = json.loads((tmp_path / "metrics.json").read_text())
    after = train(compose(*keys, f"resume={tmp_path}"), tmp_path, "demo")
    assert after["status"] == "finished"
    assert "The training ended in epoch 1 of 0..3: trainer.max_time is over." in after["warnings"]
    for key in ("warnings", "features", "epoch", "plan"):
        assert after[key] == before[key], key
    assert [start["epoch"] for start in after["starts"]] == [0, 2]  # the second one has tested


@pytest.mark.slow
def test_a_training_that_ends_before_any_validation_tests_nothing(compose, tmp_path, hours_from_step):
    hours_from_step(2)
    keys = ("+trainer.max_time='00:01:00:00'", "+trainer.check_val_every_n_epoch=2")
    with pytest.raises(UserError, match=r"No epoch was validated.*trainer\.max_time is over.*last\.ckpt"):
        train(compose(*TINY, *keys), tmp_path, "demo")
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["status"] == "failed"
    assert "test/acc" not in metrics
    assert last_epoch(tmp_path) == 0


def test_no_time_at_all_is_said(compose, tmp_path, hours_from_step):
    hours_from_step(0)
    with pytest.raises(UserError, match="ended before its first epoch was over"):
        train(compose(*TINY, "+trainer.max_time='00:01:00:00'"), tmp_path, "demo")


@pytest.mark.slow
def test_a_share_of_an_epoch_that_is_no_step_is_refused(compose, tmp_path):
    with pytest.raises(UserError, match=r"Lightning refuses a key of trainer.*0\.01"):
        train(compose(*TINY, "+trainer.limit_train_batches=0.01"), tmp_path, "demo")


@pytest.mark.slow
def test_a_limit_of_training_steps_is_kept(compose, tmp_path, monkeypatch):
    images = []
    end = EpochTimer.on_train_epoch_end
    monkeypatch.setattr(EpochTimer, "on_train_epoch_end", lambda self, *a: (images.append(self.images), end(self, *a)))
    metrics = train(compose(*TINY, "+trainer.limit_train_batches=2"), tmp_path, "demo")
    assert set(images) == {32}
    assert None not in metrics["train/loss"]
    assert not any("The training ended" in warning for warning in metrics["warnings"])


@pytest.mark.slow
def test_gradients_of_several_batches_make_one_step(compose, tmp_path):
    metrics = train(compose(*TINY, "+trainer.accumulate_grad_batches=3"), tmp_path, "demo")
    assert metrics["status"] == "finished"
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 4


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ({"fast_dev_run": True}, "experiment=demo"),
        ({"limit_val_batches": 0}, "data.limit"),
        ({"limit_test_batches": 1}, "data.limit"),
        ({"overfit_batches": 1}, "data.limit"),
        ({"val_check_interval": 0.5}, "check_val_every_n_epoch"),
        ({"callbacks": "x"}, r"\+callbacks\.NAME"),
        ({"logger": False}, "logger=csv"),
        ({"default_root_dir": "x"}, r"hydra\.run\.dir"),
        ({"plugins": "x"}, "not supported"),
        ({"gradient_clip": 1}, "gradient_clip_val"),
        ({"log_every_n_steps": 0}, "log_every_n_steps=0"),
        ({"log_every_n_steps": None}, "log_every_n_steps=None"),
        ({"max_steps": 8}, r"\+trainer\.limit_train_batches"),
        ({"accumulate_grad_batches": 0}, "accumulate_grad_batches=0"),
        ({"precision": "bf16-true"}, "precision=bf16-true is not allowed: choose auto, 32-true, bf16-mixed, 16-mixed"),
        ({"limit_train_batches": 0}, "leaves nothing to train on"),
        ({"check_val_every_n_epoch": 0}, "check_val_every_n_epoch=0"),
        ({"check_val_every_n_epoch": 21}, "never reached"),
    ],
    ids=str,
)
def test_what_a_run_cannot_honour_is_refused_by_name(compose, key, said):
    with pytest.raises(UserError, match=said):
        check_trainer({**compose("trainer=cpu").trainer, **key})


def test_the_users_keys_win_over_the_programs(compose):
    trainer = {**compose("trainer=cpu").trainer, "benchmark": False, "enable_model_summary": True}
    built = build_trainer(trainer, logger=False, enable_model_summary=False, enable_checkpointing=False)
    assert any(type(callback).__name__ == "RichModelSummary" for callback in built.callbacks)


TINY_NUMBERS = """
import sys, torch
from pathlib import Path
from cifar_tl import cli, train

def stop(cfg):
    raise RuntimeError("stop")

train.build_datamodule = stop  # what comes first is what this is about
try:
    train.train(cli.compose("train", ["experiment=demo"]), Path("run"), "demo")
except RuntimeError:
    pass
product = torch.full((1500, 1500), 1e-30) @ torch.full((1500, 1500), 1e-9)
print(torch.get_num_threads(), product.min().item(), product.max().item())
"""


@pytest.mark.slow
@pytest.mark.skipif(not torch.set_flush_denormal(True), reason="this CPU cannot flush numbers that are all but zero")
def test_numbers_that_are_all_but_zero_cost_no_time_in_any_thread():
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONPATH": os.pathsep.join(sys.path)}
    out = subprocess.run([sys.executable, "-c", TINY_NUMBERS], env=environment, capture_output=True, text=True)
    assert out.stdout.split() == ["2", "0.0", "0.0"], out.stderr


@pytest.mark.parametrize(
    ("devices", "environment", "index"),
    [
        (1, {}, 0),
        ("auto", {}, 0),
        ([1], {}, 1),
        ("1,", {}, 1),
        ([0, 2], {"LOCAL_RANK": "1"}, 2),
        ("2,0", {"LOCAL_RANK": "1"}, 0),
        (4, {"LOCAL_RANK": "3"}, 3),
        ("auto", {"SLURM_LOCALID": "2"}, 2),
        ([], {}, None),  # what Lightning refuses
        (["a"], {}, None),
        ([0], {"SLURM_LOCALID": "1"}, None),
    ],
)
def test_the_device_asked_for_is_the_one_that_is_named(monkeypatch, devices, environment, index):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for variable in ("LOCAL_RANK", "SLURM_LOCALID"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    hardware.select_gpu(devices, "cpu")  # GPUs that are not asked for may be full
    assert chosen == []
    hardware.select_gpu(devices, "cuda")
    assert chosen == ([] if index is None else [index])


def test_precisions_are_resolved_to_those_that_lightning_computes_in():
    for precision in hardware.PRECISIONS:
        resolved = hardware.resolve_precision(precision, "cpu")
        with warnings.catch_warnings(action="ignore"):
            trainer = L.Trainer(
                accelerator="cpu", precision="32-true" if precision == "auto" else precision, logger=False
            )
        assert trainer.precision == resolved


def test_several_processes_that_would_wait_for_the_frozen_backbone_are_refused(compose, tmp_path):
    with pytest.raises(UserError, match=r"2 processes would wait for gradients.*trainer=ddp"):
        train(compose(*TINY, "trainer.devices=2"), tmp_path, "demo")
    check_strategy(build_trainer({**CPU, "devices": 2}), FinetuneSchedule(3, 0, 1e-3, 1e-3), "frozen")
    check_strategy(
        build_trainer({**CPU, "devices": 2, "strategy": "ddp_find_unused_parameters_true"}),
        FinetuneSchedule(3, 1, 1e-3, 1e-3),
        "frozen",
    )


@pytest.fixture
def four_gpus(monkeypatch):
    """Let Lightning find GPUs, which nothing is computed on."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)


@pytest.mark.parametrize("batchnorm", ["train", "adapt"])
def test_statistics_that_several_processes_do_not_share_are_refused(compose, tmp_path, batchnorm):
    processes = ("trainer.devices=2", "trainer.strategy=ddp_find_unused_parameters_true")
    with pytest.raises(UserError, match=rf"batchnorm={batchnorm} is not possible in 2 processes.*trainer.devices=1"):
        train(compose(*TINY, *processes, f"finetune.batchnorm={batchnorm}"), tmp_path, "demo")


def test_gpus_share_the_statistics_that_train_and_no_processes_send_those_that_do_not(four_gpus):
    schedule = FinetuneSchedule(3, 0, 1e-3, 1e-3)
    trainer = {**CPU, "accelerator": "gpu", "strategy": "ddp", "devices": 4}
    built = build_trainer(trainer, logger=False, sync_batchnorm=True)
    check_strategy(built, schedule, "train")
    now = "forward_sync_buffers" in inspect.signature(nn.parallel.DistributedDataParallel).parameters
    assert built.strategy._ddp_kwargs["forward_sync_buffers" if now else "broadcast_buffers"] is False
    with pytest.raises(UserError, match=r"GPUs share them, unless trainer.sync_batchnorm=false was given\."):
        check_strategy(build_trainer({**trainer, "sync_batchnorm": False}, logger=False), schedule, "train")
    with pytest.raises(UserError, match="adapt is not possible in 4 processes"):
        check_strategy(built, schedule, "adapt")


@pytest.mark.parametrize("batchnorm", ["train", "frozen"])
def test_processes_share_the_statistics_of_runs_whose_batchnorm_trains(compose, tmp_path, monkeypatch, batchnorm):
    def built(keys, **extra):
        raise StopIteration(extra["sync_batchnorm"])

    monkeypatch.setattr("cifar_tl.train.build_trainer", built)
    with pytest.raises(StopIteration, match=str(batchnorm == "train")):
        train(compose(*TINY, f"finetune.batchnorm={batchnorm}"), tmp_path, "demo")


def test_parameters_in_pieces_are_refused(four_gpus):
    built = build_trainer({**CPU, "accelerator": "gpu", "strategy": "fsdp", "devices": 4}, logger=False)
    with pytest.raises(UserError, match=r"FSDPStrategy is not supported.*Give trainer=ddp"):
        check_strategy(built, FinetuneSchedule(3, 0, 1e-3, 1e-3), "frozen")


@pytest.mark.parametrize(("key", "benchmark"), [({}, True), ({"deterministic": True}, False)])
def test_a_deterministic_run_does_not_choose_algorithms_by_their_time(monkeypatch, key, benchmark):
    given = {}
    monkeypatch.setattr("cifar_tl.trainer.resolve_accelerator", lambda name: "cuda")
    monkeypatch.setattr("cifar_tl.trainer.resolve_precision", lambda *_: "32-true")
    fake = SimpleNamespace(num_devices=1, num_nodes=1, strategy=None)
    monkeypatch.setattr("cifar_tl.trainer.L.Trainer", lambda **keys: given.update(keys) or fake)
    build_trainer({**CPU, **key})
    assert given["benchmark"] == benchmark


@pytest.mark.parametrize(("batches", "accumulated", "every"), [(176, 1, 50), (5, 1, 5), (176, 8, 22), (3, 8, 1)])
def test_steps_are_logged_in_each_epoch_however_few_it_has(batches, accumulated, every):
    trainer = SimpleNamespace(num_training_batches=batches, accumulate_grad_batches=accumulated, log_every_n_steps=50)
    trainer.current_epoch = 0
    PhaseLog(FinetuneSchedule(2, 1, 1e-3, 1e-3), "frozen").on_train_start(trainer, SimpleNamespace())
    assert trainer.log_every_n_steps == every


def test_more_processes_than_images_of_a_split_are_refused():
    check_processes({"train": 9, "val": 4, "test": 4}, 4)
    with pytest.raises(UserError, match=r"4 processes cannot share 3 val images. .*trainer\.devices="):
        check_processes({"train": 9, "val": 3, "test": 4}, 4)


def test_the_progress_bar_has_no_version_of_a_logger(monkeypatch):
    monkeypatch.setattr(RichProgressBar, "get_metrics", lambda *_: {"v_num": "rd_0", "mine": 1})
    assert Bar().get_metrics(SimpleNamespace(), SimpleNamespace()) == {"mine": 1}


def test_the_progress_bar_has_the_loss_and_reads_it_once_a_second(monkeypatch):
    now, bar, trainer = [0.0], Bar(), SimpleNamespace(progress_bar_metrics={"train/loss_step": 2.0}, loggers=[])
    monkeypatch.setattr("cifar_tl.trainer.time.monotonic", lambda: now[0])
    assert bar.get_metrics(trainer, SimpleNamespace()) == {"train/loss_step": 2.0}
    trainer.progress_bar_metrics = {"train/loss_step": 1.0}
    for now[0], loss in ((0.9, 2.0), (1.0, 1.0)):
        assert bar.get_metrics(trainer, SimpleNamespace()) == {"train/loss_step": loss}


def test_the_progress_bar_can_be_switched_off_at_a_terminal(compose, tmp_path, monkeypatch):
    monkeypatch.setattr("cifar_tl.build.progress_bar", lambda: [RichProgressBar()])
    for value, shown in ((True, 1), (False, 0)):
        cfg = compose(*TINY, f"+trainer.enable_progress_bar={value}")
        callbacks = build_callbacks(
            cfg, build_datamodule(cfg), {"weights_sha256": None, "experiment": "demo"}, tmp_path
        )
        trainer = build_trainer(cfg.trainer, logger=False, callbacks=callbacks)
        assert sum(isinstance(callback, RichProgressBar) for callback in trainer.callbacks) == shown


@pytest.mark.parametrize("terminal", [True, False])
def test_ones_own_progress_bar_takes_the_place_of_the_runs(compose, tmp_path, monkeypatch, terminal):
    monkeypatch.setattr("cifar_tl.build.progress_bar", lambda: [RichProgressBar()] if terminal else [])
    cfg = compose(*TINY, "+callbacks.bar._target_=lightning.pytorch.callbacks.TQDMProgressBar")
    callbacks = build_callbacks(cfg, build_datamodule(cfg), {"weights_sha256": None, "experiment": "demo"}, tmp_path)
    bars = [c for c in build_trainer(cfg.trainer, logger=False, callbacks=callbacks).callbacks if "Bar" in str(type(c))]
    assert [type(bar) for bar in bars] == [TQDMProgressBar]


@pytest.mark.parametrize("target", ["EMAWeightAveraging", "StochasticWeightAveraging"])
def test_other_averages_of_weights_than_the_one_that_is_there_are_refused(compose, tmp_path, target):
    rate = ["+callbacks.mean.swa_lrs=0.1"] if target.startswith("Stochastic") else []
    cfg = compose(*TINY, f"+callbacks.mean._target_=lightning.pytorch.callbacks.{target}", *rate)
    with pytest.raises(UserError, match=f"callbacks.mean: {target} is not supported"):
        build_callbacks(cfg, build_datamodule(cfg), {"weights_sha256": None, "experiment": "demo"}, tmp_path)


@pytest.mark.slow
def test_a_profiler_reports(compose, tmp_path, caplog):
    keys = ("trainer.max_epochs=1", "finetune.unfreeze_at_epoch=null", "+trainer.profiler=simple")
    train(compose(*TINY, *keys), tmp_path, "demo")
    assert "FIT Profiler Report" in caplog.text


def test_memory_is_what_the_control_groups_leave(tmp_path, monkeypatch):
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    new, old = tmp_path / "job" / "step", tmp_path / "memory" / "job"
    for folder in (new, old):
        folder.mkdir(parents=True)
    monkeypatch.setattr(hardware, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(hardware, "CGROUP_MOUNT", tmp_path)
    (new / "memory.max").write_text("max\n")
    (old / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    for lines in ("0::/job/step\n", "9:name=systemd:/job\n4:cpu,memory:/job\n0::/\n"):
        hardware.CGROUPS.write_text(lines)
        assert hardware.host_memory() == machine
    (new.parent / "memory.max").write_text("1000\n")  # of the job, which holds for its step
    hardware.CGROUPS.write_text("0::/job/step\n")
    assert hardware.host_memory() == 1000
    (old / "memory.limit_in_bytes").write_text("2000\n")
    hardware.CGROUPS.write_text("4:cpu,memory:/job\n0::/\n")
    assert hardware.host_memory() == 2000


def test_each_device_is_found_and_gets_its_way_of_computing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert hardware.resolve_accelerator("auto") == "cuda"
    for capability, precision in (((8, 0), "bf16-mixed"), ((7, 5), "32-true")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda of=capability: of)
        assert hardware.resolve_precision("auto", "cuda") == precision
    module, before = nn.ModuleDict({"backbone": Backbone(upscale=1)}), torch.get_float32_matmul_precision()
    hardware.prepare_for("cpu", module)
    assert module["backbone"].tuned_for_cpu
    try:
        hardware.prepare_for("cuda", module)
        assert not module["backbone"].tuned_for_cpu
        assert module["backbone"].conv1.weight.is_contiguous(memory_format=torch.channels_last)
        assert torch.get_float32_matmul_precision() == "high"
        hardware.prepare_for("cpu", module)  # of another job in this process
        assert torch.get_float32_matmul_precision() == hardware.cpu_matmul_precision()
    finally:
        torch.set_float32_matmul_precision(before)


FAULTS = """
import resource, torch
from cifar_tl.hardware import prepare_for


def faults():
    for _ in range(30):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.zeros(2**26, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults())
prepare_for("cpu", torch.nn.ModuleDict({"backbone": torch.nn.Identity()}))
print(faults())
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="no glibc")
@pytest.mark.slow
@pytest.mark.parametrize("chosen", [False, True])
def test_the_memory_of_freed_tensors_is_kept_for_the_next_ones(chosen):
    env = {name: value for name, value in os.environ.items() if name not in hardware.ALLOCATOR_VARIABLES}
    env |= {"MALLOC_TRIM_THRESHOLD_": "131072"} if chosen else {}
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True, env=env)
    before, after = map(int, done.stdout.split())  # pages that the system had to find for one more tensor
    assert (after < before / 2) == (not chosen)


@pytest.mark.parametrize(
    ("vendor", "rounds", "chosen"),
    [("AuthenticAMD", False, "medium"), ("AuthenticAMD", True, "highest"), ("GenuineIntel", False, "highest")],
)
def test_onednn_multiplies_where_mkl_is_slow_and_never_where_it_would_round(monkeypatch, vendor, rounds, chosen):
    def product(a, b):
        if rounds and a.dtype == torch.float32 and torch.get_float32_matmul_precision() == "medium":
            a, b = a.bfloat16().float(), b.bfloat16().float()
        return torch.bmm(a.double(), b.double()).to(a.dtype)

    monkeypatch.setattr(hardware, "cpuinfo", lambda key: {"vendor_id": [vendor]}[key])
    monkeypatch.setattr(torch.Tensor, "__matmul__", product)
    before = torch.get_float32_matmul_precision()
    assert hardware.cpu_matmul_precision.__wrapped__() == chosen
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.parametrize("terminal", [True, False])
def test_an_evaluation_has_a_progress_bar_at_a_terminal(monkeypatch, terminal):
    monkeypatch.setattr("cifar_tl.trainer.progress_bar", lambda: [RichProgressBar()] if terminal else [])
    trainer = build_trainer(CPU, logger=False)  # without callbacks, as cifar_tl.evaluate builds it
    assert (trainer.progress_bar_callback is not None) == terminal


@pytest.mark.slow
def test_early_stopping_counts_validations_rather_than_epochs(compose, tmp_path):
    keys = ("callbacks=early_stopping", "callbacks.early_stopping.patience=1", "finetune.unfreeze_at_epoch=3")
    still = ("finetune.batchnorm=frozen", "finetune.head_lr=0", "finetune.head_lr_unfrozen=0", "finetune.backbone_lr=0")
    sparse = ("trainer.max_epochs=8", "+trainer.check_val_every_n_epoch=2")
    assert train(compose(*TINY, *keys, *still, *sparse), tmp_path, "demo")["epoch"] == [0, 1, 2, 3, 4, 5]


@pytest.mark.slow
def test_predictions_of_the_frozen_phase_are_of_its_last_epoch_or_of_none(compose, tmp_path):
    train(compose(*TINY, "+trainer.check_val_every_n_epoch=2", "finetune.unfreeze_at_epoch=3"), tmp_path, "demo")
    assert read_predictions(tmp_path).frozen is None


def test_images_of_all_processes_count():
    timer, trainer = EpochTimer(), SimpleNamespace(world_size=2, is_last_batch=True)
    module = SimpleNamespace(device=torch.device("cpu"))
    timer.on_train_batch_start(trainer, module, (torch.zeros(5), None), 0)
    timer.on_train_batch_end(trainer, module, None, (torch.zeros(5), None), 0)
    assert timer.images == 10


def test_the_time_of_an_epoch_is_that_of_what_a_gpu_was_given(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    timer, trainer = EpochTimer(), SimpleNamespace(world_size=1, is_last_batch=False)
    module = SimpleNamespace(device=torch.device("cuda", 0))
    for is_last, expected in ((False, []), (True, [module.device])):
        trainer.is_last_batch = is_last
        timer.on_train_batch_start(trainer, module, (torch.zeros(5), None), 0)
        timer.on_train_batch_end(trainer, module, None, (torch.zeros(5), None), 0)
        assert waited == expected


def test_a_time_as_a_mapping_is_refused(compose):
    with pytest.raises(UserError, match=r"trainer\.max_time=\{'hours': 1\} is not allowed: give DD:HH:MM:SS"):
        check_trainer(compose("+trainer.max_time={hours: 1}").trainer)
    check_trainer(compose("+trainer.max_time=00:01:00:00").trainer)
