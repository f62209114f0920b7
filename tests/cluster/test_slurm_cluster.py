"""On a real SLURM, which `tests/cluster/slurm.sh test` starts on this machine; skipped elsewhere."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(shutil.which("slurmctld") is None, reason="SLURM is not installed: tests/cluster/slurm.sh test"),
    pytest.mark.skipif(
        "CIFAR_TL_SLURM" not in os.environ, reason="no SLURM was started for tests: tests/cluster/slurm.sh test"
    ),
]

RUN = (
    *("data=synthetic", "data.train_size=140", "data.val_size=20", "data.test_size=20", "data.batch_size=20"),
    *("trainer.accelerator=cpu", "trainer.max_epochs=8", "finetune.unfreeze_at_epoch=2"),
    *("finetune.optimizer=sgd", "finetune.weight_decay=0"),
    *("finetune.cache_features=false", "finetune.frozen_augment=full", "model.weights=null", "logger=csv"),
)
"""6 steps an epoch, all of them through ResNet-50; seconds each."""


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Work in a folder of the test's, with one thread, and with this package and its plugins."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, sys.path)]))


def slurm(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def train(*arguments):
    command = [sys.executable, "-m", "cifar_tl.train", *RUN, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def metrics(folder):
    path = folder / "metrics.json"
    return json.loads(path.read_text()) if path.is_file() else {"status": "none", "epoch": []}


def wait(until, what, seconds=400):
    end = time.monotonic() + seconds
    while not (found := until()):
        assert time.monotonic() < end, f"{what} did not happen in {seconds} s\n{slurm('squeue')}"
        time.sleep(0.2)
    return found


def assert_same_run(folder, straight):
    """A run that was stopped and went on is the one that was not, bit for bit."""
    before, after = metrics(straight), metrics(folder)
    for key in ("epoch", "train/loss", "train/acc", "val/loss", "val/acc", "test/loss", "test/acc", "best/epoch"):
        assert after[key] == before[key], key
    weights, expected = (torch.load(f / "checkpoints" / "last.ckpt", weights_only=True) for f in (folder, straight))
    for name, tensor in expected["state_dict"].items():
        assert torch.equal(weights["state_dict"][name], tensor), name


def test_a_preempted_job_of_a_sweep_is_requeued_and_finishes_by_itself(tmp_path, capsys):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    start = time.monotonic()
    arguments = ["-m", "seed=0,1,2", "hydra.sweep.dir=sweep", "hydra/launcher=slurm", "hydra.launcher.cpus_per_task=1"]
    command = [sys.executable, "-m", "cifar_tl.train", *RUN, *arguments, "hydra.launcher.partition=low"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as sweep:
        jobs = [tmp_path / "sweep" / str(number) for number in range(3)]
        wait(
            lambda: all(len(metrics(job)["epoch"]) >= 3 for job in jobs[:2]) or sweep.poll(), "three epochs of two jobs"
        )
        assert sweep.poll() is None, sweep.stderr.read()
        submitted = time.monotonic()
        slurm("sbatch", "--partition=high", "--ntasks=1", "--output=/dev/null", "--wrap=sleep 10")
        stopped = wait(lambda: [j for j in jobs if metrics(j)["status"] == "interrupted"], "a preemption")[0]
        saved, grace = len(metrics(stopped)["epoch"]), time.monotonic() - submitted
        wait(lambda: metrics(stopped)["status"] == "running", "going on")
        waited = time.monotonic() - submitted
        out, err = sweep.communicate(timeout=600)
    assert sweep.returncode == 0, err
    assert [metrics(job)["status"] for job in jobs] == ["finished"] * 3
    rows = (tmp_path / "sweep" / "sweep.csv").read_text().splitlines()
    assert len(rows) == 4
    assert all("finished" in row for row in rows[1:])
    assert (tmp_path / "sweep" / "sweep_report.html").is_file()
    assert "best val/acc" in out
    logs = {job: (job / "train.log").read_text() for job in jobs}
    assert [job for job in jobs if "resuming" in logs[job]] == [stopped]
    assert logs[stopped].count(f"epoch  {saved}/7") == 1
    (states,) = {slurm("scontrol", "show", "job", job_of(stopped)).partition("Restarts=")[2][:1]}
    assert states == "1"
    train(f"seed={stopped.name}", "hydra.run.dir=straight")
    assert_same_run(stopped, tmp_path / "straight")
    with capsys.disabled():
        print(
            f"\npreempted: job {stopped.name} after {saved} of 8 epochs, saved {grace:.0f} s after the other job came, "
            f"trained again after {waited:.0f} s, restarts {states}; sweep {time.monotonic() - start:.0f} s"
        )


def job_of(folder):
    """Return SLURM's number of a job of the sweep."""
    return re.search(r"id: '?(\d+_\d+)", (folder / ".hydra" / "hydra.yaml").read_text())[1]


def test_two_processes_of_srun_train_in_one_folder_and_go_on_after_the_signal_before_the_limit(tmp_path, capsys):
    start = time.monotonic()
    ddp = f"{sys.executable} -m cifar_tl.train {' '.join(RUN)} trainer=ddp trainer.devices=2"
    script = f"#!/bin/bash\nsrun --kill-on-bad-exit=1 {ddp} trainer.accelerator=cpu\n"
    (tmp_path / "job.sh").write_text(script)
    job = slurm(
        *("sbatch", "--parsable", "--ntasks=2", "--signal=USR1@120", "--time=60", "--requeue", "--open-mode=append"),
        *("--output=job.out", "job.sh"),
    )
    (folder,) = wait(lambda: [path.parent for path in tmp_path.glob("outputs/slurm/*/metrics.json")], "an epoch")
    wait(lambda: len(metrics(folder)["epoch"]) >= 3, "three epochs")
    slurm("scancel", "--signal=USR1", job)  # as SLURM does two minutes before the limit
    wait(lambda: metrics(folder)["status"] == "interrupted", "saving")
    saved, signalled = len(metrics(folder)["epoch"]), time.monotonic()
    wait(lambda: metrics(folder)["status"] == "running", "going on")
    waited = time.monotonic() - signalled
    wait(lambda: metrics(folder)["status"] == "finished", "the end")
    wait(lambda: "report" in (tmp_path / "job.out").read_text(), "the page")
    restarts = slurm("scontrol", "show", "job", job).partition("Restarts=")[2][:1]
    said = (tmp_path / "job.out").read_text()
    assert restarts == "1"
    assert metrics(folder)["epoch"] == list(range(8))
    assert len(list((tmp_path / "outputs" / "slurm").iterdir())) == 1
    assert said.count("Test accuracy") == 1
    assert said.count("SLURM starts the job again, and it goes on by itself.") == 1
    assert said.count("epoch  7/7") == 1
    straight = ("trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu")
    train(*straight, "hydra.run.dir=straight")  # processes of Lightning's, without SLURM
    assert_same_run(folder, tmp_path / "straight")
    with capsys.disabled():
        print(
            f"\nsrun, 2 processes: stopped after {saved} of 8 epochs, trained again after {waited:.0f} s, "
            f"restarts {restarts}; {time.monotonic() - start:.0f} s"
        )


def test_a_sweep_that_slurm_refuses_says_why(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    command = [sys.executable, "-m", "cifar_tl.train", "-m", *RUN, "seed=0,1", "hydra/launcher=slurm"]
    done = subprocess.run([*command, "hydra.launcher.partition=nowhere"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "cannot be started" in done.stderr
    assert "nowhere" in done.stderr
    assert "Traceback" not in done.stderr


def test_processes_that_the_trainer_does_not_ask_for_are_refused_by_srun(tmp_path):
    command = ["srun", "--ntasks=2", sys.executable, "-m", "cifar_tl.train", *RUN]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert "srun started 2 processes, and trainer.devices=1 on 1 node(s) trains with 1" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_cancelled_job_stays_ended(tmp_path):
    (tmp_path / "job.sh").write_text(f"#!/bin/bash\nsrun {sys.executable} -m cifar_tl.train {' '.join(RUN)}\n")
    job = slurm("sbatch", "--parsable", "--output=job.out", "job.sh")
    (folder,) = wait(lambda: [path.parent for path in tmp_path.glob("outputs/slurm/*/metrics.json")], "an epoch")
    slurm("scancel", job)
    wait(lambda: metrics(folder)["status"] == "interrupted", "saving")
    state = wait(lambda: re.search(r"JobState=(CANCELLED)", slurm("scontrol", "show", "job", job)), "its end")
    assert state[1] == "CANCELLED"
    assert "Continue with" in (tmp_path / "job.out").read_text()
