"""Sweeps whose jobs run at the same time, and sweeps that are killed: every job has its result, once."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import joblib
import pytest
import torch
import yaml
from conftest import SMALL, TINY
from handmade import make_run
from hydra.core.hydra_config import HydraConfig
from joblib.externals.loky import get_reusable_executor

from cifar_tl import cli
from cifar_tl.errors import UserError
from cifar_tl.reports.run_training import repeat
from cifar_tl.reports.sweep_table import SweepTable
from cifar_tl.runs.folder import read_run
from cifar_tl.runs.resume import with_overrides_of_resumed_run

SHORT = (
    *(*TINY, "trainer.max_epochs=2", "finetune.unfreeze_at_epoch=1", "finetune.features_folder=null"),
    "trainer.log_every_n_steps=1",
)


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Run a task as cifar_tl.train in an empty folder; return its exit code and what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(SweepTable, "_draw_report", lambda self: None)

    def command(task, *arguments):
        code = cli.run(task, "train", list(arguments))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    yield command
    get_reusable_executor().shutdown(wait=True)  # its processes are in this test's folder


def states(sweep):
    """Return the state of every job that has begun, with what says whether it was computed again."""
    found = {}
    for path in sweep.glob("*/metrics.json"):
        metrics = json.loads(path.read_text())
        found[int(path.parent.name)] = (metrics["status"], metrics["started"], path.stat().st_mtime_ns)
    return found


def test_brackets_in_the_table_are_no_markup(command):
    def task(cfg):
        raise UserError("[/gloo/transport.cc] closed by peer")

    code, out, err = command(task, "-m", "logger=[csv],[tensorboard]", "hydra.sweep.dir='[old]'")
    assert code == 1
    for text in ("[old]", "logger=[csv]", "[/gloo/"):
        assert text in out + err
    assert "MarkupError" not in err
    assert [line for line in out.splitlines() if "logger=[csv]" in line]


def test_a_sweeps_folder_may_be_named_by_way_of_another_one(command, tmp_path):
    def task(cfg):
        raise UserError("no")

    code, _, err = command(task, "-m", "seed=1,2", "hydra.sweep.dir=other/../sweep")
    assert code == 1
    assert "error: job 1 (seed=2): no" in err
    assert (tmp_path / "sweep" / "sweep.csv").is_file()


@pytest.mark.parametrize(
    ("choice", "count", "some"),
    [
        ("seeds", 3, {"seed=2"}),
        ("lr", 9, {"finetune.backbone_lr=0.003", "finetune.head_lr_unfrozen=0.002"}),
        ("ablation", 24, {"ablate=adamw", "ablate=none", "seed=0"}),
    ],
)
def test_sweeps_that_are_ready_have_their_jobs(command, choice, count, some):
    jobs = []

    def task(cfg):
        jobs.append(HydraConfig.get().overrides.task)
        return 0.5

    code, _, err = command(task, "-m", f"sweep={choice}", "hydra.sweep.dir=sweep")
    assert code == 0, err
    assert len({tuple(job) for job in jobs}) == len(jobs) == count
    assert {override for job in jobs for override in job} >= some


def test_recipes_are_swept_in_one_folder_with_one_table(command, tmp_path):
    def task(cfg):
        return 0.5

    code, out, err = command(task, "-m", "experiment=best32,demo", "ablate=none,adamw")
    assert (code, err) == (0, "")
    (sweep,) = (tmp_path / "outputs" / "sweeps").iterdir()
    assert [path.name for path in (tmp_path / "outputs").iterdir()] == ["sweeps"]
    assert {path.name for path in sweep.iterdir() if path.is_dir()} == {"0", "1", "2", "3"}
    assert len((sweep / "sweep.csv").read_text().splitlines()) == 5
    assert "experiment=demo ablate=adamw" in out


@pytest.mark.timeout(900)
@pytest.mark.slow
def test_a_sweep_of_12_jobs_that_is_killed_twice_has_12_results_none_computed_twice(tmp_path):
    sweep, finished = tmp_path / "sweep", {}

    def start(*arguments):
        command = [*SMALL, "-m", *arguments]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        with (tmp_path / "log").open("a") as log:
            return subprocess.Popen(
                command, cwd=tmp_path, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    for job in (3, 8):
        process = start("resume=sweep") if finished else start("seed=range(12)", *SHORT, "hydra.sweep.dir=sweep")
        try:
            while not (sweep / str(job) / "checkpoints" / "last.ckpt").is_file():  # the test's timeout ends it
                assert process.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.02)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        before = {job: state for job, state in states(sweep).items() if state[0] == "finished"}
        assert len(before) < 12
        assert finished.items() <= before.items()
        finished = before
    configs = {path: path.read_bytes() for job in finished for path in (sweep / str(job) / ".hydra").iterdir()}
    process = start("resume=sweep")
    try:
        assert process.wait() == 0, (tmp_path / "log").read_text()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert {path: path.read_bytes() for path in configs} == configs
    assert len(list(sweep.glob("*/.hydra/config.yaml"))) == len(list(sweep.glob("*/.hydra/overrides.yaml"))) == 12
    after = states(sweep)
    assert sorted(after) == list(range(12))
    assert {state for state, *_ in after.values()} == {"finished"}
    assert finished.items() <= after.items()
    assert len((sweep / "sweep.csv").read_text().splitlines()) == 13
    assert "Traceback" not in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_jobs_at_the_same_time_share_the_cores_and_leave_the_table_and_every_reason(command, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    def task(cfg):
        folder = Path(HydraConfig.get().runtime.output_dir)
        threads = os.environ["OMP_NUM_THREADS"]
        (folder / "facts.json").write_text(json.dumps({"process": os.getpid(), "threads": int(threads)}))
        for _ in range(2000):  # ends when both jobs run
            if len(list(folder.parent.glob("*/facts.json"))) == 2:
                break
            time.sleep(0.1)
        if cfg.seed == 1:
            raise UserError("seed=1 is not allowed: give another one.")
        return 0.5

    code, out, err = command(task, "-m", "hydra/launcher=local", "seed=0,1", "hydra.sweep.dir=sweep")
    assert code == 1
    assert "error: job 1 (seed=1): seed=1 is not allowed: give another one." in err
    assert "1 of 2 jobs failed" in err
    assert "Traceback" not in err
    assert "best val/acc" in out
    facts = [json.loads((tmp_path / "sweep" / job / "facts.json").read_text()) for job in "01"]
    assert len({os.getpid(), *(fact["process"] for fact in facts)}) == 3
    assert {fact["threads"] for fact in facts} == {max(joblib.cpu_count() // 2, 1)}
    rows = (tmp_path / "sweep" / "sweep.csv").read_text().splitlines()
    assert ["failed" in row for row in rows[1:]] == [False, True]


@pytest.mark.slow
def test_a_job_whose_process_is_killed_is_named_and_the_sweep_can_go_on(command):
    def task(cfg):
        if cfg.seed == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return 0.5

    code, _, err = command(task, "-m", "hydra/launcher=local", "seed=0,1", "hydra.sweep.dir=sweep")
    assert code == 1
    assert "The process of a job was killed, most likely for lack of memory" in err
    assert "Go on with the whole sweep: python -m cifar_tl.train -m resume=" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("gpus", "accelerator", "devices"),
    [(3, "cuda", [[0], [1], [2], [0]]), (1, "cuda", [1] * 4), (3, "cpu", [1] * 4)],
)
def test_jobs_at_the_same_time_take_gpus_in_turn(command, monkeypatch, gpus, accelerator, devices):
    from hydra._internal.core_plugins.basic_launcher import BasicLauncher
    from hydra_plugins.hydra_joblib_launcher.joblib_launcher import JoblibLauncher

    taken = []

    def train(cfg, folder, experiment):
        taken.append(cfg.trainer.devices)
        return {"best/val/acc": 0.5}

    monkeypatch.setattr(JoblibLauncher, "launch", BasicLauncher.launch)  # here, not in other processes
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr("cifar_tl.train.resolve_accelerator", lambda requested: accelerator)
    monkeypatch.setattr("cifar_tl.train.train", train)
    monkeypatch.setattr("cifar_tl.train.draw_report", lambda folder: None)
    code, _, err = command("cifar_tl.train:main", "-m", "hydra/launcher=local", "seed=range(4)")
    assert code == 0, err
    assert taken == devices


@pytest.mark.parametrize("choice", ["hydra/launcher=local", "sweep=optuna"])
def test_jobs_of_several_processes_are_refused_where_the_others_would_do_another_one(command, monkeypatch, choice):
    from hydra._internal.core_plugins.basic_launcher import BasicLauncher
    from hydra_plugins.hydra_joblib_launcher.joblib_launcher import JoblibLauncher

    monkeypatch.setattr(JoblibLauncher, "launch", BasicLauncher.launch)  # here, not in other processes
    processes = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2")
    trials = ["hydra.sweeper.n_trials=1"] if choice == "sweep=optuna" else ["seed=0,1"]
    code, _, err = command("cifar_tl.train:main", "-m", choice, *trials, *SHORT, *processes)
    assert code == 1
    assert f"{choice} is for jobs of one process, and trainer.devices=2 on 1 node(s) makes 2. Give" in err
    assert "Traceback" not in err


def test_after_an_error_of_cuda_no_further_job_is_tried(command):
    tried = []

    def task(cfg):
        tried.append(cfg.seed)
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    code, _, err = command(task, "-m", "seed=range(3)", "hydra.sweep.dir=sweep")
    assert code == 1
    assert tried == [0]
    assert "illegal memory access was encountered\nThe GPU fails this process from here on: no further job." in err
    assert "Go on with the whole sweep: python -m cifar_tl.train -m resume=" in err


def test_a_sweep_goes_on_with_its_launcher_or_with_another_one(tmp_path):
    overrides = {
        "hydra": [
            *("hydra/launcher=local", "hydra.launcher.n_jobs=4", "+hydra.launcher.timeout=9"),
            *("hydra.sweep.dir=x", "hydra.mode=MULTIRUN", "hydra.sweep.subdir=s${seed}"),
        ],
        "task": ["seed=0,1"],
    }
    (tmp_path / "multirun.yaml").write_text(yaml.safe_dump({"hydra": {"overrides": overrides}}))
    folder = ["hydra.output_subdir=null", f"resume='{tmp_path}'", f"hydra.sweep.dir='{tmp_path}'"]
    rest = ["hydra.sweep.subdir=s${seed}", *folder]
    goes_on = with_overrides_of_resumed_run(["-m", f"resume={tmp_path}"])
    assert goes_on == ["-m", "seed=0,1", *overrides["hydra"][:3], *rest]
    other = ["hydra/launcher=basic", "+hydra.launcher.key=1"]
    another = with_overrides_of_resumed_run(["-m", f"resume={tmp_path}", *other])
    assert another == ["-m", "seed=0,1", rest[0], *other, *folder]


@pytest.mark.parametrize("choice", ["sweep=seeds", "+sweep=optuna", "hydra/launcher=local"])
def test_what_is_for_several_runs_is_not_one_run(command, choice):
    code, _, err = command("cifar_tl.train:main", choice)
    assert code == 1
    assert f"error: {choice.lstrip('+').partition('=')[0]}= is for several runs" in err
    assert "put -m before it" in err
    code, _, err = command("cifar_tl.train:main", "--config-dir", ".", choice.lstrip("+"))
    assert (code, "put -m before it" in err) == (1, True)
    code, out, _ = command("cifar_tl.train:main", choice.lstrip("+"), "--cfg", "job")
    assert (code, "seed: 0" in out) == (0, True)


def test_a_sweep_that_is_refused_leaves_its_folder_to_the_corrected_one(command, tmp_path):
    sweep = ("-m", "seed=1,2", "hydra.sweep.dir=sweep")
    code, _, err = command("cifar_tl.train:main", *sweep, "finetune.head_rl=1")
    assert (code, "Did you mean finetune.head_lr" in err) == (1, True)
    assert not (tmp_path / "sweep").exists()
    code, _, err = command(lambda cfg: 1.0, *sweep)
    assert (code, err) == (0, "")
    assert (tmp_path / "sweep" / "multirun.yaml").is_file()
    table = SweepTable()
    table._folder = tmp_path / "sweep"
    table.withdraw()
    assert (tmp_path / "sweep" / "multirun.yaml").is_file()  # of jobs that there are


def test_a_job_of_a_sweep_goes_on_and_is_repeated_alone(tmp_path):
    make_run(tmp_path / "0", ["sweep=seeds", "model.dropout=0.1"], seed=1)
    run = read_run(tmp_path / "0")
    assert run.command == "python -m cifar_tl.train model.dropout=0.1 seed=1"
    assert "job of" in dict(repeat(run)["facts"])
    make_run(tmp_path / "1", ["sweep=optuna", "callbacks.pruning.pruner.n_warmup_steps=5"], seed=1)
    assert read_run(tmp_path / "1").command == "python -m cifar_tl.train seed=1"
    assert cli._of_several(["sweep=seeds"]) == {"sweep"}
    assert cli._of_several(["sweep=seeds", "seed=1", f"resume={tmp_path / '0'}"]) == set()


def test_gpus_are_taken_in_turn_by_the_jobs_of_a_sweep_alone(command, monkeypatch):
    monkeypatch.setattr("cifar_tl.train.train", lambda cfg, folder, experiment: {"best/val/acc": cfg.trainer.devices})
    monkeypatch.setattr("cifar_tl.train.draw_report", lambda folder: None)
    launcher = "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher"
    code, _, err = command("cifar_tl.train:main", f"hydra.launcher._target_={launcher}")
    assert code == 0, err


def test_a_launcher_that_is_not_installed_is_named(command):
    code, _, err = command(print, "-m", "hydra/launcher=local", "hydra.launcher._target_=hydra_plugins.hydra_x.Y")
    assert code == 1
    assert err.splitlines() == ["error: hydra_x is not installed: pip install hydra-x."]
