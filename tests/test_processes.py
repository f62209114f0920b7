"""Several processes train as one does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import SMALL, TINY

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


@pytest.mark.timeout(600)
@pytest.mark.slow
def test_two_processes_train_as_one_does_across_the_unfreeze(tmp_path):
    one, expected, _ = run(tmp_path / "one")
    check = "+callbacks.ranks._target_=rank_check.RankCheck"
    two, weights, done = run(tmp_path / "two", "trainer=ddp", "trainer.devices=2", check)
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


LOGGER = """
from lightning.pytorch.loggers import CSVLogger

class Unreachable(CSVLogger):
    def log_hyperparams(self, params):
        if params["seed"] == 0:
            raise ConnectionError("no server")
"""


@pytest.mark.slow
def test_a_job_of_a_sweep_trains_as_it_does_alone_whatever_was_before_it(tmp_path):
    """The first job fails in the first process, before the others start; the next ones have 2 and 3 processes."""
    (tmp_path / "mine.py").write_text(LOGGER)
    own = (*TINY, "trainer.max_epochs=2", "finetune.unfreeze_at_epoch=1", "finetune.features_folder=null")
    own += ("trainer=ddp", "trainer.accelerator=cpu", "finetune.batchnorm=frozen", "data.batch_size=60")
    own += ("+logger.mine._target_=mine.Unreachable", "+logger.mine.save_dir=.")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(__file__).parent), *sys.path])}
    del environment["OMP_NUM_THREADS"]

    def command(*arguments):
        return subprocess.run([*SMALL, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True)

    done = command("-m", *own, "seed=0,1", "trainer.devices=2,3", "hydra.sweep.dir=sweep")
    assert done.returncode == 1
    assert "ConnectionError: no server" in done.stderr
    assert "2 of 4 jobs failed" in done.stderr
    for job, devices in ((2, 2), (3, 3)):
        alone = command(*own, "seed=1", f"trainer.devices={devices}", f"hydra.run.dir=alone{devices}")
        assert alone.returncode == 0, alone.stderr
        ours, theirs = (
            json.loads((tmp_path / folder / "metrics.json").read_text())
            for folder in (f"sweep/{job}", f"alone{devices}")
        )
        assert ours["train/loss"] == theirs["train/loss"]
        assert ours["test/acc"] == theirs["test/acc"]
        assert [start["threads"] for start in ours["starts"]] == [max(1, len(os.sched_getaffinity(0)) // devices)]
    (tmp_path / "mine.py").write_text(LOGGER.replace("== 0", "== 9"))  # the server is back
    done = command("-m", "resume=sweep")
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "sweep").glob("[0-3]/predictions.npz"))) == 4


STUCK = """
import time
import lightning as L

class Stuck(L.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_rank == 0:
            raise RuntimeError("only here")
        time.sleep(600)
"""


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
