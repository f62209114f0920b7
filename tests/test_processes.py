"""Several processes train as one does."""

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import SMALL, TINY
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from cifar_tl import processes
from cifar_tl.model.backbone import Backbone
from cifar_tl.runs.predictions import read_predictions

ARGUMENTS = (
    "data=synthetic",
    "data.train_size=125",
    "data.val_size=25",  # one process evaluates an image more than the other
    "data.test_size=25",
    "data.batch_size=10",
    "data.eval_batch_size=10",
    "trainer.accelerator=cpu",
    "trainer.max_epochs=5",
    "finetune.unfreeze_at_epoch=2",
    "finetune.weight_decay=0",
    "finetune.optimizer=sgd",  # Adam's and Muon's first steps depend on the signs of gradients that are all but zero
    "finetune.backbone_lr=1e-3",
    "finetune.cache_features=false",
    "finetune.frozen_augment=full",
    "model.weights=null",
    "logger=csv",
)
"""50 steps of 10 images, 20 of them with a frozen backbone."""


def run(folder, *arguments):
    command = [*SMALL, *ARGUMENTS, f"hydra.run.dir={folder}", *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((folder / "metrics.json").read_text())
    weights = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    return metrics, weights, done


@pytest.mark.parametrize("distills", [False, True])
@pytest.mark.timeout(600)
@pytest.mark.slow
def test_two_processes_train_as_one_does_across_the_unfreeze(tmp_path, distills):
    given = []
    if distills:
        torch.save(Backbone(upscale=1).state_dict(), tmp_path / "w.pth")
        given = [f"model.weights={tmp_path / 'w.pth'}", "finetune.distill_upscale=2"]
        given += [f"finetune.features_folder={tmp_path / 'features'}"]
    one, expected, _ = run(tmp_path / "one", *given)
    if distills:
        shutil.rmtree(tmp_path / "features")
    check = "+callbacks.ranks._target_=rank_check.RankCheck"
    two, weights, done = run(tmp_path / "two", "trainer=ddp", "trainer.devices=2", check, *given)
    for key in ("train/loss", "val/loss"):
        assert two[key] == pytest.approx(one[key], rel=1e-3), key
    assert two["test/loss"] == pytest.approx(one["test/loss"], rel=1e-3)
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-2, atol=1e-3, msg=name)
    assert done.stdout.count("2 processes agree") == 10  # both say so after each epoch
    assert done.stdout.count("Test accuracy") == 1  # only the first one tells of the run
    assert "sync_dist" not in done.stderr
    assert len(list((tmp_path / "two" / "csv").iterdir())) == 1
    ours, theirs = (read_predictions(tmp_path / name) for name in ("two", "one"))
    for split, accuracy in (("val", two["best/val/acc"]), ("test", two["test/acc"])):
        a, b = getattr(ours, split), getattr(theirs, split)
        assert (a.indices.tolist(), a.targets.tolist()) == (b.indices.tolist(), b.targets.tolist())
        assert a.accuracy == pytest.approx(accuracy)


@pytest.mark.timeout(900)
@pytest.mark.slow
def test_a_sweep_of_jobs_of_two_processes_each_has_a_clean_folder_per_job(tmp_path):
    # where the folder is not given, it has the time in its name, which each process has another one of
    sweep = ("-m", "seed=0,1", *TINY, "trainer.max_epochs=2", "finetune.unfreeze_at_epoch=1")
    processes = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "finetune.features_folder=null")
    processes += ("finetune.batchnorm=frozen",)
    command = [*SMALL, *sweep, *processes]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "outputs" / "sweeps").iterdir()
    jobs = sorted(path.parent for path in folder.glob("*/metrics.json"))
    assert [job.name for job in jobs] == ["0", "1"]
    assert [json.loads((job / "metrics.json").read_text())["seed"] for job in jobs] == [0, 1]
    for job in jobs:
        assert sorted(path.name for path in (job / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
        assert (job / "train.log").read_text().count("Test accuracy") == 1
    assert len((folder / "sweep.csv").read_text().splitlines()) == 3
    assert {path.name for path in tmp_path.iterdir()} == {"outputs"}


FAILING = """
from pathlib import Path
import lightning as L

class Failing(L.Callback):
    def on_train_epoch_start(self, trainer, pl_module):
        first, seed = trainer.global_rank == 0, trainer.datamodule.seed
        if trainer.current_epoch == 1 and first and seed == 0 and Path("down").exists():
            raise ConnectionError("no server")

    def on_train_end(self, trainer, pl_module):
        job = f"seed {trainer.datamodule.seed}, {trainer.world_size} processes, {trainer.max_epochs} epochs"
        Path(f"{job}: rank {trainer.global_rank}").touch()
"""
EPOCHS = """
# @package _global_
trainer:
  max_epochs: 2
finetune:
  unfreeze_at_epoch: 1
"""


@pytest.mark.timeout(900)
@pytest.mark.slow
def test_a_job_of_a_sweep_trains_as_it_does_alone_whatever_was_before_it(tmp_path):
    """Jobs of 2 and of 3 processes, two of which fail in mid-training, in the first process alone, and are resumed."""
    (tmp_path / "mine.py").write_text(FAILING)
    (tmp_path / "conf" / "sweep").mkdir(parents=True)
    (tmp_path / "conf" / "sweep" / "mine.yaml").write_text(EPOCHS)
    own = (*(key for key in TINY if "max_epochs" not in key), "data.batch_size=60", "finetune.batchnorm=frozen")
    own += ("trainer=ddp", "trainer.accelerator=cpu", "+callbacks.mine._target_=mine.Failing")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(__file__).parent), *sys.path])}
    environment.pop("OMP_NUM_THREADS", None)

    def command(*arguments):
        return subprocess.run([*SMALL, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True)

    def metrics(folder):
        return json.loads((tmp_path / folder / "metrics.json").read_text())

    (tmp_path / "down").touch()
    sweep = ("--config-dir=conf", "sweep=mine", "hydra.sweep.dir=sweep", "seed=0,1", "trainer.devices=2,3")
    done = command("-m", *own, *sweep)
    assert done.returncode == 1
    assert "2 of 4 jobs failed" in done.stderr
    ended = [(devices, rank) for devices in (2, 3) for rank in range(devices)]
    assert sorted(path.name for path in tmp_path.glob("seed*")) == [
        f"seed 1, {devices} processes, 2 epochs: rank {rank}" for devices, rank in ended
    ]
    assert [metrics(f"sweep/{job}")["status"] for job in range(4)] == ["failed", "failed", "finished", "finished"]
    for job, devices in ((2, 2), (3, 3)):
        sizes = ("trainer.max_epochs=2", "finetune.unfreeze_at_epoch=1", f"trainer.devices={devices}")
        done = command(*own, *sizes, "seed=1", f"hydra.run.dir=alone{devices}")
        assert done.returncode == 0, done.stderr
        ours, theirs = metrics(f"sweep/{job}"), metrics(f"alone{devices}")
        assert ours["train/loss"] == theirs["train/loss"]
        assert ours["test/acc"] == theirs["test/acc"]
        threads = [start["threads"] for run in (ours, theirs) for start in run["starts"]]
        assert threads == [max(1, len(os.sched_getaffinity(0)) // devices)] * 2

    (tmp_path / "down").unlink()
    done = command("-m", "resume=sweep")
    assert done.returncode == 0, done.stderr
    assert [[start["epoch"] for start in metrics(f"sweep/{job}")["starts"]] for job in range(4)] == [[0, 1]] * 2 + [
        [0]
    ] * 2
    assert [metrics(f"sweep/{job}")["status"] for job in range(4)] == ["finished"] * 4
    done = command("resume=alone2", "trainer.max_epochs=3")
    assert done.returncode == 0, done.stderr
    assert [start["epoch"] for start in metrics("alone2")["starts"]] == [0, 2]


@pytest.mark.parametrize(("lasts", "failed"), [(0, False), (60, False), (60, True)])
def test_a_process_that_does_not_end_ends_neither_this_one_nor_the_next_job(
    tmp_path, monkeypatch, caplog, lasts, failed
):
    monkeypatch.setattr(processes, "PATIENCE_S", 60 if lasts == 0 else 0.1)
    monkeypatch.setenv("MASTER_PORT", "1")
    launcher = _SubprocessScriptLauncher(LightningEnvironment(), num_processes=2, num_nodes=1)
    trainer = SimpleNamespace(world_size=2, strategy=SimpleNamespace(launcher=launcher))
    observer = _ChildProcessObserver(main_pid=os.getpid(), child_processes=launcher.procs)
    with suppress(ZeroDivisionError), processes.own_processes(trainer, tmp_path, goes_on=False):
        launcher.procs.append(child := subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({lasts})"]))
        os.environ |= {"MASTER_PORT": "2", "LOCAL_RANK": "0"}
        assert not failed or 1 / 0
    assert child.returncode == (0 if lasts == 0 else -signal.SIGKILL)
    assert observer._run(), "Lightning has nothing left to kill this process for"
    assert os.environ["MASTER_PORT"] == "1"
    assert "LOCAL_RANK" not in os.environ
    assert ("has not ended with the run" in caplog.text) == (lasts > 0 and not failed)


STUCK = """
import time
import lightning as L

class Stuck(L.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_rank == 0:
            raise RuntimeError("only here")
        time.sleep(600)
"""


@pytest.mark.timeout(900)
@pytest.mark.slow
def test_no_process_outlives_the_first_one(tmp_path):
    (tmp_path / "stuck.py").write_text(STUCK)
    processes = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "finetune.batchnorm=frozen")
    command = [
        sys.executable,
        "-m",
        "cifar_tl.train",
        *TINY,
        *processes,
        "hydra.run.dir=run",
        "+callbacks.mine._target_=stuck.Stuck",
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]), "OMP_NUM_THREADS": "1"}
    # all write to one pipe: where one were left, this would wait for it
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "RuntimeError: only here" in done.stderr
